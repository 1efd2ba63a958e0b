"""Cloze score: which of four words is missing in "I ___ ice cream"? The one that makes the sentence most likely."""

import random

from ftcore.data.layouts import pad
from ftcore.data.sources import Row, rows_of
from ftcore.data.tokens import Encoder, Example
from ftcore.errors import DataError
from ftcore.machine.processes import shared_out
from ftcore.methods.base import Method
from ftcore.models.logprobs import completion_logps, row_sums

CHOICES = 4


def gaps(path: str) -> list[Row]:
    """Sentences with a gap. Raises `DataError` for a row without ___ or answer, and for fewer answers than choices."""
    rows = [{"id": where.rpartition(":")[2], **row, "where": where} for where, row in rows_of(path)]
    for row in rows:
        if "___" not in str(row.get("text")) or not isinstance(row.get("answer"), str) or not row["answer"].strip():
            raise DataError(
                f"{row['where']}: a cloze row has a `text` with ___ for the missing word, and the word as `answer`."
            )
    if len({row["answer"].lower() for row in rows}) < CHOICES:
        raise DataError(f"{path} has fewer than {CHOICES} different answers to choose from.")
    return rows


def cloze_accuracy(method: Method, masked: bool, rows: list[Row], batch_size: int) -> float:
    """Share of `rows` (text with ___, answer) whose answer has the largest log-probability of four.

    The other three are answers of other rows, the same ones for every model. A causal model sums over the whole sentence, a
    `masked` one over the masked tokens of the word. Guessing scores 0.25.
    """
    words = sorted({row["answer"] for row in rows})
    made_of = _with_hidden_word if masked else _with_word
    sentences = [made_of(method.encoder, row, word) for row in rows for word in _choices(row, words)]
    size = max(batch_size // CHOICES, 1) * CHOICES
    starts = list(range(0, len(sentences), size))
    scores = shared_out(starts, lambda share: [_scores(method, sentences[k : k + size]) for k in share])
    flat = [score for part in scores for score in part]
    best = [max(range(CHOICES), key=flat[k : k + CHOICES].__getitem__) for k in range(0, len(flat), CHOICES)]
    return sum(choice == 0 for choice in best) / len(rows)


def _choices(row: Row, words: list[str]) -> list[str]:
    """The row's answer first, then three of the others that depend on its id alone."""
    others = [word for word in words if word.lower() != row["answer"].lower()]
    return [row["answer"], *random.Random(str(row["id"])).sample(others, CHOICES - 1)]


def _with_word(encoder: Encoder, row: Row, word: str) -> Example:
    """The row's sentence with a word in its gap, loss on all of it."""
    return encoder.texts([{"id": row["id"], "text": row["text"].replace("___", word)}])[0]


def _with_hidden_word(encoder: Encoder, row: Row, word: str) -> Example:
    """The row's sentence with mask tokens in its gap, as many as a word has, and the word as their targets."""
    tokenizer = encoder.tokenizer
    before, _, after = row["text"].partition("___")
    space = " " * before.endswith(" ")
    parts = encoder.content(before.removesuffix(" ")), encoder.content(space + word), encoder.content(after)
    start, end = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    if None in (*start, *end):
        start, end = [tokenizer.eos_token_id], []
    ids = [*start, *parts[0], *parts[1], *parts[2], *end]
    hidden = [len(start) + len(parts[0]) <= k < len(start) + len(parts[0] + parts[1]) for k in range(len(ids))]
    shown = [tokenizer.mask_token_id if hide else token for token, hide in zip(ids, hidden, strict=True)]
    return Example(row["id"], shown, hidden, ids)


def _scores(method: Method, examples: list[Example]) -> list[float]:
    batch = method.placed(pad(examples, method.encoder.tokenizer.pad_token_id or 0))
    return row_sums(completion_logps(method.network, batch), batch).tolist()
