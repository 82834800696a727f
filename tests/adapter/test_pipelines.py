"""Pipelines that condition the UNet otherwise: ControlNet, T2I- and IP-Adapter, img2img, inpainting."""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines import PipelineState
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

import cmlora
from cmlora.lab.bench.tiny import (
    DEVICE,
    add_lora,
    call,
    ddim,
    embeddings,
    relative,
    sd_pipe,
    sd_unet,
    sdxl_pipe,
    sdxl_unet,
)
from tests.adapter.loop import EXACT, NAMES, WEIGHTS, cmlora_equals_loop, composite_equals_loop, small_unet, with_loras


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
    pipe = diffusers.StableDiffusionXLAdapterPipeline.from_pipe(pipe, adapter=adapter).to(DEVICE)
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
    image = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1)).to(
        DEVICE
    )  # [guidance halves, pictures, width]
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


APART = (
    {"method": "composite", "combine": "mean", "cache_interval": 1},
    {"method": "composite", "combine": "mean", "cache_interval": 2},
    {"method": "cmlora", "combine": "local", "cache_interval": 2},
    {"method": "routed", "cache_interval": 2},
)


@pytest.mark.parametrize("settings", APART, ids=lambda s: "-".join(map(str, s.values())))
def test_modular_sdxl_whose_guider_calls_the_unet_once_per_half(settings):
    """The modular pipeline's own denoising loop; each half with a cache of its own, as a loop over the adapters has."""
    unet = sdxl_unet()
    for seed, name in enumerate(NAMES):
        add_lora(unet, name, seed=seed)
    pipe = StableDiffusionXLDenoiseStep().init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=5.0)
    pipe.update_components(unet=unet.to(DEVICE), scheduler=ddim(), guider=guider)
    whole = sdxl_pipe(unet)
    given = embeddings(whole)

    def run(pipe):
        pipe.scheduler.set_timesteps(4, device=DEVICE)
        state = PipelineState()
        sizes = torch.tensor([[128.0, 128, 0, 0, 128, 128]], device=DEVICE)
        for name, value in given.items():
            state.set(name, value.clone(), None if name == "latents" else "denoiser_input_fields")
        for name in ("add_time_ids", "negative_add_time_ids"):
            state.set(name, sizes, "denoiser_input_fields")
        state.set("timesteps", pipe.scheduler.timesteps)
        state.set("num_inference_steps", 4)
        return pipe(state=state, output="latents")

    unet.set_adapters(list(NAMES), list(WEIGHTS))
    cmlora.accelerate(whole, **settings)
    want = call(whole, 4, guidance=5.0, given=given)
    cmlora.restore(whole)
    cmlora.accelerate(pipe, **settings)
    assert relative(run(pipe), want) < EXACT
    assert len(cmlora.summary(pipe).steps) == 4
