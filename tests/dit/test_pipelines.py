"""The other pipelines of the families: they begin in the middle of a schedule, keep what is masked, add residuals."""

import inspect

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL

import cmlora
from cmlora.lab.bench.tiny import relative
from cmlora.lab.bench.tiny_transformers import NAMES, draw, pipeline, transformer, with_loras
from tests.dit.peer import Peer


def vae(channels=4):
    torch.manual_seed(1)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    widths = {"block_out_channels": (4,) * 4, "norm_num_groups": 2, "latent_channels": channels}
    return AutoencoderKL(**widths, **kinds, shift_factor=0.0)


def picture():
    return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(4))


def mask():
    given = torch.zeros(1, 1, 128, 128)
    given[..., :64] = 1
    return given


def flux_controlnet():
    torch.manual_seed(2)
    given = dict(transformer("flux").config)
    config = {k: v for k, v in given.items() if not k.startswith("_") and k != "out_channels"}
    return _loud(diffusers.FluxControlNetModel(**(config | {"num_layers": 1, "num_single_layers": 1})).eval())


def sd3_controlnet():
    torch.manual_seed(2)
    config = {k: v for k, v in dict(transformer("sd3").config).items() if not k.startswith("_")}
    return _loud(diffusers.SD3ControlNetModel(**(config | {"num_layers": 2, "dual_attention_layers": ()})).eval())


def qwen_vae():
    torch.manual_seed(1)
    kinds = {"dim_mult": [1] * 4, "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
    scales = {"latents_mean": [0.1] * 4, "latents_std": [1.2] * 4}
    return diffusers.AutoencoderKLQwenImage(base_dim=4, z_dim=4, **kinds, **scales)


def qwen_controlnet():
    torch.manual_seed(2)
    given = dict(transformer("qwen").config)
    known = inspect.signature(diffusers.QwenImageControlNetModel.__init__).parameters
    config = {k: v for k, v in given.items() if k in known}
    return _loud(diffusers.QwenImageControlNetModel(**(config | {"num_layers": 2})).eval())


def _loud(net):
    for parameter in net.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net


FROM = {"image": picture, "strength": lambda: 0.6}
OVER = {"image": picture, "mask_image": mask, "strength": lambda: 0.6}
UNDER = {"control_image": picture, "controlnet_conditioning_scale": lambda: 0.7}
CASES = {
    "flux from a picture": ("flux", "FluxImg2ImgPipeline", FROM, {}),
    "flux under a mask": ("flux", "FluxInpaintPipeline", OVER, {}),
    "flux with residuals": ("flux", "FluxControlNetPipeline", UNDER, {"controlnet": flux_controlnet}),
    "sd3 from a picture": ("sd3", "StableDiffusion3Img2ImgPipeline", FROM, {}),
    "sd3 with residuals": ("sd3", "StableDiffusion3ControlNetPipeline", UNDER, {"controlnet": sd3_controlnet}),
    "qwen from a picture": ("qwen", "QwenImageImg2ImgPipeline", FROM, {"vae": qwen_vae}),
    "qwen under a mask": (
        "qwen",
        "QwenImageInpaintPipeline",
        OVER | {"latents": lambda: None},  # with latents given it cannot be called
        {"vae": qwen_vae},
    ),
    "qwen with residuals": (
        "qwen",
        "QwenImageControlNetPipeline",
        UNDER,
        {"vae": qwen_vae, "controlnet": qwen_controlnet},
    ),
    "z_image from a picture": ("z_image", "ZImageImg2ImgPipeline", FROM, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_pipeline_of_the_family_composes_as_a_loop_does(case):
    kind, name, given, parts = CASES[case]
    made = {part: make() for part, make in ({"vae": vae} | parts).items()}
    pipe = with_loras(pipeline(kind, cls=getattr(diffusers, name), **made), kind)
    interval = 1 if "residuals" in case else 2  # the peer's cached blocks know no residuals

    def run():
        torch.manual_seed(9)  # of the VAE's samples where a pipeline passes no generator on
        call = {key: make() for key, make in given.items()}
        return draw(pipe, kind, steps=5, generator=torch.Generator().manual_seed(6), **call)

    with Peer(pipe, kind, NAMES[:3], "mean", interval=interval) as peer:
        want = run()
    assert peer.step < 4 or "strength" not in given, "the run begins in the middle"
    with cmlora.accelerated(pipe, method="composite", combine="mean", cache_interval=interval, cache_branch=(1, 1)):
        assert relative(run(), want) < 1e-5
        assert len(cmlora.summary(pipe).steps) == peer.step + 1
    with cmlora.accelerated(pipe, method="routed"):
        run()
        assert {m.shape for m in cmlora.summary(pipe).masks.values()} == {(1, 16, 16)}
