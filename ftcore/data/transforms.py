"""What methods do to examples: hide words, move the middle of a text, give prompts another row's answer."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from ftcore.data.examples import Example
from ftcore.errors import ModelError

# Names that tokenizers have for the three control tokens. The first line is added where a tokenizer has none of them.
FIM_TOKENS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)


class NextToken:
    """The text as it is."""

    def __init__(self, *_: object) -> None: ...

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        return example


class FillInTheMiddle:
    """With probability `share`: prefix token, prefix, suffix token, suffix, middle token, middle, end (order "PSM").

    The text is cut at two random places. Loss is on all tokens but the first, as on plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, max_length: int) -> None:
        self.tokens = [tokenizer.get_vocab()[token] for token in fim_tokens(tokenizer)]
        self.end, self.share, self.max_length = tokenizer.eos_token_id, share, max_length

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        content = example.input_ids[1 : self.max_length - 3]  # room for three tokens within it and one at the end
        chosen, (first, second) = random.random() < self.share, sorted(random.integers(0, len(content) + 1, 2))
        if not chosen:
            return example
        prefix, suffix, middle = self.tokens
        ids = [prefix, *content[:first], suffix, *content[second:], middle, *content[first:second], self.end]
        return Example(example.id, ids, [False] + [True] * (len(ids) - 1))


class Masked:
    """Hides a `share` of the tokens: 80 % become the mask token, 10 % any other, 10 % stay. Loss is on the hidden ones."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, max_length: int) -> None:
        if tokenizer.mask_token_id is None:
            raise ModelError("objective=masked needs a tokenizer with a mask token: choose model=modernbert_base.")
        self.mask, self.share, self.vocabulary = tokenizer.mask_token_id, share, len(tokenizer)
        self.control = tokenizer.all_special_ids

    def __call__(self, example: Example, random: np.random.Generator) -> Example:
        ids = np.array(example.targets or example.input_ids)
        free = np.flatnonzero(~np.isin(ids, self.control))
        hidden = random.choice(free, max(round(self.share * len(free)), 1), replace=False) if len(free) else free
        chance, other = random.random(len(hidden)), random.integers(0, self.vocabulary, len(hidden))
        shown = ids.copy()
        shown[hidden] = np.where(chance < 0.8, self.mask, np.where(chance < 0.9, other, ids[hidden]))
        mask = np.isin(np.arange(len(ids)), hidden)
        return replace(example, input_ids=shown.tolist(), completion_mask=mask.tolist(), targets=ids.tolist())


OBJECTIVES = {"next_token": NextToken, "fill_in_the_middle": FillInTheMiddle, "masked": Masked}


def fim_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """The tokenizer's names of the prefix, suffix and middle token; the first line of `FIM_TOKENS` when it has none."""
    known = tokenizer.get_vocab()
    return next((names for names in FIM_TOKENS if all(name in known for name in names)), FIM_TOKENS[0])


def mismatched(examples: Sequence[Example], max_length: int | None = None) -> list[Example]:
    """Each prompt with the next example's answer, truncated to the longest length."""
    mixed = []
    for example, other in zip(examples, [*examples[1:], *examples[:1]], strict=True):
        prompt = example.input_ids[: example.completion_mask.index(True)]
        ids = [*prompt, *other.input_ids[other.completion_mask.index(True) :]][:max_length]
        mixed.append(Example(example.id, ids, [k >= len(prompt) for k in range(len(ids))]))
    return mixed
