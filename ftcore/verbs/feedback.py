"""`feedback`: what people said of models' answers, without a browser: answers to vote on, counts, exports."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from rich.text import Text

from ftcore.config.build import build, record_type
from ftcore.console import plain, quiet
from ftcore.data import Data
from ftcore.data.feedback import Feedback
from ftcore.data.sources import rows_of
from ftcore.data.tokens import Encoder
from ftcore.data.votes import read_votes
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.preferences import agreement, compared_authors, counts, preferred, raters
from ftcore.files import expanded, sha256, write_lines
from ftcore.models.foundation import load_run
from ftcore.models.precision import cast_weights, computing_in
from ftcore.rollout.sample import Completion, sample
from ftcore.run_folder import Run
from ftcore.settings import Config, Machine
from ftcore.verbs.runs import wins_text

Sampler = Callable[[list[list[int]], list[int]], list[list[Completion]]]
SAMPLES = 2  # answers of a model to each prompt
AT_ONCE = 8  # prompts
HELD_OUT = "held_out.jsonl"


def feedback(config: Config) -> dict[str, object]:
    """Count the votes; first, as far as asked, take in votes or prompts and write answers; last, write the votes to a file.

    With `run=` that run's rows and answers are taken in, `answers=` lets its model write, and beside the file of `to=` the
    held-out rows of its data are written, as far as they are of the type that `method=` reads.
    """
    store, arguments = Feedback(expanded(config["output_dir"])), config["feedback"]
    run = Run(config["run"]) if config["run"] else None
    answer: dict[str, object] = {"store": str(store.file)}
    if arguments["from"]:
        answer["taken_in"] = store.take_in(read_votes(expanded(arguments["from"])))
    if arguments["prompts"]:
        answer["prompts"] = store.add_prompts(
            str(row["prompt"]) for _, row in rows_of(arguments["prompts"]) if "prompt" in row
        )
    if run:
        store.add_run(run)
    if arguments["answers"]:
        answer["answers"] = _write_answers(config, run, store, arguments["answers"])
    votes = store.votes()
    answer |= {**counts(votes), "raters": raters(votes), "agreement": agreement(votes), "wins": list(_wins(votes))}
    if arguments["to"]:
        answer |= _export(config, run, store, expanded(arguments["to"]))
    _show(answer)
    return answer


def _wins(votes: list[dict[str, Any]]) -> Iterator[dict[str, object]]:
    for first, second in compared_authors(votes):
        yield {"first": first, "second": second, **preferred(votes, first, second)}


def _show(answer: Mapping[str, Any]) -> None:
    plain.print(
        f"{answer['store']}: {answer['pairs']:,} pairs, {answer['labels']:,} labels, {answer['corrections']:,} corrections; "
        f"{answer['measuring']:,} votes that measure."
    )
    table = Table(*(Column(name, overflow="fold") for name in ("first", "second", "the first is preferred")))
    for one in answer["wins"]:
        table.add_row(Text(one["first"]), Text(one["second"]), wins_text(one))
    if answer["wins"]:
        plain.print(table)
    for rater, took in answer["raters"].items():
        if took["biased"]:
            plain.print(
                f"{rater} takes the left side in {took['rate']:.0%} of {took['votes']} votes: more or less than chance."
            )
    if found := answer["agreement"]["pairs"]:
        plain.print(f"Several people voted on {found:,} pairs, and on {answer['agreement']['agreed']:,} of them alike.")


def _export(config: Config, run: Run | None, store: Feedback, file: Path) -> dict[str, object]:
    """Write the votes, and beside them the held-out rows of the run's data, by which the next run is measured."""
    votes = store.exported()
    write_lines(file, votes)
    held_out = _held_out(config, run) if run else []
    if held_out:
        write_lines(file.with_name(HELD_OUT), held_out)
    plain.print(f"Wrote {len(votes):,} votes to {file}. Train on them: data=feedback data.path={file}")
    beside = str(file.with_name(HELD_OUT)) if held_out else None
    return {"to": str(file), "sha256": sha256(file), "votes": len(votes), "held_out": beside}


def _held_out(config: Config, run: Run) -> list[dict[str, Any]]:
    """The held-out rows of a run's data as the config's method reads them; [] when the data has none of that type."""
    try:
        data = build((run.config or config)["data"], Data)
        return [{k: v for k, v in row.items() if k != "where"} for row in data.load(record_type(config["method"])).test]
    except DataError:
        return []


def _write_answers(config: Config, run: Run | None, store: Feedback, count: int) -> int:
    """Let a run's model write `SAMPLES` answers to each of the next `count` prompts; what is written is kept at once."""
    if not run:
        raise ConfigError("answers= needs run=<run folder>, whose model writes them.")
    author = store.author(run)
    prompts = store.unanswered(author, count, SAMPLES)
    if not prompts:
        plain.print("Every prompt has its answers.")
        return 0
    quiet()
    foundation, _ = load_run(run)
    if not foundation.network.can_generate():
        raise ConfigError("This run's model writes nothing: it scores answers or fills in words.")
    machine = build(config["hardware"], Machine)
    cast_weights(foundation.network, machine.precision)
    foundation.network.to(machine.device).eval()
    encoder = Encoder(foundation.tokenizer, build(config["data"], Data))
    options: dict[str, Any] = {"max_new_tokens": config["evaluate"]["max_new_tokens"], "temperature": 1.0, "top_p": 1.0}
    ends: dict[str, Any] = {
        "end_ids": encoder.end_ids(foundation.network),
        "pad_id": foundation.tokenizer.pad_token_id or 0,
    }
    write: Sampler = partial(sample, foundation.network, group_size=SAMPLES, **options, **ends)
    for k in range(0, len(prompts), AT_ONCE):
        ids, texts = zip(*prompts[k : k + AT_ONCE], strict=True)
        tokens = encoder.prompt_ids([{"prompt": text} for text in texts])
        seeds = [config["seed"] + id for id in ids]
        with torch.inference_mode(), computing_in(machine.precision, machine.device):
            found = write(tokens, seeds)
        written = [encoder.decode([one.ids for one in group]) for group in found]
        numbered = ((id, n, text) for id, own in zip(ids, written, strict=True) for n, text in enumerate(own, 1))
        store.add_answers(author, numbered)
        plain.print(f"Answers to {min(k + AT_ONCE, len(prompts)):,} of {len(prompts):,} prompts are written.")
    return len(prompts)
