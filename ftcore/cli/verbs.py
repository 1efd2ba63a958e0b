"""The table of verbs: what each is called with, where its function is, and what it is for.

A verb's arguments are the keys of its node in conf/config.yaml (`export.format`); behind its name the node may be left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One verb.

    Args:
        target: `module:function`. It gets the checked config; where it comes before a config, its own arguments, the other
            words of the command line and the folders of --config-dir. It returns what `json=true` prints.
        usage: the words of a typical command.
        meaning: what it does, in a line.
        before_config: whether it reads its words itself.
        row: dotted keys of the answer that a swept job's line shows; None: it cannot be swept.
    """

    target: str
    usage: str
    meaning: str
    before_config: bool = False
    row: tuple[str, ...] | None = None


VERBS = {
    "train": Verb(
        "ftcore.runs.start:train", "train", "fine-tune, compare with the base model (the default)", row=()
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
        "ftcore.verbs.inspect_data:inspect", "inspect data=...", "what the rows are like, before anything trains",
        row=("rows.train", "rows.test", "tokens.median", "tokens.longest", "trained_share"),
    ),
    "export": Verb(
        "ftcore.verbs.finished:export", "export run=<folder>", "one merged model, or the adapter (format=adapter)"
    ),
    "pack": Verb(
        "ftcore.sharing.pack:pack", "pack run=<folder>", "a recipe file and a lock that give the same run elsewhere"
    ),
    "replay": Verb(
        "ftcore.sharing.replay:replay", "replay recipe=<file>",
        "run it: what differs here, and with expect=true the same scores", before_config=True,
    ),
    "check": Verb(
        "ftcore.sharing.check:check", "check recipe=<file>", "everything that is wrong with it, without a model",
        before_config=True,
    ),
    "explain": Verb(
        "ftcore.verbs.explain:explain", "explain key=method.lr ...", "who set a value, what it replaced, what it may be",
        before_config=True,
    ),
    "storage": Verb(
        "ftcore.verbs.storage:storage", "storage [delete=rows]",
        "what is kept on the disk; yes=true deletes what delete= names", before_config=True,
    ),
    "wandb_sweep": Verb(
        "ftcore.sweeps.wandb:wandb_sweep", "wandb_sweep sweeps=<name>", "the sweep as W&B's, whose agents run our jobs",
        before_config=True,
    ),
}  # fmt: skip
