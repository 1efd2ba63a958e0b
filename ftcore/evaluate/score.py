"""Is the tuned model better than the base? Both answer the same held-out rows; general text shows what was forgotten."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ftcore.console import console
from ftcore.data.examples import Example
from ftcore.data.layouts import T, in_batches, pad
from ftcore.data.sources import Row
from ftcore.errors import is_private
from ftcore.evaluate.by_row import Counts, Scored, means, perplexity, terms_by_row
from ftcore.kernels.packed_weights import packed_weights
from ftcore.machine.processes import gathered, rank_and_world
from ftcore.methods.base import HeldOut, Method
from ftcore.methods.terms import Averages, Term, by_row
from ftcore.models.logprobs import completion_logps
from ftcore.rewards.answers import accepted_answers, is_right
from ftcore.rollout.sample import generate
from ftcore.run_folder import RowScores, Scores
from ftcore.settings import Evaluate


class Measured(NamedTuple):
    """What a model got: its scores, its answers (id, prompt, expected, answer, right), and its scores by row."""

    scores: Scores
    answers: list[Row]
    by_row: RowScores


def score(method: Method, held_out: HeldOut, settings: Evaluate, label: str) -> Measured:
    """Score a method's network on the held-out rows.

    Every term of the method's loss, averaged over the held-out rows (`loss`: nats per token where it is a likelihood, and then
    `perplexity` is its exponential). `accuracy`: share of rows whose greedy answer holds an accepted answer as whole words,
    over rows with a checkable answer. `probe_perplexity`: on general text. And what the method adds. Several processes score a
    part each, and all return the scores of all rows.
    """
    method.network.eval()
    size = settings["batch_size"]
    with torch.inference_mode():
        answers = _answers(method, held_out, settings, f"{label}: answers")
        examples = method.held_out_rows(held_out.examples)
        terms = _averages(method.held_out_terms, method.counts, examples, size, f"{label}: loss")
        more = method.held_out_scores(held_out, size)
        probe = _probe_perplexity(method, held_out.probe, size, f"{label}: probe")
    right = [row["right"] for row in answers]
    questions = [(row.get("prompt"), accepted_answers(row)) for row in held_out.rows]
    scored = [
        terms,
        perplexity("perplexity", terms),
        means({"accuracy": right}, questions),
        means(more, (held_out.rows, held_out.cloze, {one.id: None for one in held_out.examples})),
        probe,
    ]
    scores = {"loss": None, **{name: value for part in scored for name, value in part.scores.items()}}
    counts = {"rows": len(held_out.rows), "rows_with_checkable_answer": sum(one is not None for one in right)}
    if is_private():
        answers = [{"id": row["id"], "right": row["right"]} for row in answers]
    return Measured({**scores, **counts}, answers, {name: one for part in scored for name, one in part.by_row.items()})


def probe_perplexity(method: Method, probe: list[Example], batch_size: int, label: str) -> float | None:
    """Perplexity on general text; None without a probe."""
    return _probe_perplexity(method, probe, batch_size, label).scores["probe_perplexity"]


def _probe_perplexity(method: Method, probe: list[Example], batch_size: int, label: str) -> Scored:
    """Its passages are long: a quarter of `batch_size` at once."""

    def terms(examples: list[Example]) -> dict[str, Term]:
        batch = method.to_device(pad(examples, method.pad_id))
        logps = completion_logps(method.network, batch)  # (N,)
        return {"nll": by_row(Term(-logps, len(logps), "tokens"), batch)}

    def counts(example: Example) -> dict[str, int]:
        return {"tokens": sum(example.completion_mask[1:])}

    return perplexity("probe_perplexity", _averages(terms, counts, probe, batch_size // 4 or 1, label))


def changes(base: Scores, tuned: Scores) -> Scores:
    """How the tuned model differs: accuracy gained, and the relative rise of perplexity on general text (forgetting)."""
    if not base or not tuned:
        return {}
    gain = None if base["accuracy"] is None or tuned["accuracy"] is None else tuned["accuracy"] - base["accuracy"]
    before, after = base["probe_perplexity"], tuned["probe_perplexity"]
    return {"accuracy_gain": gain, "probe_perplexity_rise": after / before - 1 if before and after else None}


def _answers(method: Method, held_out: HeldOut, settings: Evaluate, label: str) -> list[Row]:
    """Greedy answers to the held-out rows, in their order."""
    if not method.network.can_generate() or not any("prompt" in row for row in held_out.rows):
        return []
    prompts = method.encoder.prompt_ids(held_out.rows)
    by_length = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    answers: list[tuple[int, str]] = []
    with packed_weights(method.network):
        for batch in _batches(by_length, settings["batch_size"], label):
            texts = generate(method.network, method.encoder, [prompts[k] for k in batch], settings["max_new_tokens"])
            answers += zip(batch, texts, strict=True)
    return [_answered(held_out.rows[k], text) for k, text in sorted(chain.from_iterable(gathered(answers)))]


def _answered(row: Row, answer: str) -> Row:
    accepted = accepted_answers(row)
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "expected": row.get("completion") or row.get("chosen") or (accepted or [""])[0],
        "answer": answer,
        "right": is_right(answer, accepted) if accepted else None,
    }


def _averages(
    terms: Callable[[list[Any]], dict[str, Term]], counts: Counts, examples: list[Any], size: int, label: str
) -> Scored:
    """Each term averaged over the examples of all processes, and by row; no scores without examples."""
    sums, batches = Averages(), []
    for batch in _batches(sorted(range(len(examples)), key=lambda k: len(examples[k])), size, label):
        sums.add(found := terms([examples[k] for k in batch]))
        batches.append((batch, {name: term._replace(values=term.values.cpu()) for name, term in found.items()}))
    return Scored(dict(sums.over_processes()), terms_by_row(examples, counts, [*chain(*gathered(batches))]))


def _batches(items: list[T], size: int, label: str) -> Iterator[list[T]]:
    """Batches of this process's share of the items, with a progress bar in the first process."""
    rank, world = rank_and_world()
    mine = in_batches(items[rank::world], size)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    disable = rank > 0 or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        yield from progress.track(mine, description=f"{label:<16}")
