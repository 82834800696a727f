"""What only the CPU does: merged weights, GEMMs in the place of convolutions, channels innermost."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cmlora
from cmlora import layers, transformer
from tests.models import ATTENTION, EVERYTHING, call, relative, three_adapters

METHODS = (
    {"method": "merge"},
    {"method": "switch", "switch_step": 1},
    {"method": "composite", "combine": "deviation"},
    {"partition": "online", "online_gate": 0.9},
)


@pytest.mark.parametrize("choice", METHODS, ids=lambda choice: next(iter(choice.values())))
def test_merged_weights_give_what_low_rank_updates_give(choice):
    pipe = three_adapters(EVERYTHING)
    images = []
    for merge in (False, True):
        cmlora.accelerate(pipe, merge_weights=merge, cache_interval=2, **choice)
        images.append(call(pipe, 4))
        assert ("merged" in cmlora.summary(pipe).strategies) == merge
    assert relative(images[1], images[0]) < 1e-5


def test_weights_are_merged_again_only_where_adapters_changed(monkeypatch):
    merges = []
    monkeypatch.setattr(layers, "merge_weights", lambda *a: merges.append(a) or _merge(*a))
    pipe = three_adapters(ATTENTION)
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


_merge = layers.merge_weights


def test_weights_that_would_outgrow_the_unet_are_not_merged_unless_asked_for():
    pipe = three_adapters(ATTENTION)
    cmlora.accelerate(pipe)
    call(pipe, 1)
    denoiser = pipe.unet.forward.cmlora.denoiser
    assert denoiser._may_merge
    denoiser.merging.layers *= 100
    assert not denoiser._may_merge


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_of_few_pixels_is_the_same_as_a_gemm(channels_last, monkeypatch):
    layer, x = nn.Conv2d(12, 20, 3, padding=1), torch.randn(3, 12, 5, 7)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    monkeypatch.setattr(transformer, "LARGE_WEIGHT", 1)
    with Convolutions() as seen, torch.no_grad():
        got = transformer._convolve(layer, x)
    assert not seen.inputs
    assert relative(got, layer.double()(x.double())) < 1e-6
    layer.float().register_forward_hook(lambda *_: torch.zeros(1))
    assert transformer._convolve(layer, x).shape == (1,)


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
    pipe = three_adapters(ATTENTION)
    cmlora.accelerate(pipe, cache_interval=2)
    with Convolutions() as seen:
        call(pipe, 3)
    wide = [x for x in seen.inputs if x.shape[1] > 4]
    assert len(wide) > 50
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in wide)
