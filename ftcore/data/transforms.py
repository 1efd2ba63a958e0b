"""What objectives do to examples: hide words, move the middle of a text, give prompts another row's answer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ftcore.data.tokens import Example
from ftcore.errors import ModelError

# Names that tokenizers give the three control tokens; the first line is added where none of them exists.
FIM_TOKENS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class NextToken:
    """The text as it is."""

    def __init__(self, *_: Any) -> None: ...

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        return example


class FillInTheMiddle:
    """With probability `share`: prefix token, prefix, suffix token, suffix, middle token, middle, end (order "PSM").

    The text is cut at two random places. Loss is on all tokens but the first, as on plain text.
    """

    def __init__(self, tokenizer: Any, share: float, max_length: int) -> None:
        self.tokens = tokenizer.convert_tokens_to_ids(list(fim_tokens(tokenizer)))
        self.end, self.share, self.max_length = tokenizer.eos_token_id, share, max_length

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        content = example.input_ids[1 : self.max_length - 3]  # three tokens more than before, one at the end
        chosen, (first, second) = random.random() < self.share, sorted(random.integers(0, len(content) + 1, 2))
        if not chosen:
            return example
        prefix, suffix, middle = self.tokens
        ids = [prefix, *content[:first], suffix, *content[second:], middle, *content[first:second], self.end]
        return Example(example.id, ids, [k > 0 for k in range(len(ids))])


class Masked:
    """Hides a `share` of the tokens: 80 % become the mask token, 10 % any other, 10 % stay. Loss on the hidden ones."""

    def __init__(self, tokenizer: Any, share: float, max_length: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "objective=masked needs a tokenizer with a mask token: an encoder, such as modernbert_base."
            )
        self.mask, self.share, self.vocabulary = tokenizer.mask_token_id, share, len(tokenizer)
        self.control = {*tokenizer.all_special_ids}

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        ids = np.array(example.targets or example.input_ids)
        free = np.flatnonzero(~np.isin(ids, list(self.control)))
        hidden = random.choice(free, max(round(self.share * len(free)), 1), replace=False) if len(free) else free
        fate, other = random.random(len(hidden)), random.integers(0, self.vocabulary, len(hidden))
        shown = ids.copy()
        shown[hidden] = np.where(fate < 0.8, self.mask, np.where(fate < 0.9, other, ids[hidden]))
        mask = np.isin(np.arange(len(ids)), hidden)
        return replace(example, input_ids=shown.tolist(), completion_mask=mask.tolist(), targets=ids.tolist())


OBJECTIVES = {"next_token": NextToken, "fill_in_the_middle": FillInTheMiddle, "masked": Masked}


def fim_tokens(tokenizer: Any) -> tuple[str, str, str]:
    """The tokenizer's own names of the prefix, suffix and middle token, else the first line of `FIM_TOKENS`."""
    known = tokenizer.get_vocab()
    return next((names for names in FIM_TOKENS if all(name in known for name in names)), FIM_TOKENS[0])


def mismatched(examples: Sequence[Example], max_length: int | None = None) -> list[Example]:
    """Each prompt with the next example's answer, cut at the longest length."""
    parts = [(e.id, e.input_ids, e.completion_mask.index(True)) for e in examples]
    pairs = ((a[0], a[1][: a[2]], b[1][b[2] :]) for a, b in zip(parts, parts[1:] + parts[:1], strict=True))
    whole = [(id, prompt + answer, [False] * len(prompt) + [True] * len(answer)) for id, prompt, answer in pairs]
    return [Example(id, ids[:max_length], mask[:max_length]) for id, ids, mask in whole]
