"""Records to token ids and masks, built segment by segment.

The chat template is rendered once per shape of conversation with placeholders for the contents. What stands between the
placeholders is tokenised with control tokens, the contents without: text of a row can never forge a turn, and the mask is
right for templates that mark no generation. Loss is on every assistant content and the end token after it.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import orjson
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

from ftcore.data.records import Data
from ftcore.data.sources import Row
from ftcore.data.template import render
from ftcore.errors import DataError

Turn = tuple[str, str]  # role, content
PLACEHOLDER = "ftcorecontent{}ftcoreend"
TEXTS = ("prompt", "completion", "chosen", "rejected", "text")
LOST = "left without a trained token"
BETWEEN = re.compile(PLACEHOLDER.format(r"\d+"))


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence: token ids and, for each, whether it carries loss.

    `targets` are the tokens to predict at the positions with loss; None: each token is predicted from those before it.
    `truncated` says that its text goes on beyond the longest length.
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
    """A prompt with an answer, whether that is good, and z of its step once it is known (methods/kto.py)."""

    good: bool = False
    z: float | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt, the better one first, and by how much it is better at least (reward models)."""

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
        """Whether one of the answers is cut."""
        return self.chosen.truncated or self.rejected.truncated


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
        return [example for _, example in self.answered_rows(rows, every_turn=True)]

    def answered_rows(self, rows: Iterable[Row], every_turn: bool = False) -> Iterator[tuple[Row, Example]]:
        """Prompt and answer, with the rows that they come from; loss on the last answer or on `every_turn` of the assistant."""
        rows = list(rows)
        for row, tokens in zip(rows, self._encode([_turns(row) for row in rows]), strict=True):
            if example := self._fitted(row, *(tokens if every_turn else _last_answer(*tokens))):
                yield row, example

    def labelled(self, rows: Iterable[Row]) -> list[Labelled]:
        """Prompt and answer with the label."""
        pairs = [(row["label"], e) for row, e in self.answered_rows(rows)]
        return [Labelled(e.id, e.input_ids, e.completion_mask, None, e.truncated, good) for good, e in pairs]

    def pairs(self, rows: Iterable[Row]) -> list[Pair]:
        """Pairs of examples, loss on the answers alone; a pair loses both when one of them is dropped."""
        pairs, rows = [], list(rows)
        encoded = self._encode(
            [_turns({**row, "completion": row[side]}) for row in rows for side in ("chosen", "rejected")]
        )
        for k, row in enumerate(rows):
            chosen, rejected = (self._fitted(row, *_last_answer(*encoded[2 * k + side])) for side in (0, 1))
            if chosen and rejected:
                pairs.append(Pair(row["id"], chosen, rejected, float(row.get("margin", 0.0))))
        return pairs

    def prompts(self, rows: Iterable[Row], max_new_tokens: int = 0) -> list[Prompt]:
        """Prompts to answer, with room for the answer in the model's context.

        One over the length is an error or dropped: a cut one would ask something else.
        """
        longest = min(self.max_length, self.tokenizer.model_max_length - max_new_tokens)
        rows = list(rows)
        encoded = self._encode([_turns({**row, "completion": "-"}) for row in rows])
        prompts = [Prompt(row["id"], _before_answer(*tokens), row) for row, tokens in zip(rows, encoded, strict=True)]
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
        rows = list(rows)
        for row, content in zip(rows, self._contents([row["text"] for row in rows]), strict=True):
            for k in range(0, len(content), room):
                ids = start + content[k : k + room] + end
                examples.append(Example(f"{row['id']}/{k}", ids, [position > 0 for position in range(len(ids))]))
        return examples

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's conversation up to where the model's (last) answer begins."""
        return _before_answer(*self._encode([_turns({**row, "completion": "-"})])[0])

    def answered(self, row: Row, text: str) -> Example:
        """A row's prompt with `text` as the answer, cut at the longest length."""
        ids, mask = _last_answer(*self._encode([_turns({**row, "completion": text})])[0])
        return Example(row["id"], ids[: self.max_length], mask[: self.max_length])

    def forged(self, rows: Iterable[Row]) -> list[Row]:
        """Rows whose text spells a control token. It stays text; a person may want to know."""
        special = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        tokens = [token for token in {*special, *self._marks} if len(token) > 2]
        # Their first characters are few, so that most texts are passed over quickly.
        start = re.compile("|".join({re.escape(token[:2]) for token in tokens}) or "(?!)").search
        return [row for row in rows if any(start(text) and _spells(text, tokens) for text in _texts(row))]

    def check_lost(self, rows: int) -> None:
        """Raise `DataError` when more than `data.max_lost` of `rows` rows were left without a trained token."""
        lost = self.counts[LOST]
        if lost and (lost >= rows or lost > self.data.max_lost * rows):
            raise DataError(
                f"{lost:,} of {rows:,} training rows are left without a trained token: what is trained begins after token "
                f"{self.max_length}, where rows are cut. Raise data.max_length, leave long rows out with data.too_long=drop, or "
                f"raise data.max_lost (a share, now {self.data.max_lost:g})."
            )

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

    def _fitted(self, row: Row, ids: list[int], mask: list[bool]) -> Example | None:
        """The example of a conversation; over the length it is treated as configured, None when nothing is left to train."""
        truncated = len(ids) > self.max_length
        example = Example(row["id"], ids[: self.max_length], mask[: self.max_length], truncated=truncated)
        if truncated:
            if self.too_long == "error":
                self._refuse(Prompt(row["id"], ids, row), self.max_length)
            self.counts["truncated" if self.too_long == "truncate" else "dropped"] += 1
            if self.too_long == "drop":
                return None
        if not any(example.completion_mask[1:]):
            self.counts[LOST] += 1
            return None
        return example

    def _refuse(self, long: Prompt, longest: int) -> None:
        limit = f"data.max_length is {longest}. Raise it, or choose"
        if longest < self.data.max_length:
            limit = f"and the model has room for {longest}. Choose"
        raise DataError(f"{long.row['where']}: {len(long)} tokens, {limit} data.too_long=truncate or drop.")

    def _encode(self, conversations: list[list[Turn]]) -> list[tuple[list[int], list[bool]]]:
        """Token ids and mask of each conversation, up to its last token with loss."""
        if self._fast and all(len(turns) == 2 for turns in conversations):
            texts = [(question, answer) for (_, question), (_, answer) in conversations]
            return [(found.ids, list(map(bool, found.type_ids))) for found in self._joining.encode_batch_fast(texts)]
        contents = iter(self._contents([content for turns in conversations for _, content in turns]))
        return [_cut_after_loss(*self._joined(turns, [next(contents) for _ in turns])) for turns in conversations]

    def _joined(self, turns: list[Turn], contents: list[list[int]]) -> tuple[list[int], list[bool]]:
        if self.chat:
            return self._with_template(turns, contents)
        if [role for role, _ in turns] != ["user", "assistant"]:
            raise DataError(
                "Conversations of several messages need a chat template: model.chat_template=<file.jinja> "
                "(ftcore://chatml.jinja ships with ftcore), and data.chat must not be false."
            )
        before, after = self._start() + contents[0], [*contents[1], self.tokenizer.eos_token_id]
        return before + after, [False] * len(before) + [True] * len(after)

    def _with_template(self, turns: list[Turn], contents: list[list[int]]) -> tuple[list[int], list[bool]]:
        between = self._between(tuple(role for role, _ in turns))
        ids, mask = list(between[0]), [False] * len(between[0])
        for (role, _), content, after in zip(turns, contents, between[1:], strict=True):
            trained = role == "assistant"
            end = self._end(after) if trained else 0
            ids += [*content, *after]
            mask += [trained] * len(content) + [k < end for k in range(len(after))]
        return ids, mask

    def _between_contents(self, roles: tuple[str, ...]) -> list[list[int]]:
        """Token ids of what the template puts before, between and after the contents of these roles."""
        messages = [{"role": role, "content": PLACEHOLDER.format(k)} for k, role in enumerate(roles)]
        text = render(self.tokenizer, messages)
        between = [self._scaffold(part) for part in BETWEEN.split(text)]
        if len(between) != len(roles) + 1:
            raise DataError("The chat template leaves out or repeats a message, so its tokens cannot be told apart.")
        if roles[-1] == "assistant" and not self._end(between[-1]):
            between[-1] = [self.tokenizer.eos_token_id, *between[-1]]
        return between

    def _end(self, after: list[int]) -> int:
        """How many tokens of what follows an assistant's content belong to it: up to its first control token."""
        return next((k + 1 for k, token in enumerate(after) if token in self._special), 0)

    @cached_property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)

    def _scaffold(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def content(self, text: str) -> list[int]:
        """Token ids of a row's text, in which nothing is a control token."""
        return self._contents([text])[0]

    def _contents(self, texts: list[str]) -> list[list[int]]:
        """`content` of many texts at once, which is many times faster."""
        if not texts or not self._fast:
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            return self.tokenizer(texts, **plain)["input_ids"] if texts else []
        return [found.ids for found in self._fast.encode_batch_fast(texts, add_special_tokens=False)]

    @cached_property
    def _fast(self) -> Any:
        """A copy of the tokenizer that takes control tokens apart; None when it is one in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        fast = Tokenizer.from_str(_without_control_pieces(backend))
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True
        fast.add_special_tokens(self._marks)
        return fast

    @cached_property
    def _marks(self) -> list[str]:
        """Tokens that the template puts around turns, also those that their tokenizer does not call special."""
        marks: set[int] = set()
        if self.chat:
            with suppress(DataError):  # the template wants other roles: who renders those hears of it
                before, middle, after = self._between(("user", "assistant"))
                marks = {*before, *middle[: self._end(middle)], *after[: self._end(after)]} & self._special
        return self.tokenizer.convert_ids_to_tokens(sorted(marks))

    @cached_property
    def _joining(self) -> Any:
        """`_fast`, joining a question and its answer by itself: in Python that takes as long as tokenising them.

        Of its `type_ids`, 1 marks what carries loss.
        """
        between = {"before": self._start(), "middle": [], "end": [self.tokenizer.eos_token_id]}
        if self.chat:
            before, middle, after = self._between(("user", "assistant"))
            between = {"before": before, "middle": middle, "end": after[: self._end(after)]}
        pieces = [("before", 0), ("$A", 0), ("middle", 0), ("$B", 1), ("end", 1)]
        self._fast.post_processor = TemplateProcessing(
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
    if not isinstance(backend.model, Unigram):
        return backend.to_str()
    parts = orjson.loads(backend.to_str())
    control = {token["content"] for token in parts["added_tokens"] if token["special"]}
    found = {piece[0]: piece for piece in parts["model"]["vocab"] if piece[0] in control}
    for piece in found.values():
        piece[0] = ""
    # Those that stay keep their ids, which begin where the vocabulary ends.
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] not in found]
    return orjson.dumps(parts).decode()


def _turns(row: Row) -> list[Turn]:
    """A row as a conversation; its last assistant turn says the row's `completion`, whichever answer that is."""
    before = [(message["role"], message["content"]) for message in row.get("messages", ())][:-1]
    return [*(before or [("user", row["prompt"])]), ("assistant", row["completion"])]


def _texts(row: Row) -> list[str]:
    texts = [row[column] for column in TEXTS if column in row]
    return texts + [message["content"] for message in row["messages"]] if "messages" in row else texts


def _spells(text: str, tokens: list[str]) -> bool:
    return any(token in text for token in tokens)


def _before_answer(ids: list[int], mask: list[bool]) -> list[int]:
    """What stands before the last run of tokens with loss, which ends the ids."""
    length = len(ids)
    while mask[length - 1]:
        length -= 1
    return ids[:length]


def _last_answer(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """The same with loss on the last answer alone, which a comparison or a label is about."""
    start = len(_before_answer(ids, mask))
    return ids, [k >= start for k in range(len(ids))]


def _cut_after_loss(ids: list[int], mask: list[bool]) -> tuple[list[int], list[bool]]:
    """Leave out what follows the last token with loss: it changes nothing and costs computation."""
    end = len(mask) - mask[::-1].index(True)
    return ids[:end], mask[:end]
