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

from jinja2 import TemplateError

from ftcore.data.records import Data
from ftcore.data.sources import Row
from ftcore.errors import DataError

Turn = tuple[str, str]  # role, content
PLACEHOLDER = "ftcorecontent{}ftcoreend"
BETWEEN = re.compile(PLACEHOLDER.format(r"\d+"))


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, whether it carries loss.

    `targets` are the tokens to predict at the positions with loss; None: each token is predicted from those before it.
    """

    id: str
    input_ids: list[int]
    completion_mask: list[bool]
    targets: list[int] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first, and by how much it is better at least (reward models)."""

    id: str
    chosen: Example
    rejected: Example
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to where the answer begins, and the row they come from (rewards read its columns)."""

    id: str
    input_ids: list[int]
    row: Row

    def __len__(self) -> int:
        return len(self.input_ids)


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
        self.tokenizer, self.data, self.too_long = tokenizer, data, data.too_long
        self.max_length = min(data.max_length, tokenizer.model_max_length)
        self.chat = tokenizer.chat_template is not None if data.chat == "auto" else data.chat
        self.counts: Counter[str] = Counter()
        self._between = cache(self._between_contents)

    def prompt_completions(self, rows: Iterable[Row]) -> list[Example]:
        """Examples with loss on every assistant turn and its end token; `messages` count before prompt and completion."""
        return [example for row in rows if (example := self._fitted(row, _turns(row)))]

    def pairs(self, rows: Iterable[Row]) -> list[Pair]:
        """Pairs of examples; a pair loses both when one of them is dropped."""
        pairs = []
        for row in rows:
            chosen, rejected = (
                self._fitted(row, _turns({**row, "completion": row[side]})) for side in ("chosen", "rejected")
            )
            if chosen and rejected:
                pairs.append(Pair(row["id"], chosen, rejected, float(row.get("margin", 0.0))))
        return pairs

    def prompts(self, rows: Iterable[Row], max_new_tokens: int = 0) -> list[Prompt]:
        """Prompts to answer, with room for the answer in the model's context.

        One over the length is an error or dropped: a cut one would ask something else.
        """
        longest = min(self.max_length, self.tokenizer.model_max_length - max_new_tokens)
        prompts = [Prompt(row["id"], self.prompt(row), row) for row in rows]
        kept = [prompt for prompt in prompts if len(prompt) <= longest]
        if len(kept) < len(prompts):
            if self.too_long == "error":
                self._refuse(next(prompt for prompt in prompts if len(prompt) > longest), longest)
            self.counts["dropped"] += len(prompts) - len(kept)
        return kept

    def texts(self, rows: Iterable[Row], length: int | None = None) -> list[Example]:
        """Raw text cut into pieces of at most `length` tokens (default: the longest allowed), loss on all but the first."""
        length, examples = min(length or self.max_length, self.max_length), []
        eos, cls, sep = self.tokenizer.eos_token_id, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        start, end = self._start() or [cls if eos is None else eos], [sep] if eos is None and sep is not None else []
        room = length - len(start) - len(end)
        for row in rows:
            content = self.content(row["text"])
            for k in range(0, len(content), room):
                ids = start + content[k : k + room] + end
                examples.append(Example(f"{row['id']}/{k}", ids, [position > 0 for position in range(len(ids))]))
        return examples

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's conversation up to where the model's (last) answer begins."""
        ids, mask = _cut_after_loss(*self._encode(_turns({**row, "completion": "-"})))
        while mask[-1]:
            del ids[-1], mask[-1]
        return ids

    def answered(self, row: Row, text: str) -> Example:
        """A row's prompt with `text` as the answer, cut at the longest length."""
        ids, mask = _cut_after_loss(*self._encode(_turns({**row, "completion": text})))
        return Example(row["id"], ids[: self.max_length], mask[: self.max_length])

    def texts_of(self, sequences: list[list[int]]) -> list[str]:
        """Token ids as text, without control tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    def end_ids(self, network: Any) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the model's end of text, and the template's end of turn."""
        configured = getattr(network.generation_config, "eos_token_id", None)
        ends = {self.tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
        if self.chat:
            after = self._between(("user", "assistant"))[-1]
            ends.add(after[self._end(after) - 1])
        return sorted(ends - {None})

    def _fitted(self, row: Row, turns: list[Turn]) -> Example | None:
        """The example of a conversation; over the length it is treated as configured, None when nothing is left to train."""
        ids, mask = _cut_after_loss(*self._encode(turns))
        example = Example(row["id"], ids[: self.max_length], mask[: self.max_length])
        if len(ids) > self.max_length:
            if self.too_long == "error":
                self._refuse(Prompt(row["id"], ids, row), self.max_length)
            self.counts["truncated" if self.too_long == "truncate" else "dropped"] += 1
            if self.too_long == "drop":
                return None
        if not any(example.completion_mask[1:]):
            self.counts["left without a trained token"] += 1
            return None
        return example

    def _refuse(self, long: Prompt, longest: int) -> None:
        limit = f"data.max_length is {longest}. Raise it, or choose"
        if longest < self.data.max_length:
            limit = f"and the model has room for {longest}. Choose"
        raise DataError(f"{long.row['where']}: {len(long)} tokens, {limit} data.too_long=truncate or drop.")

    def _encode(self, turns: list[Turn]) -> tuple[list[int], list[bool]]:
        if self.chat:
            return self._with_template(turns)
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise DataError(
                "Conversations of several messages need a chat template: model.chat_template=<file.jinja> "
                "(ftcore://chatml.jinja ships with ftcore), and data.chat must not be false."
            )
        (_, prompt), (_, completion) = turns
        before = self._start() + self.content(prompt)
        after = [*self.content(completion), self.tokenizer.eos_token_id]
        return before + after, [False] * len(before) + [True] * len(after)

    def _with_template(self, turns: list[Turn]) -> tuple[list[int], list[bool]]:
        between = self._between(tuple(role for role, _ in turns))
        ids, mask = list(between[0]), [False] * len(between[0])
        for (role, content), after in zip(turns, between[1:], strict=True):
            trained = role == "assistant"
            content_ids, end = self.content(content), self._end(after) if trained else 0
            ids += [*content_ids, *after]
            mask += [trained] * len(content_ids) + [k < end for k in range(len(after))]
        return ids, mask

    def _between_contents(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Token ids of what the template puts before, between and after the contents of these roles."""
        messages = [{"role": role, "content": PLACEHOLDER.format(k)} for k, role in enumerate(roles)]
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise DataError(f"The chat template refuses a conversation of {', '.join(roles)}: {error}.") from None
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

    def content(self, text: str) -> list[int]:
        """Token ids of a row's text, in which nothing is a control token."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _start(self) -> list[int]:
        """The begin-of-text token, if this tokenizer puts one before plain text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("a")["input_ids"] else []


def _turns(row: Row) -> list[Turn]:
    """A row as a conversation; its last assistant turn says the row's `completion`, whichever answer that is."""
    before = [(message["role"], message["content"]) for message in row.get("messages", ())][:-1]
    return [*(before or [("user", row["prompt"])]), ("assistant", row["completion"])]


def _cut_after_loss(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Leave out what follows the last token with loss: it changes nothing and costs computation."""
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]
