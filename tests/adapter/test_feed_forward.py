"""Feed-forward layers whose gate is one kernel, against diffusers' own in float64."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

import cmlora
from cmlora.lab.bench.tiny import EVERYTHING, call, relative, three_adapters
from cmlora.lora.layers import MultiLoraLinear
from cmlora.models.unet import layers as transformer


def gates(monkeypatch):
    """Shapes that the kernel was asked for, as they come."""
    asked, own = [], transformer.geglu
    monkeypatch.setattr(transformer, "geglu", lambda x, backend: asked.append(x.shape) or own(x, backend))
    return asked


@pytest.mark.parametrize("options", [{}, {"final_dropout": True}, {"bias": False}, {"dim_out": 20}], ids=str)
def test_the_gate_is_one_kernel_and_changes_nothing(options, monkeypatch):
    asked = gates(monkeypatch)
    module, x = FeedForward(16, activation_fn="geglu", **options).eval(), torch.randn(2, 5, 16)
    with torch.no_grad():
        want = copy.deepcopy(module).double()(x.double())
        assert relative(transformer._feed_forward(module, x, "triton"), want) < 1e-6
        assert asked == [(2, 5, 128)]
        assert torch.equal(transformer._feed_forward(module, x, "torch"), module(x))
        assert len(asked) == 1, "on the CPU the definition runs as diffusers writes it"


def test_layers_around_the_gate_are_called_and_so_their_hooks_heard(monkeypatch):
    asked, heard = gates(monkeypatch), []
    module, x = FeedForward(16, activation_fn="geglu").eval(), torch.randn(2, 5, 16)
    for layer in (module.net[0].proj, module.net[1], module.net[2]):
        layer.register_forward_hook(lambda layer, *_: heard.append(layer))
    with torch.no_grad():
        transformer._feed_forward(module, x, "triton")
        assert heard == [module.net[0].proj, module.net[1], module.net[2]]
        assert len(asked) == 1
        module.net[0].register_forward_hook(lambda layer, _, y: 2 * y)
        want = module(x)
        assert torch.equal(transformer._feed_forward(module, x, "triton"), want)
    assert len(asked) == 1, "a gate with a hook on it is called as it is"


def test_other_activations_are_called_as_they_are(monkeypatch):
    asked, x = gates(monkeypatch), torch.randn(2, 5, 16)
    for module in (FeedForward(16, activation_fn="gelu"), FeedForward(16, activation_fn="swiglu"), nn.Linear(16, 16)):
        with torch.no_grad():
            assert torch.equal(transformer._feed_forward(module, x, "triton"), module(x))
    assert not asked


@pytest.mark.parametrize("method", ["composite", "routed"])
def test_layers_with_adapters_have_the_gate_inside_and_no_image_changes(method, monkeypatch):
    """`routed` has masks on the tokens. The layers run as their definitions, so that every bit is the same."""
    pipe = three_adapters(EVERYTHING, device="cpu")
    cmlora.accelerate(pipe, method=method, cache_interval=2, merge_weights=False)
    want = call(pipe, 2)
    inside, own, gate = [], transformer._feed_forward, MultiLoraLinear.through_gate
    monkeypatch.setattr(transformer, "_feed_forward", lambda module, x, _: own(module, x, "triton"))
    monkeypatch.setattr(MultiLoraLinear, "through_gate", lambda self, x: inside.append(gate(self, x)) or inside[-1])
    assert torch.equal(call(pipe, 2), want)
    assert inside
    assert all(y is not None for y in inside)
    hooked, heard = next(m for n, m in pipe.unet.named_modules() if n.endswith("ff.net.0.proj")), []
    inside.clear()
    hooked.register_forward_hook(lambda *_: heard.append(1))
    assert relative(call(pipe, 2), want) < 1e-5, "a gate of its own, by its kernel"
    assert heard
    assert any(y is None for y in inside)
