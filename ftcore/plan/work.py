"""The rows that a plan is made for: of the run's own data, by their real lengths, or made up of one length."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

import numpy as np

from ftcore.config.build import build
from ftcore.data import Data, Records
from ftcore.data.examples import Example, Labelled, Pair, Prompt
from ftcore.data.layouts import Batch, in_batches
from ftcore.data.steps import TrainBatches, steps_of_epoch
from ftcore.data.token_cache import lengths, stored
from ftcore.errors import DataError
from ftcore.evaluate.held_out import load_held_out
from ftcore.methods.base import HeldOut, Method, own_settings
from ftcore.methods.online import OnlineMethod
from ftcore.rollout.samples import Sample
from ftcore.settings import Config, Resolved
from ftcore.train.prepare import train_batches

# Epochs whose order is looked at for the largest micro-batch and for padding; later ones are like them.
EPOCHS = 2
# A token that every tokenizer has.
TOKEN = 1


@dataclass(frozen=True)
class Work:
    """What a run computes.

    Args:
        micro_batch: the largest one of a process.
        micro_batch_size: rows of a whole one.
        accumulation: how many there are in each step.
        steps: optimizer steps.
        rows: training rows.
        tokens: of all rows of all steps, padding included.
        squares: the same with the square of each sequence's padded length, to which attention is proportional.
        longest: tokens of the longest row, with its completion.
        sampled: completions that a process samples at once.
        decoded: tokens that it samples one after the other in the whole run, each for so many completions.
        answered: number and length of prompts that are answered at once when models are compared.
        scored: held-out rows whose loss is computed at once.
        probe: pieces of general text that are scored at once.
    """

    micro_batch: Batch
    micro_batch_size: int
    accumulation: int
    steps: int
    rows: int
    tokens: int
    squares: int
    longest: int
    sampled: int
    decoded: int
    answered: tuple[int, int]
    scored: Batch | None
    probe: Batch | None


def work_of_data(config: Config, resolved: Resolved, method: Method, records: Records) -> Work:
    """The work on a run's own rows. Raises `DataError` when none is left."""
    rows = stored(records.train, method.encode, method.encoder, own_settings(config["method"]))
    if not rows:
        raise DataError(f"No training row is left ({method.encoder.limit}). {method.encoder.more_room}.")
    held_out = load_held_out(config, build(config["data"], Data), method, records)
    has_prompts = bool(held_out.rows) and "prompt" in held_out.rows[0]
    prompts = [len(ids) for ids in method.encoder.prompt_ids(held_out.rows)] if has_prompts else []
    return _work(config, resolved, method, rows, held_out, prompts)


def work_of_length(config: Config, resolved: Resolved, method: Method, tokens: int, rows: int) -> Work:
    """The work on `rows` made-up rows of `tokens` tokens each, all of which carry loss."""
    examples = [_made_up(method, k, tokens) for k in range(rows)]
    scored = examples[: config["evaluate"]["max_rows"]]
    probe = (
        [_sequence(k, tokens) for k in range(config["evaluate"]["batch_size"])] if config["evaluate"]["probe"] else []
    )
    held_out = HeldOut([], scored, [], probe if method.predicts_tokens else [])
    return _work(config, resolved, method, examples, held_out, [tokens] * len(scored))


def _made_up(method: Method, k: int, tokens: int) -> Example | Pair | Prompt:
    """A row of a method's kind."""
    one = _sequence(k, tokens)
    if method.record_type == "preference":
        return Pair(one.id, one, replace(one, input_ids=[*one.input_ids[:1], *[TOKEN + 1] * (tokens - 1)]))
    if method.record_type == "unpaired":
        return Labelled(one.id, one.input_ids, one.completion_mask, good=k % 2 == 0)
    if isinstance(method, OnlineMethod):
        return Prompt(one.id, one.input_ids[: max(tokens - method.max_new_tokens, 1)], {"id": one.id, "prompt": ""})
    return one


def _sequence(k: int, tokens: int) -> Example:
    return Example(f"row {k}", *_tokens(TOKEN + k % 200, tokens))


@cache
def _tokens(first: int, tokens: int) -> tuple[list[int], list[bool]]:
    """Ids and loss mask of made-up rows. Neighbours do not begin alike, so that none shares its prompt with another."""
    return [first, *[TOKEN] * (tokens - 1)], [False] + [True] * (tokens - 1)


