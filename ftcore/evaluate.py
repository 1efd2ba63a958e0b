"""Is the tuned model better than the base? Both answer the same held-out rows; general text shows what was forgotten."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track
from transformers import GenerationConfig

from ftcore.data.batches import pad
from ftcore.data.sources import Row
from ftcore.data.tokens import Encoder, Example
from ftcore.logits import completion_logps

Scores = dict[str, Any]
console = Console()
# A completion longer than this is no short answer, and finding it word by word in a generation says nothing.
SHORT_ANSWER_WORDS = 8


@dataclass
class HeldOut:
    """What both models are scored on: held-out rows with their encodings, and the general-text probe."""

    rows: list[Row]
    examples: list[Example]
    probe: list[Example]


def score(
    network: Any, encoder: Encoder, held_out: HeldOut, settings: dict[str, Any], label: str
) -> tuple[Scores, list[Row]]:
    """Scores of one model and its answers (id, prompt, expected, answer, right) to the held-out rows.

    loss: mean negative log-likelihood per completion token in nats; perplexity: its exponential; accuracy: share of rows
    whose greedy answer holds an accepted answer as whole words, over rows with a checkable answer; probe_perplexity: on
    general text. With several processes each scores its share, and all return the whole.
    """
    network.eval()
    size = settings["batch_size"]
    with torch.inference_mode():
        answers = _answers(network, encoder, held_out, settings, f"{label}: answers")
        loss = _mean_loss(network, encoder.tokenizer, held_out.examples, size, f"{label}: loss")
        probe = _mean_loss(network, encoder.tokenizer, held_out.probe, size // 4 or 1, f"{label}: probe")
    checked = [row["right"] for row in answers if row["right"] is not None]
    scores = {
        "loss": loss if held_out.examples else None,
        "perplexity": math.exp(min(loss, 700)) if held_out.examples else None,
        "accuracy": sum(checked) / len(checked) if checked else None,
        "probe_perplexity": math.exp(min(probe, 700)) if held_out.probe else None,
        "rows": len(held_out.examples),
        "rows_with_checkable_answer": len(checked),
    }
    return scores, answers


def changes(base: Scores, tuned: Scores) -> dict[str, Any]:
    """How the tuned model differs: accuracy gained, and the relative rise of perplexity on general text (forgetting)."""
    if not base or not tuned:
        return {}
    gain = None if base["accuracy"] is None or tuned["accuracy"] is None else tuned["accuracy"] - base["accuracy"]
    probe = base["probe_perplexity"]
    return {"accuracy_gain": gain, "probe_perplexity_rise": tuned["probe_perplexity"] / probe - 1 if probe else None}


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    """Whether an answer holds one of the accepted strings as whole words; case and punctuation do not count.

    >>> is_right("You need an X-ray.", ["x ray"]), is_right("Sixteen", ["six"])
    (True, False)
    """
    return any(f" {_normalised(entry)} " in f" {_normalised(answer)} " for entry in accepted)


def accepted_answers(row: Row) -> list[str] | None:
    """What counts as right: the row's `answer`, else its completion when that is short, else None."""
    answer = row.get("answer")
    if answer:
        return [answer] if isinstance(answer, str) else [str(entry) for entry in answer]
    completion = row.get("completion", "")
    return [completion] if 0 < len(completion.split()) <= SHORT_ANSWER_WORDS else None


def generate(network: Any, encoder: Encoder, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Greedy continuations of token-id prompts, as text up to the end token. One batch, padded on the left."""
    pad_id, longest = encoder.tokenizer.pad_token_id or 0, max(map(len, prompts))
    device = next(network.parameters()).device
    input_ids = torch.tensor([[pad_id] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_id, eos_token_id=encoder.end_ids(network)
    )
    output = network.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
    return [text.strip() for text in encoder.tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)]


def _answers(network: Any, encoder: Encoder, held_out: HeldOut, settings: dict[str, Any], label: str) -> list[Row]:
    """Generated answers to the held-out rows, in their order."""
    if not network.can_generate():
        return []
    prompts = [encoder.prompt(row["prompt"]) if "prompt" in row else None for row in held_out.rows]
    order = sorted((k for k, p in enumerate(prompts) if p), key=lambda k: len(prompts[k]))  # type: ignore[arg-type]
    answers: dict[int, str] = {}
    for batch in _batches(order, settings["batch_size"], label):
        texts = generate(network, encoder, [prompts[k] for k in batch], settings["max_new_tokens"])  # type: ignore[misc]
        answers.update(zip(batch, texts, strict=True))
    whole = {k: text for part in _gathered(answers) for k, text in part.items()}
    return [_answered(held_out.rows[k], whole[k]) for k in sorted(whole)]


def _answered(row: Row, answer: str) -> Row:
    accepted = accepted_answers(row)
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "expected": row.get("completion") or (accepted or [""])[0],
        "answer": answer,
        "right": is_right(answer, accepted) if accepted else None,
    }


def _mean_loss(network: Any, tokenizer: Any, examples: list[Example], size: int, label: str) -> float:
    """Mean negative log-likelihood per token with loss, over all processes; 0 without examples."""
    device = next(network.parameters()).device
    order = sorted(range(len(examples)), key=lambda k: len(examples[k].input_ids))
    total, count = 0.0, 0
    for numbers in _batches(order, size, label):
        batch = pad([examples[k] for k in numbers], tokenizer.pad_token_id or 0)
        logps = completion_logps(network, {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)})
        total, count = total - logps.double().sum().item(), count + len(logps)
    sums = _gathered((total, count))
    return sum(part[0] for part in sums) / max(sum(part[1] for part in sums), 1)


def _batches(order: list[int], size: int, label: str) -> Iterator[list[int]]:
    """This process's share of the batches, with a progress bar on the first process."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine = batches[rank::world]
    yield from track(mine, f"{label:<16}", console=console, transient=True, disable=rank > 0 or not console.is_terminal)


def _gathered(part: Any) -> list[Any]:
    """`part` of every process."""
    if not dist.is_initialized():
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
