"""Where the assistant's turns stand in a text that a chat template wrote, whatever it did with their contents.

The conversation is rendered as it is, and once more with fences, marks that nothing else spells, around the contents of the
others: an assistant's turn lies between two fences. A third rendering, with a word for each answer, shows what the template
writes around an answer that it has no reason to change.
"""

import re
from collections.abc import Callable
from functools import cached_property
from itertools import takewhile

from ftcore.data.messages import THOUGHTS, Message
from ftcore.errors import DataError

FENCE = re.compile("\ufdd0(\\d+)\ufdd1")  # these two are no characters, and never will be
WORD = "answer"
OWN_TEMPLATE = "Choose one that does; ftcore's own does: model.chat_template=ftcore://chatml.jinja."


class Turns:
    """The assistant's turns of one conversation: `text`, and `places`, the characters (from, to) of each with what ends it.

    `ends`: whether a control token ends the last one. Raises `DataError` when the template leaves out a message, a thought, a
    call or the tools, or when a turn cannot be told from what stands around it.
    """

    def __init__(
        self,
        render: Callable[..., str],
        messages: list[Message],
        tools: list[Message] | None,
        control: re.Pattern[str],
        header: str,
        turn_end: str,
    ) -> None:
        self.render, self.messages, self.tools = render, messages, tools
        self.control, self.header, self.turn_end = control, header, turn_end
        self.text, self.ends = render([_without(message, "trained") for message in messages], tools), bool(turn_end)
        fenced, self.others = self._fenced(self.messages)
        if fenced != self.text:
            raise DataError(
                "The chat template changes with what a user or a tool says: tokens with loss cannot be told."
            )
        self._check_tools()
        self.places = [self._place(k) for k, message in enumerate(messages) if message["role"] == "assistant"]

    @property
    def is_shortened(self) -> bool:
        """Whether the template leaves out a part of an answer, as some do with thoughts."""
        contents = [message["content"] for message in self.messages if message["role"] == "assistant"]
        turns = (self.text[begin:end] for begin, end in self.places)
        return any(len("".join(t.split())) < len("".join(c.split())) for t, c in zip(turns, contents, strict=True))

    def _place(self, k: int) -> tuple[int, int]:
        low, high = self._gap(self.others, k, len(self.text))
        region, (before, after) = self.text[low:high], self._around(k)
        start = self._start(region, before)
        self._check_said(k, region[start:])
        if region.endswith(after) and not self.messages[k].get("tool_calls"):
            found = self.control.search(after)
            self.ends = found is not None
            end = len(region) - len(after) + (found.end() if found else 0)
        else:
            end = self._last_control(k, region)
        if end <= start:
            raise DataError("The chat template leaves out an answer.")
        return low + start, low + end

    def _start(self, region: str, before: str) -> int:
        """Where in its region a turn begins that the model has to write."""
        if region.startswith(before):
            return len(before)
        if self.header and self.header in region:
            return region.index(self.header) + len(self.header)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(region, before, strict=False)))

    def _last_control(self, k: int, region: str) -> int:
        """Where in its region a turn ends: after the last control token that stands there also where nothing follows it."""
        cut = self if k + 1 == len(self.messages) else self._cut(k)
        alone = cut.text[cut._gap(cut.others, k, len(cut.text))[0] :]
        written = [found[0] for found in self.control.finditer(alone, alone.find(self.header) + len(self.header))]
        end = next((region.rindex(token) + len(token) for token in reversed(written) if token in region), 0)
        following = (
            None if self.turn_end else self.control.match(region, end)
        )  # where the next role's token ends a turn
        return following.end() if following else end

    def _cut(self, k: int) -> "Turns":
        return Turns(self.render, self.messages[: k + 1], self.tools, self.control, self.header, self.turn_end)

    @cached_property
    def _worded(self) -> tuple[str, dict[int, tuple[int, int]]]:
        """The conversation with a word for each answer and no thoughts, and where all contents stand."""
        worded = [
            {**_without(m, *THOUGHTS), "content": WORD} if m["role"] == "assistant" and m["content"] else m
            for m in self.messages
        ]
        return self._fenced(worded, answers=True)

    def _around(self, k: int) -> tuple[str, str]:
        """What the template writes before and after the answer of message k; two texts that stand nowhere if it has none."""
        text, places = self._worded
        if k not in places:
            return "\ufdd0", "\ufdd0"
        low, high = self._gap(places, k, len(text))
        return text[low : places[k][0]], text[places[k][1] : high]

    def _gap(self, places: dict[int, tuple[int, int]], k: int, length: int) -> tuple[int, int]:
        """The characters between the messages before and after message k."""
        if not {k - 1, k + 1}.intersection(range(len(self.messages))) <= places.keys():
            raise DataError("Two turns of the assistant stand side by side, which no chat template tells apart.")
        return places[k - 1][1] if k else 0, places[k + 1][0] if k + 1 < len(self.messages) else length

    def _fenced(self, messages: list[Message], answers: bool = False) -> tuple[str, dict[int, tuple[int, int]]]:
        """The text with fences around contents, without the fences, and where each content stands."""
        given = [
            {**m, "content": _fence(m["content"], k)} if m["role"] != "assistant" or (answers and m["content"]) else m
            for k, m in enumerate(messages)
        ]
        text = self.render([_without(message, "trained") for message in given], self.tools)
        first, *pieces = FENCE.split(text)
        fences, length = dict[int, int](), len(first)
        for number, piece in zip(map(int, pieces[::2]), pieces[1::2], strict=True):
            if number in fences:
                raise DataError(f"The chat template writes message {number // 2 + 1} more than once.")
            fences[number], length = length, length + len(piece)
        fenced = [k for k, (m, old) in enumerate(zip(given, messages, strict=True)) if m is not old]
        for k in fenced:
            if not {2 * k, 2 * k + 1} <= fences.keys():
                raise DataError(f"The chat template leaves out message {k + 1}, of the role {messages[k]['role']}.")
        return first + "".join(pieces[1::2]), {k: (fences[2 * k], fences[2 * k + 1]) for k in fenced}

    def _check_tools(self) -> None:
        """Raise `DataError` when the template leaves out a tool."""
        names = [(tool.get("function") or tool).get("name", "") for tool in self.tools or ()]
        if any(name not in self.text for name in names):
            raise DataError(f"The row has tools, which the chat template does not write. {OWN_TEMPLATE}")

    def _check_said(self, k: int, region: str) -> None:
        """Raise `DataError` when the template leaves out a call or a thought; earlier thoughts it may forget later."""
        message, is_last = self.messages[k], k + 1 == len(self.messages)
        if any(call["function"]["name"] not in region for call in message.get("tool_calls") or ()):
            raise DataError(f"Message {k + 1} has tool_calls, which the chat template does not write. {OWN_TEMPLATE}")
        for key in THOUGHTS:
            if (message.get(key) or "").strip() not in region:
                if is_last:
                    raise DataError(
                        f"Message {k + 1} has {key!r}, which the chat template does not write. {OWN_TEMPLATE}"
                    )
                self._cut(k)  # as the last message


def _without(message: Message, *keys: str) -> Message:
    return {key: value for key, value in message.items() if key not in keys}


def _fence(content: str, k: int) -> str:
    """The content between two fences that keep its outer spaces outside, where a template may trim them."""
    core = content.strip()
    before, _, after = content.partition(core) if core else (content, "", "")
    return f"{before}\ufdd0{2 * k}\ufdd1{core}\ufdd0{2 * k + 1}\ufdd1{after}"
