"""Two adapters on a tiny pipeline, and comparisons with the peer: the pipeline's own UNet called once per adapter."""

from __future__ import annotations

import contextlib

import pytest
import torch

import cmlora
from cmlora.lab.bench.loop import Loop
from cmlora.lab.bench.tiny import EVERYTHING, SMALL, add_lora, call, relative, sd_unet

NAMES, WEIGHTS = ("a", "b"), (0.8, 1.2)

EXACT = 1e-5


@contextlib.contextmanager
def peer(pipe, interval=2, **how):
    """One adapter after the other in the place of the UNet's forward; afterwards both are active again."""
    with Loop(pipe.unet, NAMES, WEIGHTS, interval=interval, **how) as loop:
        yield loop
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))


def small_unet(**overrides):
    """Two levels, a layer each: for what does not depend on the number of blocks."""
    return sd_unet(**(SMALL | overrides))


def with_loras(pipe):
    add_lora(pipe.unet, "a", rank=4, pattern=EVERYTHING, seed=1)
    add_lora(pipe.unet, "b", rank=6, alpha=3, seed=2)
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    return pipe


def composite_equals_loop(pipe, run, interval=2, branch=None):
    """`run(pipe)` under the peer and under ours; the same tensors out of both."""
    with peer(pipe, interval, branch=branch):
        want = run(pipe)
    with cmlora.accelerated(pipe, method="composite", combine="mean", cache_interval=interval, cache_branch=branch):
        got = run(pipe)
        assert cmlora.summary(pipe).steps
    assert relative(got, want) < EXACT
    return want


def cmlora_equals_loop(pipe, run, interval=2):
    with peer(pipe, interval, dominance=1.5):
        want = run(pipe)
    settings = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0.0, "cache_interval": interval}
    with cmlora.accelerated(pipe, method="cmlora", combine="mean", **settings):
        got = run(pipe)
    assert relative(got, want) < EXACT


def merge_equals_plain(pipe, run):
    want = run(pipe)
    with cmlora.accelerated(pipe, method="merge", cache_interval=1):
        got = run(pipe)
    assert relative(got, want) < EXACT


def loop(pipe, run, interval=2, **how):
    with peer(pipe, interval, **how):
        return run(pipe)


def refused(pipe, kind, *parts, **settings):
    """`accelerate` raises `kind` with `parts` in its message, and leaves the pipeline as it was."""
    before, attributes = call(pipe, 1), dict(pipe.unet.__dict__)
    with pytest.raises(kind) as error:
        cmlora.accelerate(pipe, **settings)
    assert isinstance(error.value, cmlora.CMLoRAError)
    for part in parts:
        assert part in str(error.value)
    assert pipe.unet.__dict__ == attributes
    assert torch.equal(call(pipe, 1), before)
