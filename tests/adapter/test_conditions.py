"""Whatever a pipeline passes to its UNet: the batch computes what one plain PEFT call per adapter computes.

The peer runs diffusers' own UNet forward for every adapter at every step; where a step is cached, a hook puts the kept
feature in the place of what came up to the cut. So it follows every condition that diffusers does.
"""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter

import cmlora
from tests.models import EVERYTHING, add_lora, call, embeddings, relative, sd_pipe, sd_unet, sdxl_pipe, sdxl_unet

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


@pytest.fixture(scope="module")
def sd():
    return with_loras(sd_pipe())


@pytest.fixture(scope="module")
def small():
    return with_loras(sd_pipe(small_unet()))


@pytest.fixture(scope="module")
def sdxl():
    return with_loras(sdxl_pipe())


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
    with cmlora.accelerated(pipe, method="cmlora", **settings):
        got = run(pipe)
    assert relative(got, want) < EXACT


def merge_equals_plain(pipe, run):
    want = run(pipe)
    with cmlora.accelerated(pipe, method="merge", cache_interval=1):
        got = run(pipe)
    assert relative(got, want) < EXACT


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

    with Loop(small.unet, 2):
        exact = run(small)
    low = with_loras(sd_pipe(small_unet())).to(dtype=dtype)
    with Loop(low.unet, 2):
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
        with Loop(small.unet, 2) as loop:
            want = run(small)
        cmlora.accelerate(small, method="composite", combine="mean", cache_interval=2)
        got = run(small)
        assert len(cmlora.summary(small).steps) == loop.calls
        assert relative(got, want) < EXACT
    finally:
        cmlora.restore(small)
        small.scheduler = own


def controlnet(unet):
    torch.manual_seed(5)
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * 4).eval()
    for convolution in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(convolution.weight, std=0.3)
    torch.nn.init.normal_(net.controlnet_cond_embedding.conv_out.weight, std=0.3)
    return net


@pytest.mark.parametrize(("branch", "guess"), [((0, 1), False), ((1, 0), True)], ids=str)
def test_controlnet_residuals_on_cached_steps(branch, guess):
    unet = sd_unet()
    pipe = with_loras(sd_pipe(unet, kind=diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet(unet)))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))

    def run(pipe, strength=1.0):
        return call(pipe, 3, image=image, guess_mode=guess, controlnet_conditioning_scale=strength)

    want = composite_equals_loop(pipe, run, branch=branch)
    assert relative(run(pipe, 0.0), want) > 100 * EXACT  # the residuals do matter


def test_sdxl_controlnet():
    unet = sdxl_unet()
    pipe = with_loras(sdxl_pipe(unet, kind=diffusers.StableDiffusionXLControlNetPipeline, controlnet=controlnet(unet)))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    composite_equals_loop(pipe, lambda p: call(p, 2, image=image))


@pytest.mark.parametrize("branch", [(0, 1), (2, 1)], ids=str)
def test_t2i_adapter_residuals(branch):
    torch.manual_seed(0)
    unet = sd_unet()
    adapter = T2IAdapter(
        in_channels=3, channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
    )
    pipe = with_loras(sd_pipe(unet, kind=diffusers.StableDiffusionAdapterPipeline, adapter=adapter))
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    want = composite_equals_loop(pipe, lambda p: call(p, 2, image=image), branch=branch)
    assert relative(call(pipe, 2, image=image, adapter_conditioning_scale=0.0), want) > 100 * EXACT


