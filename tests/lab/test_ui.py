"""The page draws what the library draws."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import cmlora
from cmlora import CMLoRAError, sprites
from cmlora.lab.ui import Composer, region_of


@pytest.fixture(scope="module")
def composer() -> Composer:
    pipe = StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    names = ("zebrin", "tophat", "checker")
    for name in names:
        pipe.load_lora_weights(sprites.lora_path(name), adapter_name=name)
    return Composer(pipe, names)


def test_the_page_draws_what_a_call_draws(composer):
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    weights = {"zebrin": 1.0, "checker": 0.5}
    made = composer.draw("a zebrin creature", weights, "routed", {"checker": mask, "tophat": mask}, steps=2, seed=3)
    pipe = composer.pipe
    pipe.set_adapters(list(weights), list(weights.values()))
    with cmlora.accelerated(pipe, method="routed", regions={"checker": mask}):
        noise = torch.Generator().manual_seed(3)
        own = pipe("a zebrin creature", num_inference_steps=2, guidance_scale=4.0, generator=noise).images[0]
    assert made.image.tobytes() == own.tobytes()
    assert made.masks is not None
    assert "checker acts in 50% of the image" in made.text
    merged = composer.draw("a zebrin creature", weights, "merge", {"checker": mask}, steps=2)
    assert merged.masks is None
    with pytest.raises(CMLoRAError, match="routed needs a LoRA"):
        composer.draw("x", {}, "routed", {})
    with pytest.raises(CMLoRAError, match="got hat"):
        composer.draw("x", {"hat": 1.0}, "routed", {})


def test_what_is_painted_is_the_region():
    layer = np.zeros((4, 6, 4), np.uint8)
    layer[:, 3:, 3] = 255
    assert region_of({"layers": [layer]}).mean() == 0.5
    assert region_of({"layers": []}) is None
    assert region_of(None) is None
