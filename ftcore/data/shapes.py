"""Rows in the columns of others (Alpaca, ShareGPT, transcripts), recognised and turned into ours."""

from collections.abc import Callable

from ftcore.data.formats import Row
from ftcore.errors import DataError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURN = ("user", "assistant")
SIDES = ("chosen", "rejected")
HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "


def recognised(row: Row, where: str, required: tuple[str, ...]) -> tuple[str, Row] | None:
    """The name of the first shape that a row has, and the row in our columns; None when its columns are ours or unknown.

    Ours: the `required` ones, unless the prompt is a transcript. Raises `DataError` when a row has the columns of a shape and
    not what belongs in them.
    """
    if all(isinstance(row.get(c), str | bool) for c in required) and not _is_transcript(row.get("prompt")):
        return None
    for name, convert in SHAPES.items():
        try:
            if (converted := convert(row)) is not None:
                return name, converted
        except (KeyError, IndexError, TypeError, AttributeError):
            raise DataError(f"{where}: is not the {name} that its columns say.") from None
    return None


def _alpaca(row: Row) -> Row | None:
    if "prompt" in row or not row.keys() >= {"instruction", "output"}:
        return None
    prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return {**row, "prompt": prompt, "completion": row["output"]}


def _sharegpt(row: Row) -> Row | None:
    if "messages" in row or not _dialogue(row.get("conversations")):
        return None
    turns = row["conversations"]
    messages = [{"role": ROLES.get(turn.get("from"), turn.get("from")), "content": turn.get("value")} for turn in turns]
    return {**row, "messages": messages}


def _pair_of_conversations(row: Row) -> Row | None:
    """The turns before the last answer are the prompt, the last messages the two answers."""
    if not all(_dialogue(row.get(side)) for side in SIDES):
        return None
    before = row["prompt"] if isinstance(row.get("prompt"), list) else row["chosen"][:-1]
    answers: Row = {side: row[side][-1].get("content") for side in SIDES}
    last = {"role": "assistant", "content": answers["chosen"]}
    return {**row, **answers, "prompt": before[-1].get("content"), "messages": [*before, last]}


def _transcripts(row: Row) -> Row | None:
    """Anthropic's transcripts: "Human: ... Assistant: ..." with the same turns before the last answer."""
    if "prompt" in row or not all(str(row.get(side)).startswith(HUMAN) for side in SIDES):
        return None
    before, _, chosen = row["chosen"].rpartition(ASSISTANT)
    other, _, rejected = row["rejected"].rpartition(ASSISTANT)
    if before != other:
        return row
    return {**row, **_conversation(before, chosen), "chosen": chosen, "rejected": rejected}


def _transcript_as_prompt(row: Row) -> Row | None:
    """The same where the turns before the answer are the prompt, which ends with "Assistant:"."""
    if not _is_transcript(row.get("prompt")):
        return None
    answers = {column: row[column].removeprefix(" ") for column in ("completion", *SIDES) if column in row}
    before = row["prompt"].removesuffix(ASSISTANT.rstrip())
    return {**row, **_conversation(before, next(iter(answers.values()), "-")), **answers}


def _conversation(before: str, answer: str) -> Row:
    """Prompt and messages of a transcript and the answer to it."""
    texts = [part.split(ASSISTANT) for part in before.split(HUMAN)[1:]]
    messages = [{"role": role, "content": text} for part in texts for role, text in zip(TURN, part, strict=False)]
    return {"prompt": texts[-1][0], "messages": [*messages, {"role": "assistant", "content": answer}]}


def _is_transcript(prompt: object) -> bool:
    """Whether a prompt is a transcript that ends where the assistant is to answer."""
    return isinstance(prompt, str) and prompt.startswith(HUMAN) and prompt.endswith(ASSISTANT.rstrip())


def _dialogue(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)


# Name of a shape -> the row in our columns, None when it has not that shape.
SHAPES: dict[str, Callable[[Row], Row | None]] = {
    "alpaca (instruction, input, output)": _alpaca,
    "ShareGPT (conversations)": _sharegpt,
    "pairs of conversations (chosen, rejected)": _pair_of_conversations,
    "transcripts (chosen, rejected)": _transcripts,
    "transcripts (prompt)": _transcript_as_prompt,
}
