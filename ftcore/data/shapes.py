"""Rows in the columns of others, brought into ours. Every column that a shape knows is used, or its rows are refused.

A shape turns a row into messages, or into messages and two answers. `read` does with them what all have in common: a system
message, earlier turns and tools that stand in columns of their own, the order of the turns, switches of the loss.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson

from ftcore.data.formats import Row
from ftcore.data.messages import SPEAKER, Message, check_turns, read_messages, read_tools, switched_on
from ftcore.errors import DataError

SIDES = ("chosen", "rejected")
TURN = re.compile(r"\n\n(Human|Assistant):")
# Columns that belong to the conversation, whatever the shape.
CONTEXT = {"system", "history", "tools", "functions"}
# Columns that the model should see, or that change the loss, in ways that ftcore does not have.
REFUSED = {
    "images", "image", "audio", "audios", "video", "videos", "documents", "files", "chat_template_kwargs", "train_detail",
}  # fmt: skip
# Rows without these that have our columns are plain.
SPECIAL = CONTEXT | REFUSED | {"messages"}
SWITCH_COLUMNS = {"weight", "train", "trainable", "masked"}
# Names of a question and its answer in an item of `history` (ms-swift, Firefly, Belle).
EXCHANGES = (("query", "response"), ("prompt", "response"), ("question", "answer"), ("human", "assistant"))
NOTHING: tuple[object, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Shape:
    """A shape of rows: its name, the columns by which it is known, others that it uses, and what makes a row ours.

    `convert` gives `messages` and, for pairs, the messages `chosen` and `rejected`; None where the columns hold something else.
    """

    name: str
    columns: tuple[str, ...]
    others: tuple[str, ...]
    convert: Callable[[Row], Row | None]


def read(row: Row, where: str, required: tuple[str, ...]) -> tuple[str, Row]:
    """The name of a row's shape ("" when its columns are ours), and the row in our columns.

    Raises `DataError` when it has the columns of a shape and not what belongs in them, or something that cannot be used.
    """
    plain = all(isinstance(row.get(c), str | bool) for c in required) and not _is_transcript(row.get("prompt"))
    if plain and SPECIAL.isdisjoint(row):
        return "", row
    if used := sorted(column for column in _among(REFUSED, row) if row[column] not in NOTHING):
        raise DataError(
            f"{where}: column {used[0]!r} holds what ftcore cannot train on. Remove the row, or the column."
        )
    if plain and "messages" not in row and not any(row[column] not in NOTHING for column in _among(CONTEXT, row)):
        return "", row
    for shape in [OURS] if plain and "messages" not in row else SHAPES:
        if not row.keys() >= {*shape.columns}:
            continue
        try:
            found = shape.convert(row)
        except DataError as error:
            raise DataError(f"{where}{error}") from None
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise DataError(f"{where}: is not the {shape.name} that its columns say.") from None
        if found is not None:
            rest = {c: v for c, v in row.items() if c not in (*shape.columns, *shape.others, *CONTEXT)}
            return shape.name, {**rest, **_finished(row, found, where, to_answer=required == ("prompt",))}
    return "", row


def is_on(row: Row, where: str) -> bool:
    """Whether a row is to be trained on, by its switches."""
    switches = _among(SWITCH_COLUMNS, row)
    return not switches or switched_on({column: row[column] for column in switches}, where)


def _among(columns: set[str], row: Row) -> set[str]:
    """Those of the columns that a row has; almost always none, which is quickly told."""
    return set() if columns.isdisjoint(row) else columns & row.keys()


def _finished(row: Row, found: Row, where: str, *, to_answer: bool) -> Row:
    """Our columns of a row that a shape has taken apart. Where it is `to_answer`, its last message may be the user's."""
    before = [{"role": "system", "content": row["system"]}] if row.get("system") not in NOTHING else []
    before += [message for exchange in row.get("history") or [] for message in _exchange(exchange, where)]
    messages = [*read_messages(before, where), *read_messages(found["messages"], where)]
    answers = {side: read_messages([found[side]], where)[0] for side in SIDES if side in found}
    if answers:
        if any(answer["role"] != "assistant" or answer.keys() - {"role", "content"} for answer in answers.values()):
            raise DataError(
                f"{where}: chosen and rejected must end with a text of the assistant, without calls or thoughts."
            )
        messages = [*messages, answers["chosen"]]
    to_answer = bool(found.get("to_answer") or (to_answer and messages and messages[-1]["role"] != "assistant"))
    if to_answer:
        messages = [*messages, {"role": "assistant", "content": "-"}]
    check_turns([message["role"] for message in messages], where)
    ours: Row = {"messages": messages, "prompt": messages[-2]["content"]}
    tools = next((row[c] for c in ("tools", "functions") if row.get(c) not in NOTHING), found.get("tools"))
    if tools not in NOTHING:
        ours["tools"] = read_tools(tools, where)
    if answers:
        return ours | {side: answer["content"] for side, answer in answers.items()}
    return ours if to_answer else ours | {"completion": spoken(messages[-1])}


