"""Warming up does before the first image all that it would have waited for, and leaves no trace in it."""

import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import ATTENTION, SMALL, call, embeddings, three_adapters
from tests.adapter.test_graphs import Captures


def test_nothing_is_captured_after_it_and_the_image_is_the_same():
    given = embeddings(three_adapters(ATTENTION, **SMALL), size=(8, 8))
    images, made, random = [], [], []
    for warm in (False, True):
        pipe = three_adapters(ATTENTION, **SMALL)
        cmlora.accelerate(pipe, partition="offline", cache_interval=2, cuda_graphs=True)
        captures = pipe.unet.forward.cmlora.denoiser.spending.capture = Captures()
        torch.manual_seed(5)
        if warm:
            cmlora.warm_up(pipe, **given, height=64, width=64)
        made.append(captures.made)
        random.append(torch.rand(1))
        images.append(call(pipe, 8, given=given))
    assert made == [0, 3], "first, refresh and reuse"
    assert captures.made == 3
    assert torch.equal(random[0], random[1])
    assert torch.equal(images[0], images[1])


def test_it_says_what_is_missing():
    with pytest.raises(cmlora.CMLoRAError, match="warm_up needs an accelerated pipeline"):
        cmlora.warm_up(three_adapters(ATTENTION, **SMALL))
