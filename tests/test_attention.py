"""Attention of padded and packed rows has no mask, gives what a mask gives, and needs no memory of the square of a row."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ftcore.data.examples import Example
from ftcore.data.layouts import pack, pad
from ftcore.kernels.attention import CAUSAL, needs_no_mask
from ftcore.models.logprobs import completion_logps, inputs, sequence_scores

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "resid_pdrop": 0,
    "embd_pdrop": 0, "attn_pdrop": 0,
}  # fmt: skip
WINDOWS = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = (13, 3, 8, 1, 5)
RANDOM = torch.Generator().manual_seed(0)
ROWS = [
    Example(str(k), torch.randint(5, 97, (n,), generator=RANDOM).tolist(), [True] * n) for k, n in enumerate(LENGTHS)
]


def network(kind, auto=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **SIZES | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)  # else attention is flat
    return model


@pytest.fixture
def masks(monkeypatch):
    """The masks that SDPA gets."""
    seen, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*tensors, attn_mask=None, **options):
        seen.append((attn_mask, options["is_causal"]))
        return sdpa(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    return seen


@pytest.mark.parametrize("layout", [lambda rows: pad(rows, 0), pack])
@pytest.mark.parametrize("kind", sorted(CAUSAL))
def test_rows_get_no_mask(kind, layout, masks):
    completion_logps(network(kind, sliding_window=64), layout(ROWS))
    assert masks and all(mask is None for mask, _ in masks)
    assert any(causal for _, causal in masks)


@pytest.mark.parametrize("layout", ["pad", "pack"])
@pytest.mark.parametrize(("kind", "changes"), [*((kind, {}) for kind in sorted(CAUSAL)), *WINDOWS.items()])
def test_values_and_gradients_are_those_under_a_mask(kind, changes, layout):
    batch = pack(ROWS) if layout == "pack" else pad(ROWS, 0)
    sides = []
    for masked in (False, True):
        model = network(kind, **changes)
        assert needs_no_mask(model)
        given = inputs(model, batch)
        if masked:  # as transformers has it
            given["attention_mask"] = None if layout == "pack" else batch["attention_mask"]
            del given["sequence_lengths"]
        rows, columns = batch["trained"]
        logps = model(**given, use_cache=False).logits.log_softmax(-1)[
            rows, columns - 1, batch["input_ids"][rows, columns]
        ]
        logps.sum().backward()
        sides.append((logps.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(sides[0][0], sides[1][0], rtol=1e-6, atol=1e-5)
    for one, other in zip(sides[0][1], sides[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


def test_a_score_is_read_at_the_end_also_where_that_is_the_padding_token():
    model = network("llama", AutoModelForSequenceClassification, num_labels=1)
    ended = [Example(row.id, [*row.input_ids, model.config.pad_token_id], [*row.completion_mask, True]) for row in ROWS]
    with torch.no_grad():
        alone = [model.score(model.model(torch.tensor([row.input_ids])).last_hidden_state)[:, -1, 0] for row in ended]
        torch.testing.assert_close(sequence_scores(model, pad(ended, 0)), torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_other_networks_keep_their_mask():
    assert not needs_no_mask(network("llama", attn_implementation="eager"))
    assert not needs_no_mask(network("gemma3_text", use_bidirectional_attention=True))
    assert not needs_no_mask(network("olmo"))


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.elements = max(
            [self.elements, *(one.numel() for one in tree_leaves(out) if isinstance(one, torch.Tensor))]
        )
        return out


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_no_tensor_is_as_large_as_the_square_of_a_packed_row(kind):
    rows = [Example(str(k), [5 + k] * 256, [False] * 255 + [True]) for k in range(16)]
    model = network(kind, **WINDOWS.get(kind, {}) | {"sliding_window": 128})
    with Largest() as largest:
        completion_logps(model, pack(rows)).sum().backward()
    assert largest.elements < 4096 * 4096 / 16
