"""The table of verbs: each with its function, a typical command and its meaning.

A verb's arguments are the keys of its node in conf/config.yaml; the name of the node may be left out (`export format=adapter`).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb.

    Args:
        target: `module:function`. It gets the checked config or, with `before_config`, its own arguments, the other words of
            the command line and the folders of --config-dir. It returns what `json=true` prints.
        usage: the words of a typical command.
        meaning: what it does, in one line.
        before_config: whether it reads the words of the command line itself.
        page: `module:function` that makes a file of the answer for people, and returns its path, or None.
        row: dotted keys of the answer that a sweep shows for each job; None if it cannot be swept.
    """

    target: str
    usage: str
    meaning: str
    before_config: bool = False
    page: str | None = None
    row: tuple[str, ...] | None = None


VERBS = {
    "train": Verb(
        "ftcore.runs.start:train", "train", "fine-tune, compare with the base model (the default)",
        page="ftcore.ui.report:of_finished", row=(),
    ),
    "eval": Verb(
        "ftcore.verbs.finished:evaluate", "eval run=<folder>", "score a run on any data option",
        row=("base.loss", "tuned.loss", "base.accuracy", "tuned.accuracy"),
    ),
    "compare": Verb(
        "ftcore.verbs.finished:compare", "compare run=A other=B", "two runs, or a run and its base, side by side",
        row=("first.loss", "second.loss", "first.accuracy", "second.accuracy"),
    ),
    "chat": Verb("ftcore.verbs.finished:chat", "chat run=<folder>", "ask it questions"),
    "inspect": Verb(
        "ftcore.verbs.inspect_data:inspect", "inspect data=...", "what the rows are like, before training",
        page="ftcore.ui.report:of_data",
        row=("rows.train", "rows.test", "tokens.median", "tokens.longest", "trained_share"),
    ),
    "plan": Verb(
        "ftcore.plan.verb:plan", "plan target=80GB ...", "memory, time and cost of a run, before it and without its hardware",
        row=("peak_gb", "host_gb", "micro_batch_size", "devices", "steps", "flops"),
    ),
    "export": Verb("ftcore.verbs.finished:export", "export run=<folder>", "one merged model, or the adapter (format=adapter)"),
    "pack": Verb("ftcore.sharing.pack:pack", "pack run=<folder>", "a recipe and a lock that repeat the run elsewhere"),
    "replay": Verb(
        "ftcore.sharing.replay:replay", "replay recipe=<file>",
        "repeat it and say what differs here; expect=true: same scores", before_config=True,
    ),
    "check": Verb(
        "ftcore.sharing.check:check", "check recipe=<file>", "everything that is wrong with it, without a model",
        before_config=True,
    ),
    "explain": Verb(
        "ftcore.verbs.explain:explain", "explain key=method.lr ...", "where a value is set, what it replaced, its type",
        before_config=True,
    ),
    "runs": Verb(
        "ftcore.verbs.runs:runs", "runs", "all runs below output_dir, each below what it was made from, with their scores",
    ),
    "ui": Verb("ftcore.ui.start:ui", "ui", "a page in the browser: look at runs, vote on answers, train on the votes"),
    "report": Verb("ftcore.ui.report:report", "report run=<folder>", "a run or a sweep as one HTML file"),
    "feedback": Verb(
        "ftcore.verbs.feedback:feedback", "feedback run=<folder> to=votes.jsonl",
        "what people said of models' answers: count it, write it, take it in",
    ),
    "storage": Verb(
        "ftcore.verbs.storage:storage", "storage [delete=rows]",
        "what is kept on the disk; yes=true deletes what delete= names", before_config=True,
    ),
    "wandb_sweep": Verb(
        "ftcore.sweeps.wandb:wandb_sweep", "wandb_sweep sweeps=<name>", "make it a W&B sweep, whose agents run the jobs",
        before_config=True,
    ),
}  # fmt: skip
