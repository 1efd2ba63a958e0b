"""Messages as people write them, brought into one form. Nothing that was said, or that says how it counts, is lost.

A message of ours has `role`, `content` (a text, "" only beside `tool_calls`), the keys that chat templates read, and
`trained: False` where a turn of the assistant carries no loss.
"""

import re
from collections.abc import Mapping
from typing import Any

import orjson

from ftcore.errors import DataError

Message = dict[str, Any]
ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "function_call": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
# Names of a message's speaker and of its text in the formats of others.
SPEAKER, TEXT = ("role", "from"), ("content", "value")
# Switches of the loss of a turn or a row, and those that mean the opposite (OpenAI, Axolotl, Mistral, ms-swift).
SWITCHES, INVERSE = ("weight", "train", "training", "trainable", "loss", "loss_weight"), ("masked", "mask")
ON: dict[object, bool] = {True: True, "true": True, "1": True, False: False, "false": False, "0": False}  # 1 is True
# Names under which templates read a thought.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Keys of a message that are used, or refused where the chat template leaves them out.
KNOWN = {"role", "content", "tool_calls", "tool_call_id", "name", "trained", *THOUGHTS}
# Keys of a message that change what it says or how it counts, in ways that ftcore does not have.
REFUSED = ("images", "image", "audio", "audios", "video", "videos", "train_detail", "loss_scale")
# What looks like another name of a thought, or of a switch.
SUSPECT = re.compile(
    r"think|thought|reason|rationale|analysis|scratchpad|tool_plan|weight|train|loss|mask|learn|ignore|skip"
)
TEXT_PARTS = ("text", "input_text", "output_text")
LOOKS_LIKE = 'Messages look like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'


def read_messages(given: object, where: str) -> list[Message]:
    """A list of messages in our form. Raises `DataError` naming the message and the key that cannot be used."""
    if not isinstance(given, list) or not all(isinstance(message, dict) for message in given):
        raise DataError(f"{where}: messages must be a list of objects. {LOOKS_LIKE}")
    return [_message(message, f"{where}: message {k}") for k, message in enumerate(given, 1)]


def read_tools(given: object, where: str) -> list[Any]:
    """The tools of a row, from a list or its JSON text."""
    tools = _parsed(given) if isinstance(given, str) else given
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects, or such a list as JSON text.")
    return tools


def check_turns(roles: list[str], where: str) -> None:
    """Raise `DataError` unless a system message, if any, is followed by turns of user and assistant, the assistant last.

    After an assistant's turn results of tools may follow, and then the assistant again.
    """
    follow = {"": "u", "u": "a", "a": "ut", "t": "ta"}
    last = ""
    for role in roles[1:] if roles[:1] == ["system"] else roles:
        if role[0] not in follow[last]:
            last = ""
            break
        last = role[0]
    if last != "a":
        raise DataError(
            f"{where}: after at most one system message, user and assistant must take turns, and the assistant comes last; "
            f"the roles are {', '.join(roles)}."
        )


def switched_on(given: Mapping[str, object], where: str) -> bool:
    """Whether a message or row carries loss, by its switches. Raises `DataError` for other values than on and off."""
    on = True
    for name in (*SWITCHES, *INVERSE):
        if (value := given.get(name)) is None:
            continue
        known = (
            ON.get(value.lower() if isinstance(value, str) else value) if isinstance(value, str | int | float) else None
        )
        if known is None:
            raise DataError(f"{where}: {name!r} must be 0, 1, true or false. ftcore counts a turn fully or not at all.")
        on = on and known != (name in INVERSE)
    return on


def _message(raw: Message, where: str) -> Message:
    speaker = next((key for key in SPEAKER if key in raw), "role")
    text = next((key for key in TEXT if key in raw), "content")
    if used := [key for key in REFUSED if raw.get(key) not in (None, [], "")]:
        raise DataError(f"{where} has {used[0]!r}, which ftcore cannot train on. Remove the row, or the key.")
    known = {*KNOWN, *SWITCHES, *INVERSE}
    if other := [
        key for key in raw.keys() - known if SUSPECT.search(key.lower()) and raw[key] not in (None, [], "", {})
    ]:
        raise DataError(
            f"{where} has the key {min(other)!r}, which may hold a thought or a switch: rename it to one of "
            f"{', '.join((*THOUGHTS, *SWITCHES, *INVERSE))}, or remove it."
        )
    if speaker not in raw:
        keys = ", ".join(repr(key) for key in raw if key.isidentifier())[:100]
        raise DataError(f"{where} does not say who speaks; its keys are {keys or 'none'}. {LOOKS_LIKE}")
    name = raw[speaker]
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise DataError(
            f"{where}: a role is not one of system, user, assistant or tool, or a usual other name. {LOOKS_LIKE}"
        )
    given = {speaker, text, "function_call", "refusal", "tool_calls", *SWITCHES, *INVERSE}
    message: Message = {"role": role, "content": _text(raw.get(text), where)}
    message |= {key: value for key, value in raw.items() if key not in given and value is not None}
    calls = _calls(
        message["content"] if name == "function_call" else raw.get("tool_calls") or raw.get("function_call"), where
    )
    if name == "function_call":
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    message["content"] = message["content"] or _text(raw.get("refusal"), where)
    if not message["content"].strip() and not calls and role != "tool":
        raise DataError(f"{where} has no text in {text!r}. {LOOKS_LIKE}")
    if role == "assistant" and not switched_on(raw, where):
        message["trained"] = False
    return message


def _text(content: object, where: str) -> str:
    """A content as text; the texts of a list of parts, one after the other."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None for part in parts]
    for part, text in zip(parts, texts, strict=True):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind in TEXT_PARTS and not isinstance(text, str):
            raise DataError(f"{where}: its content has a part of the type {kind} without a text in 'text'.")
        if not isinstance(text, str) or kind not in TEXT_PARTS:
            shown = kind if isinstance(kind, str) and kind.isidentifier() and len(kind) < 30 else type(part).__name__
            raise DataError(f"{where}: its content has a part of the type {shown}, and ftcore trains on text alone.")
    return "".join(map(str, texts))


def _calls(given: object, where: str) -> list[Message]:
    """Calls of functions, their arguments as an object."""
    if not given:
        return []
    calls = _parsed(given) if isinstance(given, str) else given
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        call = call if isinstance(call, dict) else {}
        function = call["function"] if isinstance(call.get("function"), dict) else call
        given_arguments = function.get("arguments", {})
        arguments = _parsed(given_arguments) if isinstance(given_arguments, str) else given_arguments
        if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
            raise DataError(f"{where}: a call must have a name and arguments, an object or its JSON text.")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", **kept, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _parsed(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
