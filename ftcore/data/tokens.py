"""Records to token ids and masks, built segment by segment.

The chat template is rendered once per shape of conversation with placeholders for the contents. What stands between the
placeholders is tokenised with control tokens, the contents without: text of a row can never forge a turn, and the mask is
right for templates that mark no generation. Loss is on every assistant content and the end token after it.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from ftcore.data.records import Data
from ftcore.data.sources import Row
from ftcore.errors import DataError

PLACEHOLDER = "ftcorecontent{}ftcoreend"
BETWEEN = re.compile(PLACEHOLDER.format(r"\d+"))


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, whether it carries loss."""

    id: str
    input_ids: list[int]
    completion_mask: list[bool]


class Encoder:
    """Turns rows into examples with a tokenizer, a chat template and a longest length.

    `counts` holds how many rows were truncated or dropped. Raises `DataError` for a row over `max_length` when
    `too_long` is `error`, and when chat is asked of a tokenizer without a template.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        if data.chat is True and tokenizer.chat_template is None:
            raise DataError(
                "data.chat=true, but the tokenizer has no chat template. Give one with model.chat_template=<file.jinja> "
                "(ftcore://chatml.jinja ships with ftcore), or train on plain text with data.chat=false."
            )
        self.tokenizer, self.max_length, self.too_long = tokenizer, data.max_length, data.too_long
        self.chat = tokenizer.chat_template is not None if data.chat == "auto" else data.chat
        self.counts: Counter[str] = Counter()
        self._between = cache(self._between_contents)

    def prompt_completions(self, rows: Iterable[Row]) -> list[Example]:
        """Examples with loss on the completion and its end token; rows over the length are treated as configured."""
        examples = []
        for row in rows:
            ids, mask = _cut_after_loss(*self._pair(row["prompt"], row["completion"]))
            if len(ids) > self.max_length:
                if self.too_long == "error":
                    raise DataError(
                        f"{row['where']}: {len(ids)} tokens, data.max_length is {self.max_length}. Raise it, or choose "
                        "data.too_long=truncate or drop."
                    )
                self.counts["truncated" if self.too_long == "truncate" else "dropped"] += 1
                ids, mask = (ids, mask) if self.too_long == "truncate" else ([], [])
            if any(mask[1 : self.max_length]):
                examples.append(Example(row["id"], ids[: self.max_length], mask[: self.max_length]))
            elif ids:
                self.counts["left without a trained token"] += 1
        return examples

    def texts(self, rows: Iterable[Row], length: int | None = None) -> list[Example]:
        """Raw text cut into pieces of at most `length` tokens (default: the longest allowed), loss on all but the first."""
        length, examples = min(length or self.max_length, self.max_length), []
        eos, cls = self.tokenizer.eos_token_id, self.tokenizer.cls_token_id
        start = self._start() or [cls if eos is None else eos]
        for row in rows:
            content = self._content(row["text"])
            for k in range(0, len(content), length - len(start)):
                ids = start + content[k : k + length - len(start)]
                examples.append(Example(f"{row['id']}/{k}", ids, [position > 0 for position in range(len(ids))]))
        return examples

    def prompt(self, text: str) -> list[int]:
        """Token ids of a question, up to where the model's answer begins."""
        ids, mask = self._pair(text, "-")
        return ids[: mask.index(True)]

    def end_ids(self, network: Any) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the model's end of text, and the template's end of turn."""
        configured = getattr(network.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        if self.chat:
            after = self._between(("user", "assistant"))[-1]
            ends.add(after[self._end(after) - 1])
        return sorted(ends - {None})

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[bool]]:
        if self.chat:
            return self._turns([("user", prompt), ("assistant", completion)])
        before = self._start() + self._content(prompt)
        after = [*self._content(completion), self.tokenizer.eos_token_id]
        return before + after, [False] * len(before) + [True] * len(after)

    def _turns(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[bool]]:
        between = self._between(tuple(role for role, _ in turns))
        ids, mask = list(between[0]), [False] * len(between[0])
        for (role, content), after in zip(turns, between[1:], strict=True):
            trained = role == "assistant"
            content_ids, end = self._content(content), self._end(after) if trained else 0
            ids += [*content_ids, *after]
            mask += [trained] * len(content_ids) + [k < end for k in range(len(after))]
        return ids, mask

    def _between_contents(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Token ids of what the template puts before, between and after the contents of these roles."""
        messages = [{"role": role, "content": PLACEHOLDER.format(k)} for k, role in enumerate(roles)]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        between = [self._scaffold(part) for part in BETWEEN.split(text)]
        if len(between) != len(roles) + 1:
            raise DataError("The chat template leaves out or repeats a message, so its tokens cannot be told apart.")
        if roles[-1] == "assistant" and not self._end(between[-1]):
            between[-1] = [self.tokenizer.eos_token_id, *between[-1]]
        return between

    def _end(self, after: list[int]) -> int:
        """How many tokens of what follows an assistant's content belong to it: up to its first control token."""
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        return next((k + 1 for k, token in enumerate(after) if token in special), 0)

    def _scaffold(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _content(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _start(self) -> list[int]:
        """The begin-of-text token, if this tokenizer puts one before plain text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("a")["input_ids"] else []


def _cut_after_loss(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Leave out what follows the last token with loss: it changes nothing and costs computation."""
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]
