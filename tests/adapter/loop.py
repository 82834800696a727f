"""The peer of these tests: the pipeline's own UNet called once per adapter, with a cache in between."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

import cmlora
from tests.models import EVERYTHING, add_lora, call, relative, sd_unet

NAMES, WEIGHTS = ("a", "b"), (0.8, 1.2)

EXACT = 1e-5


class Loop:
    """Stands in for the UNet's forward: N predictions, one adapter after the other, and their weighted mean.

    Args:
        interval: every so many calls refresh the features that enter the up path at `branch`.
        dominance: weight of the adapter that alone is refreshed, in turn; None: a plain mean, all are refreshed.
    """

    def __init__(self, unet, interval=1, branch=None, dominance=None):
        self.unet, self.interval, self.dominance = unet, interval, dominance
        self.calls, self.kept, self.original = 0, {}, unet.forward
        layer, block = branch or (0, len(unet.down_blocks[0].resnets) - 1)
        skip = block + sum(len(b.resnets) + len(b.downsamplers or ()) for b in unet.down_blocks[:layer])
        resnets = [r for b in unet.up_blocks for r in b.resnets]
        self.entry, below = resnets[-skip - 2], resnets[-skip - 3 : -skip - 2] or [unet.mid_block.resnets[-1]]
        self.channels = below[0].out_channels

    def __enter__(self):
        self.unet.forward = self
        return self

    def __exit__(self, *_):
        del self.unet.__dict__["forward"]
        self.unet.set_adapters(list(NAMES), list(WEIGHTS))

    def __call__(self, *args, return_dict=True, **kwargs):
        refreshing = self.calls % self.interval == 0
        dominant = NAMES[self.calls // self.interval % len(NAMES)]
        seen = {}
        for name, weight in zip(NAMES, WEIGHTS, strict=True):
            self.unet.set_adapters([name], [weight])
            full = self.calls == 0 or self.interval == 1
            full = full or (refreshing and (self.dominance is None or name == dominant))
            hook = functools.partial(self._keep if full else self._put, name)
            handle = self.entry.register_forward_pre_hook(hook)
            try:
                # diffusers empties the lists that it is given
                own = {k: list(v) if isinstance(v, list) else v for k, v in kwargs.items()}
                seen[name] = self.original(*args, **own, return_dict=False)[0]
            finally:
                handle.remove()
        self.calls += 1
        boost = self.dominance or 1.0
        total = sum((boost if name == dominant else 1.0) * seen[name] for name in NAMES)
        noise = total / (boost + len(NAMES) - 1)
        return diffusers.models.unets.unet_2d_condition.UNet2DConditionOutput(noise) if return_dict else (noise,)

    def _keep(self, name, module, inputs):
        self.kept[name] = inputs[0][:, : self.channels].clone()

    def _put(self, name, module, inputs):
        kept, hidden = self.kept[name], inputs[0]
        batch = hidden.shape[0]  # guidance that was switched off leaves the conditional half, which is the last one
        return torch.cat([kept[-batch:], hidden[:, self.channels :]], 1), *inputs[1:]


def small_unet(**overrides):
    """Two levels, a layer each: for what does not depend on the number of blocks."""
    levels = {
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return sd_unet(**(levels | overrides))


def with_loras(pipe):
    add_lora(pipe.unet, "a", rank=4, pattern=EVERYTHING, seed=1)
    add_lora(pipe.unet, "b", rank=6, alpha=3, seed=2)
    pipe.unet.set_adapters(list(NAMES), list(WEIGHTS))
    return pipe


def composite_equals_loop(pipe, run, interval=2, branch=None):
    """`run(pipe)` under the peer and under ours; the same tensors out of both."""
    with Loop(pipe.unet, interval, branch):
        want = run(pipe)
    with cmlora.accelerated(pipe, method="composite", combine="mean", cache_interval=interval, cache_branch=branch):
        got = run(pipe)
        assert cmlora.summary(pipe).steps
    assert relative(got, want) < EXACT
    return want


def cmlora_equals_loop(pipe, run, interval=2):
    with Loop(pipe.unet, interval, dominance=1.5):
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


def loop(pipe, run, interval=2, **settings):
    with Loop(pipe.unet, interval, **settings):
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
