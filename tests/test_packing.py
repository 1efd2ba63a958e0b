"""Packed sequences cost what padded ones do, gradients too, and none sees another."""

from itertools import pairwise

import pytest
import torch

from ftcore.data.examples import Example
from ftcore.data.layouts import pack, pad
from ftcore.models.logprobs import completion_logps, row_sums
from tests.test_losses import CAUSAL, network

# One is longer than the sliding window of gemma3, one has loss on its first token, which nothing predicts.
LENGTHS = (9, 3, 6, 2)
RANDOM = torch.Generator().manual_seed(0)
DOCUMENTS = [
    Example(str(k), torch.randint(5, 97, (n,), generator=RANDOM).tolist(), [k == 1] + [j % 3 < 2 for j in range(n - 1)])
    for k, n in enumerate(LENGTHS)
]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CAUSAL)
def test_losses_and_gradients_of_packed_rows_are_those_of_padded_ones(family, attention):
    losses, gradients = [], []
    for batch in (pack(DOCUMENTS), pad(DOCUMENTS, 0)):
        model = network(family, sharper=5)
        model.set_attn_implementation(attention)
        loss = -completion_logps(model, batch).sum()
        loss.backward()
        losses.append(loss)
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    for packed, padded in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5 * padded.abs().max().item())


@pytest.mark.parametrize("family", CAUSAL)
def test_a_packed_document_never_changes_anothers_log_probabilities(family):
    model = network(family, sharper=5)
    starts = [sum(sum(e.completion_mask[1:]) for e in DOCUMENTS[:k]) for k in range(len(DOCUMENTS) + 1)]

    def logps(documents):
        with torch.no_grad():
            values = completion_logps(model, pack(documents))
        return [values[start:end] for start, end in pairwise(starts)]

    before = logps(DOCUMENTS)
    for changed, document in enumerate(DOCUMENTS):
        other = Example("x", [token % 90 + 6 for token in document.input_ids], document.completion_mask)
        after = logps([other if k == changed else e for k, e in enumerate(DOCUMENTS)])
        for k in range(len(DOCUMENTS)):
            assert torch.equal(before[k], after[k]) == (k != changed)


def test_a_packed_row_of_one_document_and_of_none_are_as_padded():
    model = network("llama3", sharper=5)
    one = [completion_logps(model, batch) for batch in (pack(DOCUMENTS[:1]), pad(DOCUMENTS[:1], 0))]
    torch.testing.assert_close(*one, rtol=1e-5, atol=0)
    assert completion_logps(model, pack([])).numel() == 0


def test_row_sums_of_a_padded_batch_are_the_rows_own():
    model = network("llama3", sharper=5)
    batch = pad(DOCUMENTS, 0)
    sums = row_sums(completion_logps(model, batch), batch)
    alone = torch.stack([completion_logps(model, pad([document], 0)).sum() for document in DOCUMENTS])
    torch.testing.assert_close(sums, alone, rtol=1e-5, atol=1e-6)
