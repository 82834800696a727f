"""Copies of weights follow their values: `.data` and inference mode leave no trace of a write."""

import pytest
import torch
from torch import nn

from cmlora.batch.identity import identity, memory, version
from cmlora.batch.rows import Rows
from cmlora.batch.running import Running
from cmlora.lab.bench.tiny import relative
from cmlora.lora import merged, winograd
from cmlora.lora.bank import build_bank, fill_bank
from cmlora.lora.layers import install
from cmlora.lora.merged import Merging
from cmlora.lora.stacked import fill_stacked, stack_projections
from cmlora.lora.state import Switches
from tests.lora.rows import EXACT, unet_with
from tests.lora.test_behaviour import quantise

RECIPES = ((("a", 1.0),), (("b", 0.5),))


def loaded(mode):
    with torch.inference_mode(mode):
        return unet_with("a", "b")


def written(unet):
    """Every base weight and bias, through .data."""
    for name, weight in unet.named_parameters():
        if "lora_" not in name:
            weight.data.mul_(0.5).add_(0.01)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("mode", [False, True], ids=["normal", "inference tensors"])
def test_stacked_and_merged_weights(merge, mode):
    unet, running = loaded(mode), Running()
    bank = build_bank(unet, RECIPES, device=torch.device("cpu"))
    fill_bank(bank, 1.0)
    install(bank, running, "auto")
    stacked = stack_projections(unet, running, "auto")
    fill_stacked(stacked.values())
    merging = Merging(unet, stacked)
    merging.switch(merge)
    with torch.inference_mode(mode):
        written(unet)
    fill_stacked(stacked.values())
    merging.renew()
    attention, projection = next(iter(stacked.items()))
    x = torch.randn(3, 5, attention.to_q.in_features)
    with running.these(Rows(torch.tensor([0, -1, 1]), 3, 1, 1)):
        got = projection(x)
    for row, names in enumerate((["a"], [], ["b"])):
        with torch.inference_mode(mode):
            unet.set_adapters(names, 0.5 if names == ["b"] else 1.0)
        plain = [type(layer).forward(layer, x[row]) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        assert relative(got[row], torch.cat(plain, 1)) < EXACT


def test_weights_are_merged_anew_only_where_a_value_changed(monkeypatch):
    unet, merges, original = unet_with("a"), [], merged.merge_weights
    bank = build_bank(unet, RECIPES[:1], device=torch.device("cpu"))
    fill_bank(bank, 1.0)
    install(bank, Running(), "auto")
    merging = Merging(unet, {})
    merging.switch(True)
    monkeypatch.setattr(merged, "merge_weights", lambda *given: merges.append(1) or original(*given))
    merging.renew()
    assert not merges
    layer = next(layer for layer, bank in bank.layers if isinstance(layer.get_base_layer(), nn.Linear))
    layer.get_base_layer().weight.data[0, 0] += 1
    merging.renew()
    assert len(merges) == 1


def wide():
    layer = nn.Conv2d(24, 20, 3, padding=1)
    transforming = winograd.Transforming(layer)
    transforming.switch(True)
    return layer, transforming


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("tap", [(0, 0), (1, 1), (1, 2), (2, 0)], ids=str)
def test_one_tap_of_a_transformed_weight(tap):
    layer, transforming = wide()
    x = torch.randn(1, 24, 6, 6)
    before = layer(x)
    layer.weight.data[3, 5, tap[0], tap[1]] += 0.01
    transforming.renew()
    got = layer(x)
    assert relative(got, nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)) < 1e-6
    assert relative(got, before) > 1e-4


@pytest.mark.usefixtures("narrow")
def test_an_unchanged_weight_is_transformed_once(monkeypatch):
    made, original = [], winograd.transform_weight
    monkeypatch.setattr(winograd, "transform_weight", lambda weight: made.append(1) or original(weight))
    layer, transforming = wide()
    for _ in range(3):
        layer(torch.randn(1, 24, 6, 6))
        transforming.renew()
    assert len(made) == 1


def circular(layer):
    layer.padding_mode = "circular"


def strided(layer):
    layer.stride = (2, 2)


def own(layer):
    layer._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight, bias, padding=2)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("change", [circular, strided, own, quantise], ids=lambda change: change.__name__)
def test_a_transformed_convolution_that_is_no_longer_one(change):
    layer, _ = wide()
    x = torch.randn(1, 24, 6, 6)
    layer(x)
    change(layer)
    assert torch.equal(layer(x), nn.Conv2d.forward(layer, x))


# --- identity


def test_new_views_of_the_same_memory_are_the_same():
    x = torch.randn(4, 3)
    assert identity(x[:1]) == identity(x[:1])
    assert identity(x[:1]) != identity(x[1:2])
    assert identity(x) != identity(x.clone())
    before = identity(x[:1])
    x[2] = 0  # of the same memory: cannot be told apart, and counts as changed
    assert identity(x[:1]) != before


def test_what_has_no_version_or_no_memory():
    with torch.inference_mode():
        x = torch.randn(3)
    assert version(x) is None
    assert identity(x) == identity(x[:])
    layer = nn.Linear(4, 4)
    quantise(layer)
    assert memory(layer.weight) == memory(layer.weight.detach())
    other = nn.Linear(4, 4)
    quantise(other)
    assert memory(layer.weight) != memory(other.weight)
    assert memory(x.to("meta")) != memory(x.to("meta").clone())


# --- switches


def scaled(unet):
    unet.set_adapters(["a", "b"], [1.0, 0.9])


def fewer(unet):
    unet.set_adapters(["a"])


def disabled(unet):
    unet.disable_adapters()


def fused(unet):
    unet.fuse_lora()


def in_place(unet):
    next(iter(unet_layers(unet))).scaling["a"] *= 2


def deleted(unet):
    unet.delete_adapters("b")


def another(unet):
    down, up = torch.zeros(1, 4, 3, 3), torch.zeros(16, 1, 1, 1)
    state = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    unet.load_lora_adapter(state, prefix="unet", adapter_name="c")


def as_a_tensor(unet):
    next(iter(unet_layers(unet))).scaling["b"].mul_(2)


def written_to(unet):
    unet_layers(unet)[0].lora_A["a"].weight.requires_grad_(False).mul_(2)


def base_written(unet):
    unet_layers(unet)[0].get_base_layer().weight.requires_grad_(False).mul_(2)


def exchanged(unet):
    up = unet_layers(unet)[0].lora_B["a"]
    up.weight = nn.Parameter(up.weight.clone())


def unet_layers(unet):
    return [module for module in unet.modules() if hasattr(module, "lora_A")]


@pytest.mark.parametrize(
    "change",
    [scaled, fewer, disabled, fused, in_place, deleted, another, as_a_tensor, written_to, base_written, exchanged],
    ids=lambda c: c.__name__,
)
def test_what_is_switched_in_a_run_is_seen(change):
    unet = unet_with("a", "b")
    unet.set_adapters(["a", "b"])
    for layer in unet_layers(unet):
        layer.scaling["b"] = torch.tensor(layer.scaling["b"])  # as PEFT's hot swap prepares it
    switches = Switches(unet)
    before = switches.now()
    assert switches.now() == before
    change(unet)
    assert switches.now() != before
