"""Text to token ids, where control tokens count only outside of what rows say."""

import re
from functools import cached_property
from itertools import pairwise
from typing import Any

import orjson
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

# Around what stays text in a conversation although a control token is spelled like it; the marks that transformers uses.
START, END = "\U000f0000", "\U000f0001"
# Ids of a text, and the character at which each token begins and ends.
Spelled = tuple[list[int], list[int], list[int]]


class Speller:
    """Turns texts into token ids. `control` matches the tokens that stay text where a row spells them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str]) -> None:
        self.tokenizer, self.control = tokenizer, control
        inner = f"(?:(?!{control.pattern})[^{START}{END}])*"
        self.marked = re.compile(f"{START}({control.pattern}|{inner}){END}|[{START}{END}]")

    def mark(self, given: Any) -> Any:
        """Messages or tools with marks around the control tokens that their texts spell."""
        if isinstance(given, dict):
            return {key: value if key == "role" else self.mark(value) for key, value in given.items()}
        if isinstance(given, list):
            return [self.mark(value) for value in given]
        if not isinstance(given, str):
            return given
        text = self.control.sub(f"{START}\\g<0>{END}", given.replace(START, "").replace(END, ""))
        return text if self.whole is None or self.whole.normalizer is None else self._mark_others(text)

    def _mark_others(self, text: str) -> str:
        """The text with marks also around what becomes a control token only when it is normalised, such as wide letters."""
        normal, added = self.whole.normalizer.normalize_str, self.tokenizer.added_tokens_decoder
        found = self.whole.encode(text, add_special_tokens=False)
        for token, (begin, end) in reversed([*zip(found.ids, found.offsets, strict=True)]):
            content = added[token].content if token in added else ""
            spelled = content and normal(text[begin:end]).strip(" ▁") == normal(content).strip(
                " ▁"
            )  # not an unknown character
            if spelled and self.control.fullmatch(content) and text[begin - 1 : begin] != START:
                text = f"{text[:begin]}{START}{text[begin:end]}{END}{text[end:]}"
        return text

    def contents(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts of rows, in which nothing is a control token."""
        if self._plain:
            return [found.ids for found in self._plain.encode_batch_fast(texts, add_special_tokens=False)]
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(texts, **plain)["input_ids"] if texts else []

    def spell(self, texts: list[str], cuts: list[list[int]]) -> list[Spelled]:
        """Tokens of texts of a chat template, in which the contents' control tokens stand between `START` and `END`.

        A tokenizer that does not say where its tokens stand encodes the pieces between the `cuts` of a text one by one.
        """
        if not self.whole:
            return [self._in_pieces(text, between) for text, between in zip(texts, cuts, strict=True)]
        found = self.whole.encode_batch(texts, add_special_tokens=False)
        return [
            self._around_marks(text) if START in text or END in text else (encoding.ids, *_columns(encoding.offsets))
            for text, encoding in zip(texts, found, strict=True)
        ]

    def _around_marks(self, text: str) -> Spelled:
        """Each marked control token as text, and what stands between them, one by one."""
        ids, starts, ends = list[int](), list[int](), list[int]()
        at = 0
        for mark in [*self.marked.finditer(text), None]:
            stop = mark.start() if mark else len(text)
            for begin, end, encoder in ((at, stop, self.whole), (*(mark.span(1) if mark else (0, 0)), self._plain)):
                found, skipped, shift = _later(encoder, text[begin:end], begin) if begin < end else (None, 0, 0)
                if found:
                    ids += found.ids[skipped:]
                    starts += [start + shift for start, _ in found.offsets[skipped:]]
                    ends += [end + shift for _, end in found.offsets[skipped:]]
            at = mark.end() if mark else at
        return ids, starts, ends

    def _in_pieces(self, text: str, cuts: list[int]) -> Spelled:
        borders = sorted({0, *cuts, len(text)})
        ids, starts, ends = list[int](), list[int](), list[int]()
        for begin, end in pairwise(borders):
            parts = self.marked.split(text[begin:end])
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            for k, part in enumerate(parts):
                found = (
                    self.tokenizer(part, **(plain if k % 2 else {"add_special_tokens": False}))["input_ids"]
                    if part
                    else []
                )
                ids, starts, ends = ids + found, starts + [begin] * len(found), ends + [end] * len(found)
        return ids, starts, ends

    @cached_property
    def whole(self) -> Any:
        """A copy of the tokenizer that neither cuts nor pads; None when the tokenizer is written in Python."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        return None if backend is None else _uncut(Tokenizer.from_str(backend.to_str()))

    @cached_property
    def _plain(self) -> Any:
        """The same that knows no control token in a text."""
        if self.whole is None:
            return None
        plain = _uncut(Tokenizer.from_str(_without_control_pieces(self.whole)))
        plain.encode_special_tokens = True
        tokens = [token.content for token in self.tokenizer.added_tokens_decoder.values()]
        plain.add_special_tokens([token for token in tokens if self.control.fullmatch(token)])
        return plain


def _columns(offsets: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [start for start, _ in offsets], [end for _, end in offsets]


def _later(encoder: Any, text: str, begin: int) -> tuple[Any, int, int]:
    """The encoding of a text, how many of its tokens to leave out, and by how much to move the others.

    After the beginning it is encoded behind a line break, since some tokenizers put a space before the first word.
    """
    if begin:
        found, breaks = (
            encoder.encode("\n" + text, add_special_tokens=False),
            encoder.encode("\n", add_special_tokens=False),
        )
        if found.ids[: len(breaks.ids)] == breaks.ids:
            return found, len(breaks.ids), begin - 1
    return encoder.encode(text, add_special_tokens=False), 0, begin


def _uncut(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


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