def test_sdxl_t2i_adapter():
    torch.manual_seed(0)
    adapter = T2IAdapter(
        in_channels=3, channels=[16, 32, 32, 32], num_res_blocks=1, downscale_factor=16, adapter_type="full_adapter_xl"
    )
    pipe = with_loras(sdxl_pipe())
    pipe = diffusers.StableDiffusionXLAdapterPipeline.from_pipe(pipe, adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    # from the third step on without residuals
    composite_equals_loop(pipe, lambda p: call(p, 4, image=image, adapter_conditioning_factor=0.5), interval=3)


def ip_adapter(unet, tokens=4, width=16):
    """A random IP-Adapter in the format of its files."""
    generator = torch.Generator().manual_seed(0)
    cross = unet.config.cross_attention_dim

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    layers = {}
    attentions = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(attentions):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            layers[f"{2 * number + 1}.to_{part}_ip.weight"] = random(channels, cross)
    projection = {
        "proj.weight": random(tokens * cross, width),
        "proj.bias": random(tokens * cross),
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def test_ip_adapter():
    pipe = sd_pipe(small_unet())
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    with_loras(pipe)
    assert pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"
    image = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1))  # [guidance halves, pictures, width]
    for guidance in (7.5, 1.0):
        embeds = [image if guidance > 1 else image[1:]]
        run = functools.partial(call, steps=3, guidance=guidance, ip_adapter_image_embeds=embeds)
        for check in (composite_equals_loop, cmlora_equals_loop):
            check(pipe, run)


def test_img2img_runs_the_end_of_the_schedule():
    pipe = with_loras(sd_pipe(small_unet(), kind=diffusers.StableDiffusionImg2ImgPipeline))
    given = embeddings(pipe)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    del given["latents"]

    def run(pipe):
        seeded = {"generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        return pipe(**given, image=image, strength=0.6, num_inference_steps=7, **seeded).images

    for check in (composite_equals_loop, cmlora_equals_loop):
        check(pipe, run)
    stages = {"high": ["a"], "low": ["b"], "offline_boundary": 0.5, "cache_interval": 1}
    with cmlora.accelerated(pipe, method="cmlora", partition="offline", **stages):
        run(pipe)
        # T is the four steps that run: the early stage ends behind step 2 of them
        assert [step.dominant for step in cmlora.summary(pipe).steps] == [("a",)] * 3 + [("b",)]


def test_inpainting_unet_with_nine_channels():
    pipe = with_loras(sd_pipe(small_unet(in_channels=9), kind=diffusers.StableDiffusionInpaintPipeline))
    given = embeddings(pipe)
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(1, 1, 128, 128, generator=torch.Generator().manual_seed(1)) > 0.5).float()

    def run(pipe):
        return call(pipe, 3, given=given, image=picture, mask_image=mask, generator=torch.Generator().manual_seed(0))

    composite_equals_loop(pipe, run)
    with cmlora.accelerated(pipe, method="cmlora", partition="online", low=["b"], online_gate=0.0):
        run(pipe)
        steps = cmlora.summary(pipe).steps
    # the gate sees the latents, not the mask: what NumPy says of the first noise-like latents is far from 0 and 1
    assert all(0 < step.gate[0] < 1 for step in steps[1:])


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
    with Loop(sdxl.unet, 2):
        assert relative(got, call(sdxl, 6, given=given)) < EXACT


def test_callback_and_interrupt_leave_nothing_behind(small):
    seen = []

    def watch(pipe, i, t, tensors):
        seen.append(i)
        pipe._interrupt = i == 1
        return tensors

    bigger = embeddings(small, 2, size=(8, 24))
    with Loop(small.unet, 3):
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
            pipe.scheduler.set_timesteps(4)
            for t in pipe.scheduler.timesteps:
                noise = pipe.unet(x, t.expand(1), encoder_hidden_states=given["prompt_embeds"]).sample
                x = pipe.scheduler.step(noise, t, x).prev_sample
        return x

    composite_equals_loop(small, run)
    with Loop(small.unet, 2):
        want = run(small)
    with cmlora.accelerated(small, method="composite", combine="mean"):
        assert relative(run(small, again=2), want) < EXACT


def test_two_pipelines_in_one_process(small, sdxl):
    with Loop(small.unet, 2):
        want = call(small, 3)
    with Loop(sdxl.unet, 2):
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
    assert all(relative(x, want_xl) < EXACT for x in inner)


@pytest.mark.parametrize("drop", [False, True])
def test_pipelines_that_share_a_unet(drop):
    first = with_loras(sd_pipe(small_unet()))
    second = diffusers.StableDiffusionPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    with Loop(first.unet, 2):
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
