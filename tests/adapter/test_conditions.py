"""Whatever a pipeline passes to its UNet: the batch computes what one plain PEFT call per adapter computes.

The peer runs diffusers' own UNet forward for every adapter at every step; where a step is cached, a hook puts the kept
feature in the place of what came up to the cut. So it follows every condition that diffusers does.
"""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import DEVICE, EVERYTHING, add_lora, call, embeddings, relative, sd_pipe, sdxl_pipe
from tests.adapter.loop import (
    EXACT,
    cmlora_equals_loop,
    composite_equals_loop,
    merge_equals_plain,
    peer,
    small_unet,
    with_loras,
)


@pytest.fixture(scope="module")
def sd():
    return with_loras(sd_pipe())


@pytest.fixture(scope="module")
def small():
    return with_loras(sd_pipe(small_unet()))


@pytest.fixture(scope="module")
def sdxl():
    return with_loras(sdxl_pipe())


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("images", [1, 2])
def test_guidance_and_batch(small, guidance, images):
    given = embeddings(small, images)
    for check in (composite_equals_loop, cmlora_equals_loop):
        check(small, lambda p: call(p, 3, guidance, given))


def test_guidance_rescale_and_images_per_prompt(small):
    given = embeddings(small, 2)
    given["latents"] = embeddings(small, 4)["latents"]
    composite_equals_loop(small, lambda p: call(p, 3, given=given, guidance_rescale=0.7, num_images_per_prompt=2))


def test_sdxl(sdxl):
    given = embeddings(sdxl, 2)
    for check in (composite_equals_loop, cmlora_equals_loop):
        check(sdxl, lambda p: call(p, 3, given=given, guidance_rescale=0.5))


@pytest.mark.parametrize("branch", [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 1)], ids=str)
@pytest.mark.parametrize("size", [(8, 16), (17, 19)], ids=str)
def test_every_branch_and_size(sd, branch, size):
    given = embeddings(sd, size=size)
    composite_equals_loop(sd, lambda p: call(p, 2, given=given), branch=branch)


@pytest.mark.parametrize("branch", [(0, 1), (1, 1), (2, 1)], ids=str)
def test_odd_size_on_sdxl(sdxl, branch):
    given = embeddings(sdxl, size=(13, 10))
    composite_equals_loop(sdxl, lambda p: call(p, 2, given=given), branch=branch)


@pytest.mark.parametrize("branch", [(0, 1), (2, 0), (3, 0)], ids=str)
def test_freeu_scales_a_cached_feature_once(sd, branch):
    sd.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    try:
        composite_equals_loop(sd, lambda p: call(p, 4), interval=4, branch=branch)
    finally:
        sd.disable_freeu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_no_further_off_than_the_loop(small, dtype):
    given = embeddings(small)

    def run(pipe):
        return call(pipe, 3, given={k: v.to(pipe.unet.dtype) for k, v in given.items()}).float()

    with peer(small):
        exact = run(small)
    low = with_loras(sd_pipe(small_unet())).to(dtype=dtype)
    with peer(low):
        loop = run(low)
    cmlora.accelerate(low, method="composite", combine="mean", cache_interval=2)
    got = call(low, 3, given={k: v.to(dtype) for k, v in given.items()})
    assert got.dtype == dtype
    # both lose about a rounding per layer, in another order
    assert relative(got.float(), exact) < 1.5 * relative(loop, exact)


@pytest.mark.parametrize("scale", [0.5, 1.7])
def test_lora_scale_of_the_call(small, scale):
    run = functools.partial(call, steps=3, cross_attention_kwargs={"scale": scale})
    composite_equals_loop(small, run)
    merge_equals_plain(small, run)


def test_merge_of_ranks_beyond_128():
    pipe = sd_pipe(small_unet())
    for seed, name in enumerate(("a", "b", "c")):
        add_lora(pipe.unet, name, rank=60, pattern=EVERYTHING, seed=seed)
    pipe.unet.set_adapters(["a", "b", "c"], [0.5, 0.3, 0.2])
    merge_equals_plain(pipe, lambda p: call(p, 2))


