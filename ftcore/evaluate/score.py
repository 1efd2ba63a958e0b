"""Is the tuned model better than the base? Both answer the same held-out rows; general text shows what was forgotten."""

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ftcore.console import console
from ftcore.data.layouts import T, in_batches, pad
from ftcore.data.sources import Row
from ftcore.data.tokens import Example
from ftcore.errors import is_private
from ftcore.kernels.packed_weights import packed_weights
from ftcore.machine.processes import gathered, rank_and_world
from ftcore.methods.base import Averages, HeldOut, Method, Term
from ftcore.models.logprobs import completion_logps
from ftcore.rewards.answers import accepted_answers, is_right
from ftcore.rollout.sample import generate
from ftcore.run_folder import Scores
from ftcore.settings import Evaluate


def score(method: Method, held_out: HeldOut, settings: Evaluate, label: str) -> tuple[Scores, list[Row]]:
    """Scores of a method's network and its answers (id, prompt, expected, answer, right) to the held-out rows.

    Every term of the method's loss, averaged over the held-out rows (`loss`: nats per token where it is a likelihood, and then
    `perplexity` is its exponential). `accuracy`: share of rows whose greedy answer holds an accepted answer as whole words,
    over rows with a checkable answer. `probe_perplexity`: on general text. And what the method adds. Several processes score a
    part each, and all return the scores of all rows.
    """
    method.network.eval()
    size = settings["batch_size"]
    with torch.inference_mode():
        answers = _answers(method, held_out, settings, f"{label}: answers")
        terms = _averages(method.held_out_terms, held_out.examples, size, f"{label}: loss")
        more = method.held_out_scores(held_out, size)
        probe = probe_perplexity(method, held_out.probe, size, f"{label}: probe")
    checked = [row["right"] for row in answers if row["right"] is not None]
    scores = {
        "loss": None,
        **terms,
        "perplexity": math.exp(min(terms["nll"], 700)) if "nll" in terms else None,
        "accuracy": sum(checked) / len(checked) if checked else None,
        **more,
        "probe_perplexity": probe,
        "rows": len(held_out.rows),
        "rows_with_checkable_answer": len(checked),
    }
    if is_private():
        answers = [{"id": row["id"], "right": row["right"]} for row in answers]
    return scores, answers


def probe_perplexity(method: Method, probe: list[Example], batch_size: int, label: str) -> float | None:
    """Perplexity on general text, whose passages are long: a quarter of `batch_size` at once. None without a probe."""

    def terms(examples: list[Example]) -> dict[str, Term]:
        logps = completion_logps(method.network, method.to_device(pad(examples, method.pad_id)))  # (N,)
        return {"nll": Term(-logps.double(), len(logps), "tokens")}

    return math.exp(min(_averages(terms, probe, batch_size // 4 or 1, label)["nll"], 700)) if probe else None


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
    terms: Callable[[list[Any]], dict[str, Term]], examples: list[Any], size: int, label: str
) -> dict[str, float]:
    """Each term averaged over the examples of all processes; {} without examples."""
    sums = Averages()
    for batch in _batches(sorted(examples, key=len), size, label):
        sums.add(terms(batch))
    return sums.over_processes()


def _batches(items: list[T], size: int, label: str) -> Iterator[list[T]]:
    """This process's batches, with a progress bar in the first process."""
    rank, world = rank_and_world()
    mine = in_batches(items, size)[rank::world]
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    disable = rank > 0 or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=disable) as progress:
        yield from progress.track(mine, description=f"{label:<16}")
