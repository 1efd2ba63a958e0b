"""Shapes of rows that others use, recognised by their columns and turned into ours."""

from collections.abc import Callable
from typing import Any

from ftcore.data.formats import Row

Shape = tuple[str, Callable[[Row], bool], Callable[[Row], Row]]
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
ANSWERS: tuple[str, ...] = ("completion", "chosen", "rejected")
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def shape_of(row: Row) -> Shape | None:
    """The first shape that a row has; None when its columns are ours or nobody's."""
    return next((shape for shape in SHAPES if shape[1](row)), None)


def _alpaca(row: Row) -> Row:
    prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return {**row, "prompt": prompt, "completion": row["output"]}


def _sharegpt(row: Row) -> Row:
    turns = row["conversations"]
    messages = [{"role": ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")} for turn in turns]
    return {**row, "messages": messages}


def _messages_of_pair(row: Row) -> Row:
    """Conversational pairs: the turns before the last answer are the prompt, the last messages the two answers."""
    before = row["prompt"] if isinstance(row.get("prompt"), list) else row["chosen"][:-1]
    answers: Row = {side: row[side][-1].get("content") for side in ("chosen", "rejected")}
    last = {"role": "assistant", "content": answers["chosen"]}
    return {**row, **answers, "prompt": before[-1].get("content"), "messages": [*before, last]}


def _transcripts(row: Row) -> Row:
    """Anthropic's transcripts: "Human: ... Assistant: ..." with the same turns before the last answer."""
    before, _, chosen = row["chosen"].rpartition(ASSISTANT)
    other, _, rejected = row["rejected"].rpartition(ASSISTANT)
    if before != other:
        return row
    return {**row, **_conversation(before, chosen), "chosen": chosen, "rejected": rejected}


def _transcript_as_prompt(row: Row) -> Row:
    """The same where the turns before the answer are the prompt, which ends with "Assistant:"."""
    answers = {side: row[side].removeprefix(" ") for side in ANSWERS if side in row}
    before = row["prompt"].removesuffix(ASSISTANT.rstrip())
    return {**row, **_conversation(before, next(iter(answers.values()), "-")), **answers}


def _conversation(before: str, answer: str) -> Row:
    """Prompt and messages of a transcript and the answer to it."""
    texts = [part.split(ASSISTANT) for part in before.split(HUMAN)[1:]]
    messages = [{"role": role, "content": text} for part in texts for role, text in zip(TURN, part, strict=False)]
    return {"prompt": texts[-1][0], "messages": [*messages, {"role": "assistant", "content": answer}]}


def is_transcript(prompt: Any) -> bool:
    """Whether a prompt is a transcript up to where the assistant speaks."""
    return isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT.rstrip())


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(column in row for column in columns)


def _dialogue(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


TURN = ("user", "assistant")
# Name, whether a row has it, and the row in our columns.
SHAPES: tuple[Shape, ...] = (
    ("alpaca (instruction, input, output)", lambda row: _has("instruction", "output")(row) and "prompt" not in row, _alpaca),
    ("ShareGPT (conversations)", lambda row: _dialogue(row.get("conversations")) and "messages" not in row, _sharegpt),
    (
        "pairs of conversations (chosen, rejected)",
        lambda row: _dialogue(row.get("chosen")) and _dialogue(row.get("rejected")),
        _messages_of_pair,
    ),
    (
        "transcripts (chosen, rejected)",
        lambda row: "prompt" not in row and all(str(row.get(side)).startswith(HUMAN) for side in ("chosen", "rejected")),
        _transcripts,
    ),
    ("transcripts (prompt)", lambda row: is_transcript(row.get("prompt")), _transcript_as_prompt),
)  # fmt: skip