def spoken(message: Message) -> str:
    """What an answer says: its text, or its calls as JSON."""
    calls = [call["function"] for call in message.get("tool_calls", ())]
    return str(message["content"]) or orjson.dumps(calls).decode()


def _turns(question: object, answer: object) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _exchange(given: object, where: str) -> list[Message]:
    """An item of `history`: a question with its answer, as a list or an object, or one message."""
    if isinstance(given, list | tuple):
        pair: list[object] = [*given]
    elif isinstance(given, dict):
        if any(key in given for key in SPEAKER):
            return [given]
        pair = [given[key] for keys in EXCHANGES if given.keys() == {*keys} for key in keys]
    else:
        pair = []
    if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        known = " or ".join(map(str, EXCHANGES)).replace("'", '"')
        raise DataError(
            f"{where}: each item of 'history' must be a question and its answer, as a list of two texts, an object with {known}, "
            "or a message with role and content."
        )
    return _turns(*pair)


def _listed(value: object) -> list[Message]:
    """Messages given as a list, or one alone."""
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise TypeError
    return value


def _ours(row: Row) -> Row | None:
    prompt = {"role": "user", "content": row["prompt"]}
    if all(side in row for side in SIDES):
        return {"messages": [prompt], **{side: {"role": "assistant", "content": row[side]} for side in SIDES}}
    return {"messages": _turns(row["prompt"], row["completion"])} if "completion" in row else _to_answer([prompt])


def _to_answer(messages: list[Message]) -> Row:
    return {"messages": messages, "to_answer": True}


def _alpaca(row: Row) -> Row | None:
    if "prompt" in row:
        return None
    if not isinstance(row["instruction"], str) or not isinstance(row.get("input") or "", str):
        raise TypeError
    prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    if all(side in row for side in SIDES):
        sides = {side: row[side] if isinstance(row[side], dict) else _turns("", row[side])[1] for side in SIDES}
        return {"messages": _turns(prompt, "")[:1], **sides}
    return {"messages": _turns(prompt, row["output"])} if "output" in row else None


def _messages(column: str) -> Callable[[Row], Row | None]:
    def convert(row: Row) -> Row | None:
        return None if column != "messages" and not isinstance(row[column], list) else {"messages": row[column]}

    return convert


