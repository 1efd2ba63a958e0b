"""`feedback`: what people said of models' answers, without a browser: answers to vote on, counts, exports."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Column, Table
from rich.text import Text

from ftcore.config.build import build, record_type
from ftcore.console import plain
from ftcore.data import Data
from ftcore.data.feedback import Feedback
from ftcore.data.sources import rows_of
from ftcore.data.votes import HELD_OUT, read_votes
from ftcore.errors import ConfigError, DataError
from ftcore.evaluate.preferences import agreement, compared_authors, counts, preferred, raters
from ftcore.files import expanded, sha256, write_lines
from ftcore.rollout.sample import sample
from ftcore.run_folder import Run
from ftcore.settings import Config
from ftcore.verbs.finished import computing_here, load_writer
from ftcore.verbs.runs import wins_text

Writer = Callable[[Sequence[str], list[int]], list[list[str]]]
SAMPLES = 2  # answers of a model to each prompt
AT_ONCE = 8  # prompts


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
    write = _writer(config, run)
    for k in range(0, len(prompts), AT_ONCE):
        ids, texts = zip(*prompts[k : k + AT_ONCE], strict=True)
        written = zip(ids, write(texts, [config["seed"] + id for id in ids]), strict=True)
        store.add_answers(author, ((id, n, text) for id, own in written for n, text in enumerate(own, 1)))
        plain.print(f"Answers to {min(k + AT_ONCE, len(prompts)):,} of {len(prompts):,} prompts are written.")
    return len(prompts)


def _writer(config: Config, run: Run) -> Writer:
    """What writes `SAMPLES` answers of a run's model to each of some prompts, given a seed for each."""
    foundation, encoder = load_writer(config, run)
    ends, pad = encoder.end_ids(foundation.network), foundation.tokenizer.pad_token_id or 0
    longest = config["evaluate"]["max_new_tokens"]
    options: dict[str, Any] = {"group_size": SAMPLES, "max_new_tokens": longest, "temperature": 1.0, "top_p": 1.0}

    def write(texts: Sequence[str], seeds: list[int]) -> list[list[str]]:
        prompts = encoder.prompt_ids([{"prompt": text} for text in texts])
        with torch.inference_mode(), computing_here(config):
            found = sample(foundation.network, prompts, seeds, end_ids=ends, pad_id=pad, **options)
        return [encoder.decode([one.ids for one in group]) for group in found]

    return write
