"""Conversations as the model's own chat template writes them, and where the assistant speaks in that text.

A template that only writes contents down is rendered once for each sequence of roles, and contents are filled in. Any other is
rendered for each conversation, see turns.py.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import chain

from transformers import PreTrainedTokenizerBase

from ftcore.data.messages import Message
from ftcore.data.spelling import Speller
from ftcore.data.template import render
from ftcore.data.turns import Turns
from ftcore.data.watched import FOUND, PLACEHOLDER, watch
from ftcore.errors import DataError

# Messages that have no other keys are the same for a template whatever they say, unless it looks at their contents.
PLAIN = {"role", "content", "trained"}
# What looks like a control token: <|this|>; where an answer ends also <this> or [THIS].
MARK = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>")
END_MARK = re.compile(r"\s*(<[^<>\s]+>|\[/?[A-Z_]+\])")


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as text, with marks around what stays text in it (spelling.py).

    `turns`: characters (from, to) of each assistant turn, with the token that ends it. `trained`: whether each has loss.
    `ends`: whether a control token ends the last one.
    """

    text: str
    turns: list[tuple[int, int]]
    trained: list[bool]
    ends: bool


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What a template writes around the contents of a sequence of roles: `parts`, one more than contents.

    `trims`: which contents it trims. `blind`: whether it does nothing else with any of them than writing them down.
    """

    parts: list[str]
    trims: list[bool]
    blind: bool

    def contents(self, messages: list[Message]) -> list[str]:
        """What it writes of each message."""
        pairs = zip(messages, self.trims, strict=True)
        return [message["content"].strip() if trims else message["content"] for message, trims in pairs]

    def written(self, messages: list[Message]) -> str:
        """The text of a conversation of these roles."""
        return self.parts[0] + "".join(chain(*zip(self.contents(messages), self.parts[1:], strict=True)))


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.scaffold = cache(self._scaffold)
        self.wants_text_arguments = False  # of calls
        self.shortened = 0  # conversations of which the template leaves out a part of an answer

    def conversation(self, messages: list[Message], tools: list[Message] | None = None) -> Conversation:
        """The conversation as text. Raises `DataError` when the template refuses it or leaves something out."""
        trained = [message.get("trained", True) for message in messages if message["role"] == "assistant"]
        given: list[Message] = self.speller.mark(messages)
        if not tools and is_plain(messages) and (scaffold := self.scaffold(roles_of(messages))).blind:
            return self._filled(scaffold, given, trained)
        turns = self._turns(given, self.speller.mark(tools))
        self._check_written(turns.text, messages, tools)
        self.shortened += turns.is_shortened
        return Conversation(turns.text, turns.places, trained, turns.ends)

    def _turns(self, messages: list[Message], tools: list[Message] | None) -> Turns:
        marks = (self.control, self.header, self.turn_end)
        try:
            return Turns(partial(render, self.tokenizer), messages, tools, *marks)
        except DataError:  # some templates take the arguments of a call as JSON text
            if not any("tool_calls" in message for message in messages):
                raise
            self.wants_text_arguments = True
            return Turns(partial(render, self.tokenizer), [with_text_arguments(m) for m in messages], tools, *marks)

    @cached_property
    def speller(self) -> Speller:
        """What turns texts into token ids."""
        return Speller(self.tokenizer, self.control)

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Matches tokens that stay text in a content: special ones, and those that the template writes."""
        source = self.tokenizer.chat_template
        sources = [*source.values()] if isinstance(source, dict) else [source or ""]
        written = [*sources, *self._pair, *(getattr(self.tokenizer, "chat_control_tokens", None) or ())]
        tokens = [
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if token.special or (token.content.strip() and any(token.content in text for text in written))
        ]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")

    @cached_property
    def header(self) -> str:
        """What the template writes to let the assistant speak; "" when it does not know `add_generation_prompt`."""
        question = [{"role": "user", "content": "?"}]
        try:
            without, with_header = (render(self.tokenizer, question, add_generation_prompt=on) for on in (False, True))
        except DataError:
            return ""
        return with_header.removeprefix(without) if with_header.startswith(without) else ""

    @cached_property
    def turn_end(self) -> str:
        """The control token after an answer; "" when there is none."""
        found = self.control.search(self._pair[-1])
        return found[0] if found else ""

    @property
    def _pair(self) -> list[str]:
        """What stands around a question and its answer."""
        try:
            return self.scaffold(("user", "assistant")).parts
        except DataError:  # the template wants other roles: rendering those raises the error
            return [""]

    def _scaffold(self, roles: tuple[str, ...]) -> Scaffold:
        contents = [PLACEHOLDER.format("content", k) for k in range(len(roles))]
        text = render(self.tokenizer, [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)])
        found = [int(match[2]) for match in FOUND.finditer(text)]
        if found != list(range(len(roles))):  # it writes them in another order or form
            return Scaffold([""], [], False)
        parts = FOUND.split(text)[::3]
        self._check_marks(parts, roles)
        watched = watch(self.tokenizer.get_chat_template(), roles, self.tokenizer.special_tokens_map) or ""
        return Scaffold(
            parts, [match[1] == "trimmed" for match in FOUND.finditer(watched)], FOUND.split(watched)[::3] == parts
        )

    def _check_written(self, text: str, messages: list[Message], tools: list[Message] | None) -> None:
        """Raise `DataError` when control tokens that the tokenizer does not have stand around calls, thoughts or tools."""
        if marks := {mark for mark in MARK.findall(text) if mark not in self.known}:
            said = repr((messages, tools))
            self._refuse(mark for mark in marks if text.count(mark) > said.count(mark))

    def _check_marks(self, parts: list[str], roles: tuple[str, ...]) -> None:
        """Raise `DataError` when the template writes control tokens that the tokenizer does not have."""
        after = [END_MARK.match(parts[k + 1]) for k, role in enumerate(roles) if role == "assistant"]
        marks = [*MARK.findall("".join(parts)), *(found[1] for found in after if found)]
        self._refuse(mark for mark in marks if mark not in self.known)

    @cached_property
    def known(self) -> dict[str, int]:
        """The vocabulary."""
        return self.tokenizer.get_vocab()

    def _refuse(self, marks: Iterable[str]) -> None:
        if unknown := sorted({*marks}):
            tokens = ",".join(f'"{mark}"' for mark in unknown)
            raise DataError(
                f"The chat template writes {', '.join(unknown)}, and the tokenizer has no such token: it would be plain text, "
                f"which any row can spell. Choose the model's own template, or add it: 'model.add_tokens=[{tokens}]'."
            )

    def _filled(self, scaffold: Scaffold, messages: list[Message], trained: list[bool]) -> Conversation:
        text, turns, ends = scaffold.parts[0], list[tuple[int, int]](), True
        for role, content, after in zip(
            roles_of(messages), scaffold.contents(messages), scaffold.parts[1:], strict=True
        ):
            begin = len(text)
            text += content
            if role == "assistant":
                found = self.control.search(after)
                ends = found is not None
                turns.append((begin, len(text) + (found.end() if found else 0)))
            text += after
        return Conversation(text, turns, trained, ends)


def roles_of(messages: list[Message]) -> tuple[str, ...]:
    """Who speaks, message by message."""
    return tuple([message["role"] for message in messages])


def is_plain(messages: list[Message]) -> bool:
    """Whether messages have texts alone, without calls, thoughts or names."""
    return all(message.keys() <= PLAIN and message["content"] for message in messages)


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its calls as JSON text."""
    if "tool_calls" not in message:
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