def _openai_pair(row: Row) -> Row | None:
    given = {"chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}
    pair = _pair({**given, "prompt": row["input"]["messages"]})
    return pair and {**pair, "tools": row["input"].get("tools")}


def _pair(row: Row) -> Row | None:
    """Two answers to one conversation, which stands in the answers' own lists, in a column of its own, or in both."""
    texts = (*(row[side] for side in SIDES), row.get("prompt", ""))
    if all(isinstance(text, str) for text in texts) and not any(row.get(column) for column in CONVERSATIONS):
        return None
    context, sides = _context(row), {side: _side(row[side]) for side in SIDES}
    before = _heard(context, ": the prompt")
    heard = {side: _heard(said, f": {side}") for side, said in sides.items()}
    for side, said in heard.items():
        if said[0]["role"] == "assistant":
            sides[side], heard[side] = [*context, *sides[side]], [*before, *said]
        check_turns([message["role"] for message in heard[side]], f": {side}")
    told = [said[:-1] for said in heard.values()]
    if told[0] != told[1] or any(message not in told[0] for message in before):
        raise DataError(": chosen and rejected belong to different conversations. Correct or remove the row.")
    return {"messages": sides["chosen"][:-1], **{side: said[-1] for side, said in sides.items()}}


def _context(row: Row) -> list[Message]:
    given: Any = next((row[c] for c in ("prompt", *CONVERSATIONS) if row.get(c) not in NOTHING), [])
    return [{"role": "user", "content": given}] if isinstance(given, str) else _listed(given)


def _side(given: object) -> list[Message]:
    return [{"role": "assistant", "content": given}] if isinstance(given, str) else _listed(given)


def _heard(messages: list[Message], where: str) -> list[Message]:
    """What is said, and by whom, however it is written and whether it carries loss."""
    read = read_messages(messages, where)
    return [
        {k: v for k, v in message.items() if k != "trained"} | {"content": message["content"].strip()}
        for message in read
    ]


def _transcripts(row: Row) -> Row | None:
    """Anthropic's transcripts: "Human: ... Assistant: ..." with the same turns before the last answer."""
    if "prompt" in row or not all(
        isinstance(row[side], str) and row[side].lstrip("\n").startswith("Human:") for side in SIDES
    ):
        return None
    return _pair({side: _dialogue(row[side]) for side in SIDES})


def _transcript_as_prompt(row: Row) -> Row | None:
    """The same where the turns before the answer are the prompt, which ends with "Assistant:"."""
    if not _is_transcript(row["prompt"]):
        return None
    if any(TURN.search(row[column]) for column in ("completion", *SIDES) if isinstance(row.get(column), str)):
        raise DataError(": an answer to a transcript holds further turns. Let it end where the next turn begins.")
    before = _dialogue(row["prompt"])[:-1]
    if all(side in row for side in SIDES):
        return {"messages": before, **{side: _turns("", row[side].removeprefix(" "))[1] for side in SIDES}}
    if "completion" in row:
        return {"messages": [*before, _turns("", row["completion"].removeprefix(" "))[1]]}
    return _to_answer(before)


def _dialogue(text: str) -> list[Message]:
    nobody, *parts = TURN.split("\n\n" + text.lstrip("\n"))
    if nobody:
        raise ValueError("text of nobody")
    speakers = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": speakers[name], "content": said.removeprefix(" ")}
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _conversational(row: Row) -> Row | None:
    """A prompt of messages, with an answer as text, message or list of messages, or to be answered."""
    if not isinstance(row["prompt"], list | dict) and not isinstance(row.get("completion"), list | dict):
        return None
    before = _context({"prompt": row["prompt"]})
    return {"messages": [*before, *_side(row["completion"])]} if "completion" in row else _to_answer(before)


def _is_transcript(prompt: object) -> bool:
    """Whether a prompt is a transcript that ends where the assistant is to answer."""
    return isinstance(prompt, str) and prompt.startswith("\n\nHuman:") and prompt.rstrip().endswith("\n\nAssistant:")


CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog")
OURS = Shape("prompt beside a system message, earlier turns or tools", ("prompt",), ("completion", *SIDES), _ours)
SHAPES = (
    Shape(
        "OpenAI's preference pairs",
        ("input", "preferred_output", "non_preferred_output"),
        ("parallel_tool_calls",),
        _openai_pair,
    ),
    Shape("transcripts (chosen, rejected)", SIDES, (), _transcripts),
    Shape("transcripts (prompt)", ("prompt",), ("completion", *SIDES), _transcript_as_prompt),
    Shape("alpaca (instruction, input, output)", ("instruction",), ("input", "output", *SIDES), _alpaca),
    Shape("pairs of conversations (chosen, rejected)", SIDES, ("prompt", *CONVERSATIONS), _pair),
    Shape("messages", ("messages",), ("prompt", "completion", "parallel_tool_calls"), _messages("messages")),
    Shape("conversational prompt and completion", ("prompt",), ("completion",), _conversational),
    *(Shape(f"ShareGPT ({column})", (column,), (), _messages(column)) for column in CONVERSATIONS[1:]),
)
