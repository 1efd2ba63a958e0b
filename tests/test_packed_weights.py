"""Packed weights: outputs, and so completions and their log-probabilities, are those without; afterwards nothing is left."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ftcore.kernels import packed_weights as module
from ftcore.kernels.packed_weights import packed_weights
from tests.test_lora_linear import layer
from tests.test_losses import CAUSAL, network
from tests.test_rollout import rollouts


def packs(net):
    return {name for name, part in net.named_modules() if "forward" in vars(part)}


@pytest.mark.parametrize("shape", [(0, 24), (1, 24), (3, 7, 24), (200, 24)], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}, {"lora_dropout": 0.5}], ids=str
)
def test_outputs_are_those_of_the_layer(shape, settings):
    net, x = layer(ours=True, **settings).eval(), torch.randn(shape)
    expected = net(x)
    with packed_weights(net):
        assert packs(net)
        got = net(x)
    assert not packs(net) and not got.requires_grad
    torch.testing.assert_close(got, expected.detach(), atol=1e-5, rtol=1e-5)
    assert net(x).requires_grad


def test_a_low_rank_update_is_added_once_and_not_where_it_is_switched_off():
    net, x = layer(ours=True), torch.randn(5, 24)
    with packed_weights(net):
        assert packs(net) == {"base_model.model.0"}  # the whole layer, not its parts
    with net.disable_adapter():
        expected = net(x)
        with packed_weights(net):
            torch.testing.assert_close(net(x), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_completions_are_those_of_the_network(family):
    net = network(family, sharper=10)
    expected = [completion for group in rollouts(net) for completion in group]
    with packed_weights(net):
        got = [completion for group in rollouts(net) for completion in group]
    assert [one.ids for one in got] == [one.ids for one in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(torch.tensor(one.logps), torch.tensor(other.logps), atol=1e-5, rtol=1e-5)


def test_an_error_leaves_nothing_behind():
    net = layer(ours=True)
    with pytest.raises(KeyError), packed_weights(net):
        raise KeyError
    assert not packs(net) and torch.is_grad_enabled()


def test_other_precisions_and_large_networks_stay_as_they_are(monkeypatch):
    half, single = nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8)
    with packed_weights(nn.Sequential(half, single)):
        assert not vars(half).get("forward") and vars(single).get("forward")
    with torch.autocast("cpu", dtype=torch.bfloat16), packed_weights(single):
        assert not packs(single)
    monkeypatch.setattr(module, "LARGEST", 8 * 8 * 4 - 1)
    with packed_weights(single):
        assert not packs(single)


def halved(net, how):
    """`net` in bfloat16, or under autocast to it, with the context to call it in."""
    if how == "bf16-true":
        return net.to(torch.bfloat16), nullcontext()
    return net, torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("how", ["bf16-true", "bf16-mixed"])
def test_where_nothing_is_packed_updates_are_merged_and_the_weights_stay_to_the_bit(how):
    net, context = halved(layer(ours=True).eval(), how)
    x, before = torch.randn(6, 24), {name: value.clone() for name, value in net.state_dict().items()}
    x = x.to(next(net.parameters()).dtype)
    exact = layer(ours=True)(x.float())
    with context:
        with packed_weights(net):
            assert packs(net) == {"base_model.model.0"}
            got = net(x)
        assert not packs(net) and got.dtype == torch.bfloat16 == net(x).dtype
    torch.testing.assert_close(got.float(), exact, atol=0.05, rtol=0.02)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with context, net.disable_adapter(), packed_weights(net):
        assert not packs(net)  # nothing to merge


def test_weights_of_four_bits_are_not_merged():
    net = layer(ours=True)
    base = net.base_model.model[0].base_layer
    base.weight = nn.Parameter(base.weight.data.to(torch.uint8), requires_grad=False)
    with packed_weights(net):
        assert "base_model.model.0" not in packs(net)


def test_copies_take_a_quarter_of_a_gpus_memory_at_most(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    weight = SimpleNamespace(is_cuda=True, device="cuda:0")
    assert module._most([SimpleNamespace(weight=weight)]) == 20
    assert module._most([nn.Linear(2, 2)]) == module._most([]) == module.LARGEST
