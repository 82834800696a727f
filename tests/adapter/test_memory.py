"""Rows in parts give the same result, and memory is what it was predicted to be."""

import pytest
import torch

import cmlora
from tests.models import EVERYTHING, add_lora, relative, sd_pipe, sd_unet

CHOICES = (
    {"method": "no_lora"},
    {"method": "merge"},
    {"method": "switch", "switch_step": 1},
    {"method": "composite", "combine": "deviation"},
    {"method": "cmlora", "partition": "offline", "cache_branch": (1, 0)},
    {"method": "cmlora", "partition": "online", "online_gate": 0.9, "combine": "deviation"},
    {"method": "cmlora", "partition": "async", "max_cache_age": 2},
    {"method": "cmlora", "partition": "online", "cache_interval": 1},
)


SMALL = {
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def three_adapters(pattern=EVERYTHING, **unet):
    pipe = sd_pipe(sd_unet(**unet))
    names = ["character", "style", "background"]
    for i, name in enumerate(names):
        add_lora(pipe.unet, name, rank=2 + i, pattern=pattern, seed=i + 1)
    pipe.set_adapters(names)
    return pipe


def noises(pipe, steps=3, images=2, guidance=7.5, size=8, controlled=False):
    """The UNet's answers to latents of our own, so that rounding is not amplified from step to step."""
    generator = torch.Generator().manual_seed(0)
    halves = 2 if guidance > 1 else 1
    context = torch.randn(halves * images, 77, pipe.unet.config.cross_attention_dim, generator=generator)
    pipe._guidance_scale = guidance
    pipe.scheduler.set_timesteps(steps)
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4), (32, 4)]  # SMALL's skip connections and middle
    *down, middle = [torch.randn(halves * images, c, s, s, generator=generator) for c, s in shapes]
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    found = []
    for t in pipe.scheduler.timesteps:
        sample = torch.cat([torch.randn(images, 4, size, size, generator=generator)] * halves)
        found.append(pipe.unet(sample, t, context, **(residuals if controlled else {})).sample)
    return found


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: "-".join(map(str, c.values())))
def test_rows_in_parts_give_the_same_predictions(choice):
    """All rows at once; two predictions; one, as few as there can be. Every row is compared, before its weight."""
    pipe = three_adapters(**SMALL)
    parts = []
    pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: parts.append(output))
    for guidance in (7.5, 1.0):
        least, found = 4 if guidance > 1 else 2, []
        for most in (None, 2 * least + 1, least):
            cmlora.accelerate(pipe, max_rows=most, **{"cache_interval": 2, **choice})
            parts.clear()
            noises(pipe, guidance=guidance, controlled=guidance == 1.0)
            assert most is None or max(part.shape[0] for part in parts) <= most
            found.append(torch.cat(parts))
        assert relative(found[1], found[0]) < 1e-6
        assert relative(found[2], found[0]) < 1e-6


def test_fewer_rows_than_the_pipelines_own_batch_are_refused():
    pipe = three_adapters(**SMALL)
    cmlora.accelerate(pipe, max_rows=3)
    with pytest.raises(cmlora.RunError, match="max_rows must be at least the 4 rows"):
        noises(pipe, images=2)
