"""Bases that torchao, GGUF or bitsandbytes hold in fewer bits: the update runs beside their layers as beside any.

Each where its package is installed; tests/lora/test_behaviour.py has stand-ins for them everywhere.
"""

import importlib

import pytest
import torch
from torch import nn

import cmlora
from cmlora.lab.bench.tiny import relative
from cmlora.lab.bench.tiny_transformers import NAMES, draw, pipeline, transformer, with_loras
from tests.dit.peer import Peer

EXACT = 1e-5


def _package(name):
    return pytest.importorskip(name, reason=f"needs a package that this library does not: {name}")


def _each(net, make):
    """`make` in the place of every linear layer in the blocks."""
    for name, layer in list(net.named_modules()):
        if type(layer) is nn.Linear and "blocks" in name:
            parent, _, key = name.rpartition(".")
            setattr(net.get_submodule(parent), key, make(layer))


def torchao(net):
    quantization = importlib.import_module("torchao.quantization")
    quantization.quantize_(
        net, quantization.Int8WeightOnlyConfig(), filter_fn=lambda m, name: type(m) is nn.Linear and "blocks" in name
    )


def gguf(net):
    package, diffusers = _package("gguf"), importlib.import_module("diffusers.quantizers.gguf.utils")
    kind = package.GGMLQuantizationType.Q8_0

    def make(layer):
        new = diffusers.GGUFLinear(layer.in_features, layer.out_features, compute_dtype=torch.float32)
        values = torch.from_numpy(package.quants.quantize(layer.weight.detach().numpy(), kind).copy())
        new.weight, new.bias = diffusers.GGUFParameter(values, quant_type=kind), layer.bias
        return new

    _each(net, make)


def four_bits(net):
    nn4 = _package("bitsandbytes").nn

    def make(layer):
        new = nn4.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4")
        new.weight = nn4.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
        new.bias = layer.bias
        return new.to("cpu")

    _each(net, make)
    net.is_loaded_in_4bit = True


def eight_bits(net):
    """With a threshold that most rows have numbers beyond."""
    nn8 = _package("bitsandbytes").nn

    def make(layer):
        new = nn8.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False, threshold=1.0)
        new.weight = nn8.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        new.bias = layer.bias
        return new.to("cpu")

    _each(net, make)
    net.is_loaded_in_8bit = True


def bits(net):
    """What the base's weights are stored as."""
    kept = []
    for name, weight in net.named_parameters():
        if "lora_" not in name:
            parts = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
            kept += [getattr(weight, part).clone() for part in parts] or [weight.detach().clone()]
    return kept


@pytest.fixture(
    params=[("torchao", torchao), ("gguf", gguf), ("bitsandbytes", four_bits), ("bitsandbytes", eight_bits)],
    ids=lambda param: param[1].__name__,
)
def quantised(request):
    package, quantise = request.param
    _package(package)
    net = transformer("flux")
    before = net.transformer_blocks[0].attn.to_q.weight
    quantise(net)
    assert type(net.transformer_blocks[0].attn.to_q.weight) is not type(before)
    return with_loras(pipeline("flux", net, device="cpu"), "flux")


def test_a_quantised_base_composes_as_a_loop_does_and_stays_as_it_is(quantised):
    pipe, names, before = quantised, NAMES[:3], bits(quantised.transformer)
    plain = draw(pipe, "flux")
    for config in ({"method": "merge"}, {"method": "merge", "adapters": names}):
        with cmlora.accelerated(pipe, cache_interval=1, **config):
            assert relative(draw(pipe, "flux"), plain) < EXACT
    for rule, config in (
        ("mean", {"method": "composite", "combine": "mean"}),
        ("mean", {"method": "composite", "combine": "mean", "merge_weights": True, "memory_budget": 2**30}),
        ("routed", {"method": "routed"}),
    ):
        with Peer(pipe, "flux", names, rule):
            want = draw(pipe, "flux")
        with cmlora.accelerated(pipe, cache_interval=1, **config):
            assert relative(draw(pipe, "flux"), want) < EXACT, config
    assert all(map(torch.equal, bits(pipe.transformer), before))
    assert torch.equal(draw(pipe, "flux"), plain)
