"""The low-rank layer in few passes: values and gradients are those of peft's own."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ftcore.kernels.lora_linear import LoraLinear


def layer(ours, bias=True, **settings):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias))
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights=False, **settings)
    if ours:
        config._register_custom_module({torch.nn.Linear: LoraLinear})
    return get_peft_model(network, config)


def outcome(network, rows, to_x=True):
    torch.manual_seed(1)
    x = torch.randn(3, rows, 24).requires_grad_(to_x)
    y = network(x)
    (y * torch.randn_like(y)).sum().backward()
    trained = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
    return [y.detach(), *([x.grad] if to_x else []), *(trained[name] for name in sorted(trained))]


@pytest.mark.parametrize("rows", [0, 1, 5, 70])  # of 3 in each: 15 take the way of decoding
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("to_x", [True, False])
def test_values_and_gradients_are_those_of_peft(rows, bias, to_x):
    sides = [outcome(layer(ours, bias), rows, to_x) for ours in (False, True)]
    for expected, got in zip(*sides, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=str
)
def test_what_it_does_not_do_itself_peft_does(settings):
    sides = [outcome(layer(ours, **settings), 5) for ours in (False, True)]
    for expected, got in zip(*sides, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_switched_off_and_merged_it_is_peft_s():
    (theirs, ours), x = (layer(False), layer(True)), torch.randn(6, 24)
    for network in (theirs, ours):
        network.eval()
    with theirs.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    assert torch.equal(ours.merge_and_unload()(x), theirs.merge_and_unload()(x))


@pytest.mark.parametrize("kept_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_it_multiplies_bf16_and_gradients_are_float32(kept_in, bias):
    theirs, ours = layer(False, bias), layer(True, bias)
    expected, peft_s = outcome(theirs, 70), []
    for network in (theirs, ours):
        network.zero_grad()
        network.base_model.model[0].base_layer.to(kept_in)
        with torch.autocast("cpu", torch.bfloat16):
            assert network(torch.randn(2, 24)).dtype == torch.bfloat16
            peft_s.append(outcome(network, 70))
    for exact, other, got in zip(expected, *peft_s, strict=True):
        rounding = 2**-7 * exact.abs().max()  # of bf16 numbers
        assert (got - exact).abs().max() < 2 * rounding and (got - other).abs().max() < 2 * rounding
        assert got.dtype == (torch.bfloat16 if got is peft_s[1][0] else torch.float32)