def _work(
    config: Config, resolved: Resolved, method: Method, rows: Sequence[Any], held_out: HeldOut, prompts: list[int]
) -> Work:
    batches, size = train_batches(config, resolved, method, rows), config["evaluate"]["batch_size"]
    new = method.max_new_tokens if isinstance(method, OnlineMethod) else 0
    sizes, per_step = np.array(lengths(rows)) + new, batches.rows_per_step or 1
    epochs = range(min(ceil(batches.steps / batches.updates * per_step / len(rows)), EPOCHS))
    steps = [step for epoch in epochs for step in steps_of_epoch(sizes.tolist(), per_step, config["seed"], epoch)]
    at_once = batches.micro_batch_size
    largest = max(steps, key=lambda step: (sizes[step].max() * min(len(step), at_once), sizes[step].sum()))
    padded = [_padded(method, batches.micro_batch_size, sizes[step]) for step in steps]
    tokens, squares = np.mean(padded, 0) * batches.steps
    own = ceil(per_step * method.group_size / resolved.machine.processes) if new else 0
    sampled = min(own, method.rollout_batch_size) if isinstance(method, OnlineMethod) else 0
    scored = [replace(one, z=0.0) if isinstance(one, Labelled) else one for one in held_out.examples]
    answered = (
        [(len(part), max(part)) for part in _shared(prompts, resolved, size)] if method.network.can_generate() else []
    )
    return Work(
        _micro_batch(method, batches, [rows[k] for k in largest]),
        micro_batch_size=batches.micro_batch_size,
        accumulation=batches.accumulation,
        steps=batches.steps,
        rows=len(rows),
        tokens=int(tokens),
        squares=int(squares),
        longest=int(sizes.max()),
        sampled=sampled,
        decoded=ceil(own / max(sampled, 1)) * new * batches.steps // batches.updates,
        answered=max(answered, key=lambda one: one[0] * one[1], default=(0, 0)),
        scored=None if new or not scored else method.collate(_most(scored, resolved, size)),
        probe=method.collate_text(_most(held_out.probe, resolved, size // 4 or 1)) if held_out.probe else None,
    )


def _padded(method: Method, size: int, lengths: np.ndarray) -> tuple[int, int]:
    """Tokens of a step's rows, padded in micro-batches of `size`, and the same with squared lengths."""
    copies = 2 if method.record_type == "preference" else method.group_size
    parts = in_batches(sorted(np.repeat(lengths, method.group_size).tolist(), reverse=True), size)
    copies //= method.group_size
    if getattr(method, "packing", False):
        return sum(map(sum, parts)), sum(n**2 for part in parts for n in part)
    return copies * sum(len(part) * part[0] for part in parts), copies * sum(len(part) * part[0] ** 2 for part in parts)


def _micro_batch(method: Method, batches: TrainBatches[Any], rows: list[Any]) -> Batch:
    """The first micro-batch of a step of these rows, which is its largest, with general text beside it if that is trained on."""
    if isinstance(method, OnlineMethod):
        rows = [sample for row in rows for sample in [_sampled(method, row)] * method.group_size]
    elif rows and isinstance(rows[0], Labelled):
        rows = [replace(row, z=0.0) for row in rows]
    else:
        rows = method.prepare(lambda: rows, np.random.default_rng(0))
    general = list(batches.retention[: batches.retention_rows])
    largest = next(batches.micro_batches(method.arrange(rows), general))
    return {**largest, "contents": []}  # type: ignore[misc]  # nothing is known of the reference yet


def _sampled(method: OnlineMethod, prompt: Prompt) -> Sample:
    """A completion of the full length."""
    new = method.max_new_tokens
    numbers = {name: np.zeros(new, np.float32) for name in method.per_token_names}
    return Sample(
        prompt.id, prompt.input_ids + [TOKEN] * new, [False] * len(prompt) + [True] * new,
        length=len(prompt) + new, trained=new, reward=0.0, parts={}, per_token=numbers,
    )  # fmt: skip


def _shared(items: list[Any], resolved: Resolved, size: int) -> list[list[Any]]:
    """Batches of the first process's share of items, by their length."""
    by_length = sorted(items, key=lambda item: item if isinstance(item, int) else len(item))
    return in_batches(by_length[:: resolved.machine.processes], size)


def _most(examples: list[Any], resolved: Resolved, size: int) -> list[Any]:
    """The batch of examples with the most padded tokens."""
    return max(_shared(examples, resolved, size), key=lambda part: len(part) * len(part[-1]))
