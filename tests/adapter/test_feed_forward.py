"""Feed-forward layers whose gate is one kernel, against diffusers' own in float64."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

from cmlora.lab.bench.tiny import relative
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