SCHEDULERS = {
    "DDIMScheduler": {"timestep_spacing": "trailing"},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LCMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "TCDScheduler": {},
    "UniPCMultistepScheduler": {},
    "DDPMScheduler": {},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_evaluation_of_a_scheduler_is_a_step(small, name):
    own = small.scheduler
    kind = getattr(diffusers, name)

    def run(pipe):
        pipe.scheduler = kind.from_config(own.config, **SCHEDULERS[name])
        return call(pipe, 3, generator=torch.Generator().manual_seed(0))

    try:
        with peer(small) as loop:
            want = run(small)
        cmlora.accelerate(small, method="composite", combine="mean", cache_interval=2)
        got = run(small)
        assert len(cmlora.summary(small).steps) == loop.calls
        assert relative(got, want) < EXACT
    finally:
        cmlora.restore(small)
        small.scheduler = own


def test_denoising_end_then_a_longer_loop(sdxl):
    given = embeddings(sdxl)
    composite_equals_loop(sdxl, lambda p: call(p, 6, given=given, denoising_end=0.5))
    with cmlora.accelerated(sdxl, method="composite", combine="mean"):
        call(sdxl, 6, given=given, denoising_end=0.5)
        assert len(cmlora.summary(sdxl).steps) == 2
        # another pipeline on the same UNet, of which sdxl knows nothing
        other = diffusers.StableDiffusionXLPipeline.from_pipe(sdxl)
        other.set_progress_bar_config(disable=True)
        got = call(other, 6, given=given)
    with peer(sdxl):
        assert relative(got, call(sdxl, 6, given=given)) < EXACT


def test_callback_and_interrupt_leave_nothing_behind(small):
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = i == 1
        return tensors

    bigger = embeddings(small, 2, size=(8, 24))
    with peer(small, 3):
        want = call(small, 5, given=bigger)
    with cmlora.accelerated(small, method="composite", combine="mean", cache_interval=3):
        call(small, 4, callback_on_step_end=watch)
        assert len(cmlora.summary(small).steps) == 2
        got = call(small, 5, given=bigger)
    assert seen == [0, 1]
    assert relative(got, want) < EXACT


def test_latents_changed_in_a_callback(small):
    def shift(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * 0.9 + 0.05}

    composite_equals_loop(small, lambda p: call(p, 3, callback_on_step_end=shift))


def test_custom_loop(small):
    given = embeddings(small)

    def run(pipe, again=1):
        for _ in range(again):
            x = given["latents"]
            pipe.scheduler.set_timesteps(4, device=DEVICE)
            for t in pipe.scheduler.timesteps:
                noise = pipe.unet(x, t.expand(1), encoder_hidden_states=given["prompt_embeds"]).sample
                x = pipe.scheduler.step(noise, t, x).prev_sample
        return x

    composite_equals_loop(small, run)
    with peer(small):
        want = run(small)
    with cmlora.accelerated(small, method="composite", combine="mean"):
        assert relative(run(small, again=2), want) < EXACT


def test_two_pipelines_in_one_process(small, sdxl):
    with peer(small):
        want = call(small, 3)
    with peer(sdxl):
        want_xl = call(sdxl, 3)
    with (
        cmlora.accelerated(small, method="composite", combine="mean"),
        cmlora.accelerated(sdxl, method="composite", combine="mean"),
    ):
        inner = []

        def other(pipe, i, t, tensors):  # one runs in the middle of the other
            inner.append(call(sdxl, 3))
            return tensors

        got = call(small, 3, callback_on_step_end=other)
    assert relative(got, want) < EXACT
    assert len(inner) == 3
    assert all(relative(x, want_xl) < EXACT for x in inner)


@pytest.mark.parametrize("drop", [False, True])
def test_pipelines_that_share_a_unet(drop):
    first = with_loras(sd_pipe(small_unet()))
    second = diffusers.StableDiffusionPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    with peer(first):
        want = call(second, 3)
    unet = first.unet
    cmlora.accelerate(first, method="composite", combine="mean")
    if drop:
        del first
    assert relative(call(second, 3), want) < EXACT
    cmlora.restore(second)
    assert "forward" not in unet.__dict__


def test_a_unet_without_attention_at_its_ends():
    unet = small_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
    )
    pipe = with_loras(sd_pipe(unet))
    for branch in ((0, 0), (1, 0)):
        composite_equals_loop(pipe, lambda p: call(p, 3), branch=branch)
