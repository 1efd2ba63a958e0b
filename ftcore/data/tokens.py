"""Records to token ids and masks, built segment by segment.

The chat template is rendered once for each sequence of roles, with placeholders for the contents. The text between the
placeholders is tokenised with control tokens, the contents without. So text of a row can never forge a turn, and the mask is
right for templates that do not mark generations. Loss is on every content of the assistant and the end token after it.
"""

import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import orjson
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ftcore.data.records import Data
from ftcore.data.sources import Row
from ftcore.data.template import render
from ftcore.errors import DataError

Turn = tuple[str, str]  # role, content
PLACEHOLDER = "ftcorecontent{}ftcoreend"
TEXTS = ("prompt", "completion", "chosen", "rejected", "text")
LOST = "left without a trained token"


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, whether it carries loss.

    `targets` are the tokens to predict at the positions with loss; None: each token is predicted from those before it.
    `truncated`: its text goes on beyond the longest length.
    """

    id: str
    input_ids: list[int]
    completion_mask: list[bool]
    targets: list[int] | None = None
    truncated: bool = False

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Number of tokens with loss."""
        return sum(self.completion_mask)


@dataclass(frozen=True, slots=True)
class Labelled(Example):
    """A prompt with an answer, whether the answer is good, and z of its step once it is known (methods/kto.py)."""

    good: bool = False
    z: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first, and by how much it is better at least (for reward models)."""

    id: str
    chosen: Example
    rejected: Example
    margin: float = 0.0

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def trained(self) -> int:
        """Number of tokens of both answers."""
        return self.chosen.trained + self.rejected.trained

    @property
    def truncated(self) -> bool:
        """Whether one of the answers is truncated."""
        return self.chosen.truncated or self.rejected.truncated


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids up to where the answer begins, and their row (rewards read its columns)."""

    id: str
    input_ids: list[int]
    row: Row

    def __len__(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Turns rows into examples with a tokenizer, a chat template and a longest length.

    `counts` says how many rows were truncated or dropped. Raises `DataError` for a row over `max_length` when `too_long` is
    `error`, and for `data.chat=true` with a tokenizer without a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, data: Data) -> None:
        if data.chat is True and tokenizer.chat_template is None:
            raise DataError(
                "data.chat=true, but the tokenizer has no chat template. Give one with model.chat_template=<file.jinja> "
                "(ftcore://chatml.jinja ships with ftcore), or train on plain text with data.chat=false."
            )
        self.tokenizer, self.data, self.too_long = tokenizer, data, data.too_long
        self.max_length = min(data.max_length, tokenizer.model_max_length)
        self.chat = tokenizer.chat_template is not None if data.chat == "auto" else data.chat
        self.counts: Counter[str] = Counter()
        self._control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._between = cache(self._between_contents)

    def prompt_completions(self, rows: list[Row]) -> list[Example]:
        """Examples with loss on every assistant turn and its end token; `messages` take precedence over the columns."""
        return [example for example in self._examples(rows, every_turn=True) if example]

    def labelled(self, rows: list[Row]) -> list[Labelled]:
        """Prompt and answer with the label, loss on the last answer alone."""
        labelled = zip((row["label"] for row in rows), self._examples(rows), strict=True)
        return [Labelled(e.id, e.input_ids, e.completion_mask, None, e.truncated, good) for good, e in labelled if e]

    def pairs(self, rows: list[Row]) -> list[Pair]:
        """Pairs of examples, loss on the last answers alone. When one side is dropped, so is the pair."""
        sides = self._examples([{**row, "completion": row[side]} for row in rows for side in ("chosen", "rejected")])
        return [
            Pair(row["id"], chosen, rejected, float(row.get("margin", 0.0)))
            for row, chosen, rejected in zip(rows, sides[::2], sides[1::2], strict=True)
            if chosen and rejected
        ]

    def prompts(self, rows: list[Row], max_new_tokens: int = 0) -> list[Prompt]:
        """Prompts to answer, with room for the answer in the model's context.

        One over the length is an error or dropped: truncated it would ask something else.
        """
        longest = min(self.max_length, self.tokenizer.model_max_length - max_new_tokens)
        encoded = zip(rows, self.prompt_ids(rows), strict=True)
        prompts = [Prompt(row["id"], ids, row) for row, ids in encoded if self._fits(row, ids, longest)]
        self.counts += Counter(dropped=len(rows) - len(prompts))
        return prompts

    def texts(self, rows: list[Row], length: int | None = None) -> list[Example]:
        """Raw text cut into pieces of at most `length` tokens (default: the longest allowed), loss on all but the first."""
        length, examples = min(length or self.max_length, self.max_length), []
        eos, cls, sep = self.tokenizer.eos_token_id, self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        start, end = self._start() or [cls if eos is None else eos], [sep] if eos is None and sep is not None else []
        room = length - len(start) - len(end)
        for row, content in zip(rows, self.contents([row["text"] for row in rows]), strict=True):
            for k in range(0, len(content), room):
                ids = start + content[k : k + room] + end
                examples.append(Example(f"{row['id']}/{k}", ids, [False] + [True] * (len(ids) - 1)))
        return examples

    def prompt_ids(self, rows: list[Row]) -> list[list[int]]:
        """Token ids of each row's conversation up to where the model's (last) answer begins."""
        return [_before_answer(*tokens) for tokens in self._encode([{**row, "completion": "-"} for row in rows])]

    def answered(self, row: Row, text: str) -> Example:
        """A row's prompt with `text` as the answer, cut at the longest length."""
        ids, mask = _last_answer(*self._encode([{**row, "completion": text}])[0])
        return Example(row["id"], ids[: self.max_length], mask[: self.max_length])

    def spelling_control_tokens(self, rows: list[Row]) -> list[Row]:
        """Rows whose text spells a control token. It stays text, but a person may want to know."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = sorted(re.escape(token) for token in {*special, *self._turn_tokens} if len(token) > 2)
        spelled = re.compile("|".join(tokens) or "(?!)").search
        return [row for row in rows if any(map(spelled, _texts(row)))]

    def check_lost(self, rows: int) -> None:
        """Raise `DataError` when more than `data.max_lost` of `rows` rows were left without a trained token."""
        lost = self.counts[LOST]
        if lost and (lost >= rows or lost > self.data.max_lost * rows):
            raise DataError(
                f"{lost:,} of {rows:,} training rows are {LOST}: it begins after token {self.max_length}, where rows are cut. "
                "Raise data.max_length, leave long rows out with data.too_long=drop, or raise data.max_lost."
            )

    def decode(self, sequences: list[list[int]]) -> list[str]:
        """Token ids as text, without control tokens."""
        return [text.strip() for text in self.tokenizer.batch_decode(sequences, skip_special_tokens=True)]

    def end_ids(self, network: PreTrainedModel) -> list[int]:
        """Tokens that end an answer: the tokenizer's and the model's end of text, and the template's end of turn."""
        configured = getattr(network.generation_config, "eos_token_id", None)
        after = self._between(("user", "assistant"))[-1]
        ends = {self.tokenizer.eos_token_id, after[self._end(after) - 1]}
        return sorted(ends.union(configured if isinstance(configured, list) else [configured]) - {None})

    def contents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts of rows, in which nothing is a control token."""
        if self._fast:
            return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(texts, **plain)["input_ids"] if texts else []

    def _examples(self, rows: list[Row], every_turn: bool = False) -> list[Example | None]:
        """The example of each row, with loss on its last answer or on `every_turn` of the assistant; None when dropped."""
        encoded = self._encode(rows) if every_turn else [_last_answer(*tokens) for tokens in self._encode(rows)]
        return [self._fitted(row, *tokens) for row, tokens in zip(rows, encoded, strict=True)]

    def _fitted(self, row: Row, ids: list[int], mask: list[bool]) -> Example | None:
        """The example of a conversation, treated as configured when over the length; None when nothing is left to train."""
        if truncated := not self._fits(row, ids, self.max_length):
            self.counts["truncated" if self.too_long == "truncate" else "dropped"] += 1
            if self.too_long == "drop":
                return None
        example = Example(row["id"], ids[: self.max_length], mask[: self.max_length], truncated=truncated)
        if any(example.completion_mask[1:]):
            return example
        self.counts[LOST] += 1
        return None

    def _fits(self, row: Row, ids: list[int], longest: int) -> bool:
        """Whether a row has at most `longest` tokens. Raises `DataError` for a longer one when `too_long` is `error`."""
        if len(ids) > longest and self.too_long == "error":
            limit = f"data.max_length is {longest}. Raise it, or choose"
            if longest < self.data.max_length:
                limit = f"and the model has room for {longest}. Choose"
            raise DataError(f"{row['where']}: {len(ids)} tokens, {limit} data.too_long=truncate or drop.")
        return len(ids) <= longest

    def _encode(self, rows: list[Row]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and mask of each row's conversation, up to its last token with loss."""
        conversations = [_turns(row) for row in rows]
        if self._fast and all(len(turns) == 2 for turns in conversations):
            texts = [(question, answer) for (_, question), (_, answer) in conversations]
            return [(found.ids, list(map(bool, found.type_ids))) for found in self._joining.encode_batch_fast(texts)]
        contents = iter(self.contents([content for turns in conversations for _, content in turns]))
        return [self._joined(turns, [next(contents) for _ in turns]) for turns in conversations]

    def _joined(self, turns: list[Turn], contents: list[list[int]]) -> tuple[list[int], list[bool]]:
        before, *between = self._between(tuple(role for role, _ in turns))
        ids, mask = [*before], [False] * len(before)
        for (role, _), content, after in zip(turns, contents, between, strict=True):
            trained = role == "assistant"
            end = self._end(after) if trained else 0
            ids += [*content, *after]
            mask += [trained] * len(content) + [k < end for k in range(len(after))]
        length = len(mask) - mask[::-1].index(True)  # what follows changes nothing and costs computation
        return ids[:length], mask[:length]

    def _between_contents(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Token ids before, between and after the contents of these roles: the template's, or those of plain text."""
        if not self.chat:
            if roles != ("user", "assistant"):
                raise DataError(
                    "Conversations of several messages need a chat template: model.chat_template=<file.jinja> "
                    "(ftcore://chatml.jinja ships with ftcore), and data.chat must not be false."
                )
            if self.tokenizer.eos_token_id is None:
                raise DataError("The tokenizer has no end token. Give a template: model.chat_template=<file.jinja>.")
            return [self._start(), [], [self.tokenizer.eos_token_id]]
        messages = [{"role": role, "content": PLACEHOLDER.format(k)} for k, role in enumerate(roles)]
        parts = re.split(PLACEHOLDER.format(r"\d+"), render(self.tokenizer, messages))
        between = [self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
        if len(between) != len(roles) + 1:
            raise DataError("The chat template leaves out or repeats a message, so its tokens cannot be told apart.")
        if roles[-1] == "assistant" and not self._end(between[-1]):
            between[-1] = [self.tokenizer.eos_token_id, *between[-1]]
        return between

    def _end(self, after: list[int]) -> int:
        """How many tokens of what follows an assistant's content belong to it: up to its first control token."""
        return next((k + 1 for k, token in enumerate(after) if token in self._control), 0)

    @cached_property
    def _fast(self) -> Any:
        """A copy of the tokenizer that knows no control token in a text; None when the tokenizer is written in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        fast = Tokenizer.from_str(_without_control_pieces(backend))
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True
        fast.add_special_tokens(self._turn_tokens)
        return fast

    @cached_property
    def _turn_tokens(self) -> list[str]:
        """Tokens that the template puts around turns, also those that their tokenizer does not call special."""
        ids: set[int] = set()
        if self.chat:
            with suppress(DataError):  # the template wants other roles: rendering those raises the error
                before, middle, after = self._between(("user", "assistant"))
                ids = {*before, *middle[: self._end(middle)], *after[: self._end(after)]} & self._control
        return list(self.tokenizer.convert_ids_to_tokens(sorted(ids)))

    @cached_property
    def _joining(self) -> Any:
        """`_fast`, joining a question and its answer by itself: in Python that takes as long as tokenising them.

        In its `type_ids`, 1 marks tokens with loss.
        """
        before, middle, after = self._between(("user", "assistant"))
        between = {"before": before, "middle": middle, "end": after[: self._end(after)]}
        pieces = [("before", 0), ("$A", 0), ("middle", 0), ("$B", 1), ("end", 1)]
        self._fast.post_processor = processors.TemplateProcessing(
            pair=[f"{name}:{kind}" for name, kind in pieces if between.get(name, True)],
            special_tokens=[{"id": n, "ids": ids, "tokens": [n] * len(ids)} for n, ids in between.items() if ids],
        )
        return self._fast

    def _start(self) -> list[int]:
        """The begin-of-text token, if this tokenizer puts one before plain text."""
        bos = self.tokenizer.bos_token_id
        return [bos] if bos is not None and bos in self.tokenizer("a")["input_ids"] else []


def _without_control_pieces(backend: Tokenizer) -> str:
    """A tokenizer as JSON. Unigram finds every piece of its vocabulary in a text: those of control tokens become empty."""
    if not isinstance(backend.model, models.Unigram):
        return backend.to_str()
    parts = orjson.loads(backend.to_str())
    control = {token["content"] for token in parts["added_tokens"] if token["special"]}
    pieces = {piece[0]: piece for piece in parts["model"]["vocab"] if piece[0] in control}
    for piece in pieces.values():
        piece[0] = ""
    # Those that stay keep their ids, which begin where the vocabulary ends.
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in pieces]
    return orjson.dumps(parts).decode()


def _turns(row: Row) -> list[Turn]:
    """A row as a conversation; its last assistant turn is the row's `completion`, whichever answer that is."""
    before = [(message["role"], message["content"]) for message in row.get("messages", ())[:-1]]
    return [*(before or [("user", row["prompt"])]), ("assistant", row["completion"])]


def _texts(row: Row) -> list[str]:
    messages = row.get("messages", ())
    return [*(row[column] for column in TEXTS if column in row), *(message["content"] for message in messages)]


def _before_answer(ids: list[int], mask: list[bool]) -> list[int]:
    """What stands before the last run of tokens with loss, which ends the ids."""
    return ids[: len(ids) - mask[::-1].index(False)]


def _last_answer(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """The same with loss on the last answer alone, which a comparison or a label is about."""
    start = len(_before_answer(ids, mask))
    return ids, [k >= start for k in range(len(ids))]
