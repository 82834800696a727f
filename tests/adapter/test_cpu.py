"""What only the CPU does: merged weights, other ways of multiplying, channels innermost."""

import copy
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.models.attention import FeedForward
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cmlora
from cmlora.lab.bench.tiny import ATTENTION, EVERYTHING, SMALL, call, relative, three_adapters
from cmlora.lora import merged, winograd
from cmlora.lora.merged import Merging
from cmlora.models.unet import layers as transformer
from cmlora_kernels import cpu_linear

ROOT = Path(__file__).resolve().parents[2]
METHODS = (
    {"method": "merge"},
    {"method": "switch", "switch_step": 1},
    {"method": "composite", "combine": "deviation"},
    {"partition": "online", "online_gate": 0.9},
)


@pytest.mark.parametrize("choice", METHODS, ids=lambda choice: next(iter(choice.values())))
def test_merged_weights_give_what_low_rank_updates_give(choice):
    pipe = three_adapters(EVERYTHING, device="cpu")
    images = []
    for merge in (False, True):
        cmlora.accelerate(pipe, merge_weights=merge, cache_interval=2, **choice)
        images.append(call(pipe, 4))
        assert ("merged" in cmlora.summary(pipe).strategies) == merge
    assert relative(images[1], images[0]) < 1e-5


def test_weights_are_merged_again_only_where_adapters_changed(monkeypatch):
    merges = []
    monkeypatch.setattr(merged, "merge_weights", lambda *a: merges.append(a) or _merge(*a))
    pipe = three_adapters(ATTENTION, device="cpu")
    cmlora.accelerate(pipe)
    call(pipe, 1)
    once = len(merges)
    call(pipe, 1)
    assert len(merges) == once > 0
    name = next(iter(pipe.unet.peft_config))
    changed = next(module for module in pipe.unet.modules() if name in getattr(module, "lora_B", {}))
    changed.lora_B[name].weight.data.mul_(2)
    call(pipe, 1)
    assert len(merges) == once + 1


_merge = merged.merge_weights


def test_linear_layers_that_run_in_every_step_are_merged():
    """q, k, v of 16 self-attentions are one layer each; the 32 that make the prompt's keys and values run once."""
    pipe = three_adapters(EVERYTHING, device="cpu")
    cmlora.accelerate(pipe, merge_weights=True)
    call(pipe, 1)
    every = 16 + sum(isinstance(module, PeftLinear) for module in pipe.unet.modules()) - 3 * 16
    assert cmlora.summary(pipe).strategies == {"merged": every - 32, "definition": 32}


@pytest.mark.parametrize(("asked", "merged"), [(None, False), (True, True)], ids=["unasked", "asked"])
def test_weights_that_would_outgrow_the_unet_are_not_merged_unless_asked_for(asked, merged, monkeypatch):
    pipe = three_adapters(ATTENTION, device="cpu", **SMALL)
    cmlora.accelerate(pipe)
    call(pipe, 1)
    assert "merged" in cmlora.summary(pipe).strategies, "they do not outgrow it"
    monkeypatch.setattr(Merging, "bytes", unet_bytes(pipe) + 1)
    cmlora.accelerate(pipe, merge_weights=asked)
    call(pipe, 1)
    assert ("merged" in cmlora.summary(pipe).strategies) == merged


def unet_bytes(pipe):
    return sum(parameter.nbytes for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("chunk", [1, 3000, 2**24], ids=["a line", "some lines", "all"])
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 2)], ids=str)
def test_winograds_convolution_is_as_exact_as_the_direct_one(chunk, size, monkeypatch):
    monkeypatch.setattr(winograd, "CHUNK", chunk)
    for bias in (True, False):
        layer, x = nn.Conv2d(12, 20, 3, padding=1, bias=bias), torch.randn(3, 12, *size)
        weight = winograd.transform_weight(layer.weight.detach())
        for layout in (torch.channels_last, torch.contiguous_format):
            with torch.no_grad():
                got = winograd.convolve(x.contiguous(memory_format=layout), weight, layer.float().bias)
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert relative(got, layer.double()(x.double())) < 1e-6


