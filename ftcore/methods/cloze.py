"""Cloze score: which of four words is missing in "I ___ ice cream"? The one that makes the sentence most likely."""

import random

import numpy as np

from ftcore.data.examples import Example
from ftcore.data.layouts import in_batches, pad
from ftcore.data.sources import Row, rows_of
from ftcore.data.tokens import Encoder
from ftcore.errors import DataError
from ftcore.machine.processes import shared_out
from ftcore.methods.base import Method
from ftcore.methods.terms import ByRow
from ftcore.models.logprobs import sequence_sums

CHOICES = 4


def read_cloze(path: str) -> list[Row]:
    """Sentences with a gap. Raises `DataError` for a row without ___ or answer, and for fewer answers than choices."""
    rows = [{"id": where.rpartition(":")[2], **row, "where": where} for where, row in rows_of(path)]
    for row in rows:
        if "___" not in str(row.get("text")) or not isinstance(row.get("answer"), str) or not row["answer"].strip():
            raise DataError(f"{row['where']}: a cloze row has a `text` with ___ for a word, and the word as `answer`.")
    if len({row["answer"].lower() for row in rows}) < CHOICES:
        raise DataError(f"{path} has fewer than {CHOICES} different answers to choose from.")
    return rows


def cloze_right(method: Method, masked: bool, rows: list[Row], batch_size: int) -> ByRow:
    """Whether (1 or 0) the own answer of each row (text with ___, answer) has the largest log-probability of four.

    The other three are answers of other rows, the same ones for every model. A causal model sums over the whole sentence, a
    `masked` one over the masked tokens of the word. Guessing scores 0.25.
    """
    words = sorted({row["answer"] for row in rows})
    fill = _with_hidden_word if masked else _with_word
    sentences = [fill(method.encoder, row, word) for row in rows for word in _choices(row, words)]

    def sums(mine: list[list[Example]]) -> list[list[float]]:
        batches = (method.to_device(pad(examples, method.pad_id)) for examples in mine)
        return [sequence_sums(method.network, batch).tolist() for batch in batches]

    scores = np.concatenate(shared_out(in_batches(sentences, max(batch_size // CHOICES, 1) * CHOICES), sums))
    return [float(best == 0) for best in scores.reshape(-1, CHOICES).argmax(1)]


def _choices(row: Row, words: list[str]) -> list[str]:
    """The row's answer first, then three of the others, drawn with its id as the seed."""
    others = [word for word in words if word.lower() != row["answer"].lower()]
    return [row["answer"], *random.Random(str(row["id"])).sample(others, CHOICES - 1)]


def _with_word(encoder: Encoder, row: Row, word: str) -> Example:
    """The row's sentence with a word in its gap, with loss on all of it."""
    return encoder.texts([{"id": row["id"], "text": row["text"].replace("___", word)}])[0]


def _with_hidden_word(encoder: Encoder, row: Row, word: str) -> Example:
    """The row's sentence with mask tokens in its gap, as many as the word has tokens, which are their targets."""
    tokenizer = encoder.tokenizer
    before, _, after = row["text"].partition("___")
    texts = [before.removesuffix(" "), " " * before.endswith(" ") + word, after]
    left, hidden, right = encoder.contents(texts)
    start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    if None in start + end:
        start, end = [tokenizer.eos_token_id], []
    left, right = start + left, right + end
    mask = [False] * len(left) + [True] * len(hidden) + [False] * len(right)
    return Example(row["id"], left + [tokenizer.mask_token_id] * len(hidden) + right, mask, left + hidden + right)
