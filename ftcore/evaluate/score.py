"""Is the tuned model better than the base? Both answer the same held-out rows; general text shows what was forgotten."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from rich.progress import track

from ftcore.console import console
from ftcore.data.layouts import T, in_batches, pad
from ftcore.data.sources import Row
from ftcore.data.tokens import Example
from ftcore.errors import is_private
from ftcore.kernels.packed_weights import packed_weights
from ftcore.machine.processes import gathered, rank_and_world
from ftcore.methods.base import Averages, HeldOut, Method
from ftcore.models.logprobs import completion_logps
from ftcore.rewards.answers import accepted_answers, is_right
from ftcore.rollout.greedy import generate
from ftcore.settings import Evaluate

Scores = dict[str, Any]


def score(method: Method, held_out: HeldOut, settings: Evaluate, label: str) -> tuple[Scores, list[Row]]:
    """Scores of a method's network and its answers (id, prompt, expected, answer, right) to the held-out rows.

    Every term of the method's loss averaged over the held-out rows (loss: nats per token where it is a likelihood, then
    perplexity is its exponential); accuracy: share of rows whose greedy answer holds an accepted answer as whole words, over
    rows with a checkable answer; probe_perplexity: on general text; and what the method adds. With several processes each
    scores its share, and all return the whole.
    """
    method.network.eval()
    size = settings["batch_size"]
    with torch.inference_mode():
        answers = _answers(method, held_out, settings, f"{label}: answers")
        terms = _averages(method, held_out.examples, size, f"{label}: loss")
        more = method.held_out_scores(held_out, answers, size)
        probe = probe_perplexity(method, held_out.probe, size // 4 or 1, f"{label}: probe")
    checked = [row["right"] for row in answers if row["right"] is not None]
    scores = {
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


def probe_perplexity(method: Method, probe: list[Example], size: int, label: str) -> float | None:
    """Perplexity on general text; None without a probe."""
    if not probe:
        return None
    total, count = 0.0, 0
    for examples in _batches(sorted(probe, key=len), size, label):
        logps = completion_logps(method.network, method.placed(pad(examples, method.pad_id)))  # (N,)
        total, count = total - logps.double().sum().item(), count + len(logps)
    sums = gathered((total, count))
    return math.exp(min(sum(part[0] for part in sums) / max(sum(part[1] for part in sums), 1), 700))


def changes(base: Scores, tuned: Scores) -> dict[str, Any]:
    """How the tuned model differs: accuracy gained, and the relative rise of perplexity on general text (forgetting)."""
    if not base or not tuned:
        return {}
    gain = None if base["accuracy"] is None or tuned["accuracy"] is None else tuned["accuracy"] - base["accuracy"]
    probe = base["probe_perplexity"]
    return {"accuracy_gain": gain, "probe_perplexity_rise": tuned["probe_perplexity"] / probe - 1 if probe else None}


def _answers(method: Method, held_out: HeldOut, settings: Evaluate, label: str) -> list[Row]:
    """Generated answers to the held-out rows, in their order."""
    if not method.network.can_generate() or not any("prompt" in row for row in held_out.rows):
        return []
    prompts = [method.encoder.prompt(row) for row in held_out.rows]
    order = sorted(range(len(prompts)), key=lambda k: len(prompts[k]))
    answers: dict[int, str] = {}
    with packed_weights(method.network):
        for batch in _batches(order, settings["batch_size"], label):
            texts = generate(method.network, method.encoder, [prompts[k] for k in batch], settings["max_new_tokens"])
            answers.update(zip(batch, texts, strict=True))
    whole = {k: text for part in gathered(answers) for k, text in part.items()}
    return [_answered(held_out.rows[k], whole[k]) for k in sorted(whole)]


def _answered(row: Row, answer: str) -> Row:
    accepted = accepted_answers(row)
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "expected": row.get("completion") or row.get("chosen") or (accepted or [""])[0],
        "answer": answer,
        "right": is_right(answer, accepted) if accepted else None,
    }


def _averages(method: Method, examples: list[Any], size: int, label: str) -> Scores:
    """Each term of the loss averaged over held-out rows and processes."""
    sums = Averages()
    for batch in _batches(sorted(examples, key=len), size, label):
        sums.add(method.held_out_terms(batch))
    return {"loss": None, **sums.over_processes()} if examples else {"loss": None}


def _batches(items: list[T], size: int, label: str) -> Iterator[list[T]]:
    """This process's share of the batches, with a progress bar on the first process."""
    rank, world = rank_and_world()
    mine = in_batches(items, size)[rank::world]
    yield from track(mine, f"{label:<16}", console=console, transient=True, disable=rank > 0 or not console.is_terminal)