@pytest.fixture
def wide(monkeypatch):
    """All 3x3 convolutions count as wide."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)


@pytest.mark.parametrize("pattern", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_transformed_convolutions_change_no_image_and_leave_with_restore(pattern, wide):
    """Those that carry adapters stay as they are."""
    pipe = three_adapters(pattern, device="cpu")
    images, direct = [], []
    for choice in (False, True):
        cmlora.accelerate(pipe, winograd=choice, cache_interval=2)
        with Convolutions() as seen:
            images.append(call(pipe, 4))
        direct.append(sum(layer.kernel_size == (3, 3) for layer in pipe.unet.modules() if is_direct(layer)))
        assert len(seen.inputs) > 0
    assert relative(images[1], images[0]) < 1e-5
    assert direct[1] < direct[0] / 4 if pattern == ATTENTION else direct[1] == direct[0]
    cmlora.restore(pipe)
    assert not any("forward" in module.__dict__ for module in pipe.unet.modules())


def is_direct(layer):
    return type(layer) is nn.Conv2d and "forward" not in layer.__dict__


def test_a_transformed_convolution_follows_its_layer(wide):
    """New weights, weights of another type, gradients: as the layer itself would take them."""
    layer, x = nn.Conv2d(12, 20, 3, padding=1), torch.randn(1, 12, 4, 4)
    transforming = winograd.Transforming(layer)
    transforming.switch(True)
    with torch.no_grad():
        first = layer(x)
        layer.weight.mul_(2)
        second = layer(x)
        layer.bias.zero_()
        assert relative(layer(x), nn.functional.conv2d(x, layer.weight, padding=1)) < 1e-6
        assert relative(second, first) > 0.1
        assert layer.double()(x.double()).dtype == torch.float64
    with torch.enable_grad():
        layer.float()(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    transforming.switch(False)
    assert is_direct(layer)


def test_a_feed_forward_in_parts_changes_no_image(monkeypatch):
    pipe = three_adapters(ATTENTION, device="cpu")
    cmlora.accelerate(pipe, cache_interval=2)
    want = call(pipe, 3)
    sizes = []
    monkeypatch.setattr(transformer, "_geglu", lambda module, x: sizes.append(x.shape[0]) or _geglu(module, x))
    monkeypatch.setattr(transformer, "LARGE", 1)
    monkeypatch.setattr(transformer, "TOKENS", 100)
    assert relative(call(pipe, 3), want) < 1e-6
    assert max(sizes) == 100 > min(sizes)


_geglu = transformer._geglu


def test_a_feed_forward_that_is_not_plain_is_called_as_it_is():
    """Hooks inside are heard, dropout in training is done, another activation is another activation."""
    plain, x = FeedForward(16, activation_fn="geglu"), torch.randn(2, 5, 16)
    assert transformer._is_plain(plain)
    assert relative(transformer._feed_forward(plain, x, "auto"), plain.double()(x.double())) < 1e-6
    heard = []
    plain.float().net[2].register_forward_hook(lambda *a: heard.append(a))
    transformer._feed_forward(plain, x, "auto")
    assert len(heard) == 1
    assert not transformer._is_plain(nn.Identity())
    assert not transformer._is_plain(FeedForward(16, activation_fn="gelu"))
    assert not transformer._is_plain(FeedForward(16, activation_fn="geglu", dropout=0.1))
    assert not transformer._is_plain(FeedForward(16, activation_fn="geglu", final_dropout=True))


both_libraries = pytest.mark.skipif(not cpu_linear.HAS_BOTH, reason="this torch lacks MKL or oneDNN")


@both_libraries
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 90, 70), (300, 70)], ids=str)
def test_a_large_linear_layer_is_as_exact_as_torchs(shape, bias, monkeypatch):
    """As a 1x1 convolution, of x as a view that has gaps, too."""
    monkeypatch.setattr(cpu_linear, "LARGE", 2**20)
    layer, wide = nn.Linear(70, 60, bias=bias), torch.randn(*shape[:-1], 2 * shape[-1])
    for x in (wide[..., :70], wide[..., :70].contiguous()):
        with Convolutions() as seen:
            got = cpu_linear.linear(x, layer.weight.detach(), layer.bias)
        assert len(seen.inputs) == 1
        assert got.shape == (*shape[:-1], 60)
        assert got.is_contiguous()
        assert relative(got, copy.deepcopy(layer).double()(x.double())) < 1e-6


@both_libraries
def test_only_large_linear_layers_in_float32_are_convolutions():
    weight = torch.randn(256, 256)
    for x, expected in (
        (torch.randn(256, 256), 1),
        (torch.randn(255, 256), 0),
        (torch.randn(256, 256, dtype=torch.float64), 0),
        (torch.randn(256, 256, device="meta"), 0),
    ):
        with Convolutions() as seen:
            cpu_linear.linear(x, weight.to(x.device, x.dtype), None)
        assert len(seen.inputs) == expected


@pytest.mark.parametrize(("asked", "made"), [(None, False), (True, True)], ids=["unasked", "asked"])
def test_transformed_weights_that_would_outgrow_twice_the_unet_are_not_made_unless_asked_for(
    asked, made, wide, monkeypatch
):
    pipe = three_adapters(ATTENTION, device="cpu", **SMALL)
    cmlora.accelerate(pipe)
    call(pipe, 1)
    assert "convolutions transformed" in str(cmlora.summary(pipe)), "they do not outgrow it"
    monkeypatch.setattr(winograd.Transforming, "bytes", 2 * unet_bytes(pipe) + 1)
    cmlora.accelerate(pipe, winograd=asked)
    call(pipe, 1)
    assert ("convolutions transformed" in str(cmlora.summary(pipe))) == made


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_a_run_on_the_cpu_makes_hardly_any_page_anew():
    """glibc would hand back what a step frees, and the next step would pay for it again; counted in a new process."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", COUNT_FAULTS]
    told = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    _, *later = map(int, told.stdout.split())
    assert statistics.median(later) < 300  # without it about 1000


COUNT_FAULTS = """
import resource
import cmlora
from cmlora.lab.bench.tiny import ATTENTION, call, three_adapters

pipe = three_adapters(ATTENTION, device="cpu")
cmlora.accelerate(pipe)
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(pipe, 4)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


class Convolutions(TorchDispatchMode):
    """Notes the inputs of all convolutions."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "convolution":
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))


def test_channels_stay_innermost_from_the_first_convolution_to_the_last():
    pipe = three_adapters(ATTENTION, device="cpu")
    cmlora.accelerate(pipe, cache_interval=2)
    with Convolutions() as seen:
        call(pipe, 3)
    wide = [x for x in seen.inputs if x.shape[1] > 4]
    assert len(wide) > 50
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in wide)
