"""Fill-in-the-middle moves tokens and loses none; masking hides the share it is told, and never a control token."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from ftcore.data.examples import Example
from ftcore.data.tokens import Encoder
from ftcore.data.transforms import FIM_TOKENS, FillInTheMiddle, Masked, NextToken, fim_tokens, mismatched
from ftcore.errors import ModelError
from ftcore.files import PACKAGE
from tests.test_data import data

TEXTS = ["Ice on a swollen ankle helps for the first two days.", "Bones mend.", "A cast holds the wrist still. " * 4]


@pytest.fixture
def tokenizer():
    """The tiny tokenizer with the three tokens of fill-in-the-middle."""
    found = AutoTokenizer.from_pretrained(PACKAGE / "datasets" / "tiny")
    found.add_special_tokens({"additional_special_tokens": list(fim_tokens(found))})
    return found


def examples(tokenizer):
    rows = [{"id": str(k), "where": "", "text": text} for k, text in enumerate(TEXTS)]
    return Encoder(tokenizer, data()).texts(rows)


# Fill in the middle.


def reassembled(tokenizer, ids):
    """Prefix, middle and suffix of a rearranged text in the order they were written in."""
    prefix, suffix, middle = (ids.index(token) for token in tokenizer.convert_tokens_to_ids(list(FIM_TOKENS[0])))
    assert prefix == 0 < suffix < middle < len(ids) - 1 and ids[-1] == tokenizer.eos_token_id
    return ids[prefix + 1 : suffix] + ids[middle + 1 : -1] + ids[suffix + 1 : middle]


def test_a_rearranged_text_has_every_token_of_the_text_and_its_three_parts_in_order(tokenizer):
    transform, random = FillInTheMiddle(tokenizer, 1.0, 512), np.random.default_rng(0)
    for example in examples(tokenizer):
        parts = set()
        for _ in range(50):
            changed = transform(example, random)
            parts.add(tuple(changed.input_ids))
            assert reassembled(tokenizer, changed.input_ids) == example.input_ids[1:]
            assert changed.completion_mask == [False] + [True] * (len(changed) - 1)
            assert changed.id == example.id and changed.targets is None
        assert len(parts) > 5  # new cuts every time


def test_each_part_may_be_empty_and_every_cut_comes_up(tokenizer):
    transform, random = FillInTheMiddle(tokenizer, 1.0, 512), np.random.default_rng(0)
    example = Example("1", [2, 10, 11], [False, True, True])
    seen = {tuple(transform(example, random).input_ids) for _ in range(300)}
    prefix, suffix, middle = tokenizer.convert_tokens_to_ids(list(FIM_TOKENS[0]))
    cuts = [(first, second) for first in range(3) for second in range(first, 3)]
    content = (10, 11)
    assert seen == {
        (prefix, *content[:first], suffix, *content[second:], middle, *content[first:second], tokenizer.eos_token_id)
        for first, second in cuts
    }


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_the_share_of_rearranged_texts_is_as_told_and_the_others_stay_as_they_are(tokenizer, share):
    transform, random = FillInTheMiddle(tokenizer, share, 512), np.random.default_rng(0)
    example = examples(tokenizer)[0]
    changed = [transform(example, random) for _ in range(2000)]
    assert sum(one is not example for one in changed) / 2000 == pytest.approx(share, abs=0.04)


def test_a_text_as_long_as_allowed_stays_within_the_length(tokenizer):
    transform = FillInTheMiddle(tokenizer, 1.0, 16)
    changed = transform(Example("1", [2, *range(10, 25)], [False] + [True] * 15), np.random.default_rng(0))
    assert len(changed) == 16 and reassembled(tokenizer, changed.input_ids) == list(range(10, 22))


@pytest.mark.parametrize("names", FIM_TOKENS)
def test_the_tokenizers_own_names_of_the_three_tokens_are_used(names):
    found = AutoTokenizer.from_pretrained(PACKAGE / "datasets" / "tiny")
    assert fim_tokens(found) == FIM_TOKENS[0]
    found.add_special_tokens({"additional_special_tokens": list(names)})
    assert fim_tokens(found) == names


# Masked words.


def test_the_hidden_share_is_as_told_and_loss_is_on_hidden_tokens_alone(tokenizer):
    random = np.random.default_rng(0)
    for example in examples(tokenizer):
        free = len(example) - 1  # all but the token that begins the text
        for share in (0.15, 0.5, 1.0):
            masked = Masked(tokenizer, share, 512)(example, random)
            assert sum(masked.completion_mask) == max(round(share * free), 1)
            assert masked.targets == example.input_ids and len(masked.input_ids) == len(example)
            for shown, target, hidden in zip(masked.input_ids, masked.targets, masked.completion_mask, strict=True):
                assert hidden or shown == target


def test_hidden_tokens_become_the_mask_another_token_or_stay_in_the_usual_shares(tokenizer):
    transform, random = Masked(tokenizer, 0.5, 512), np.random.default_rng(0)
    example = examples(tokenizer)[2]
    fates, others, places = [], set(), np.zeros(len(example))
    for _ in range(300):
        masked = transform(example, random)
        places += masked.completion_mask
        for shown, target, hidden in zip(masked.input_ids, masked.targets, masked.completion_mask, strict=True):
            if hidden:
                fates.append("mask" if shown == tokenizer.mask_token_id else "same" if shown == target else "other")
                others |= {shown} if fates[-1] == "other" else set()
    shares = [fates.count(fate) / len(fates) for fate in ("mask", "other", "same")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.015) and len(fates) > 5000
    assert len(others) > 300 and max(others) > 1000  # from the whole vocabulary
    assert places[0] == 0 and places[1:] == pytest.approx(150, abs=45)  # every place about as often


@pytest.mark.parametrize("share", [0.15, 1.0])
def test_control_tokens_are_never_hidden(tokenizer, share):
    control = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id]
    ids = [control[0], 20, 21, control[1], 22, control[2], 23, 24, control[0]]
    transform, random = Masked(tokenizer, share, 512), np.random.default_rng(0)
    for _ in range(50):
        masked = transform(Example("1", ids, [True] * len(ids)), random)
        assert any(masked.completion_mask) and not any(masked.completion_mask[k] for k in (0, 3, 5, 8))
        assert [masked.input_ids[k] for k in (0, 3, 5, 8)] == [ids[k] for k in (0, 3, 5, 8)]
    nothing = transform(Example("1", control, [True] * 3), random)
    assert nothing.input_ids == control and not any(nothing.completion_mask)


def test_a_masked_text_is_masked_anew_from_its_own_words_at_every_call(tokenizer):
    transform, random = Masked(tokenizer, 0.3, 512), np.random.default_rng(0)
    example = masked = examples(tokenizer)[0]
    seen = set()
    for _ in range(20):
        masked = transform(masked, random)
        seen.add(tuple(masked.completion_mask))
        assert masked.targets == example.input_ids
        assert sum(masked.completion_mask) == round(0.3 * (len(example) - 1))  # hidden words do not pile up
    assert len(seen) == 20


def test_a_tokenizer_without_a_mask_is_an_error_that_names_one_that_has_it(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="modernbert_base"):
        Masked(tokenizer, 0.15, 512)


# All of them.


@pytest.mark.parametrize("kind", [NextToken, FillInTheMiddle, Masked])
def test_the_generator_alone_decides_what_is_done_to_a_text(tokenizer, kind):
    transform, texts = kind(tokenizer, 0.5, 512), examples(tokenizer)

    def changed(seed):
        random = np.random.default_rng(seed)
        return [transform(text, random) for text in texts for _ in range(5)]

    before = [(list(text.input_ids), list(text.completion_mask)) for text in texts]
    assert changed(1) == changed(1) and (changed(1) != changed(2)) == (kind is not NextToken)
    assert before == [(text.input_ids, text.completion_mask) for text in texts]  # the text itself stays


def test_mismatched_answers_go_round_and_lose_nothing():
    rows = [Example(name, [k] * k + [10 * k] * k, [False] * k + [True] * k) for k, name in enumerate("abc", 1)]
    assert mismatched(rows) == [
        Example("a", [1, 20, 20], [False, True, True]),
        Example("b", [2, 2, 30, 30, 30], [False, False, True, True, True]),
        Example("c", [3, 3, 3, 10], [False, False, False, True]),
    ]
    assert mismatched(rows[:1]) == rows[:1]
