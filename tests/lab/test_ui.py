"""The page draws what the library draws, and comes over http."""

import re
import socket
from collections.abc import Iterator

import gradio
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from gradio_client import Client
from PIL import Image
from typer.testing import CliRunner

import cmlora
from cmlora import CMLoRAError, sprites
from cmlora.cli import app
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


@pytest.fixture
def url(monkeypatch) -> Iterator[str]:
    """Served by the command, which does not wait here as it would in a shell."""
    launch, pages = gradio.Blocks.launch, []

    def serve(page: gradio.Blocks, **given):
        pages.append(page)
        return launch(page, **given, prevent_thread_lock=True, quiet=True)

    monkeypatch.setattr(gradio.Blocks, "launch", serve)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    loras = [f"--lora={sprites.lora_path(name)}={name}" for name in ("zebrin", "checker")]
    done = CliRunner().invoke(app, ["ui", "--port", str(port), *loras], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    yield f"http://127.0.0.1:{port}/"
    pages[0].close()


def test_a_picture_its_masks_and_who_dominated_come_over_http(url):
    client = Client(url, verbose=False)
    given = ["a zebrin creature, checker background", "", ["zebrin", "checker"], "routed", 2, 4.0, 2, 3, 1.0, 0.5]
    picture, masks, run, text = client.predict(*given, api_name="/draw")
    assert Image.open(picture).size == (64, 64)
    assert Image.open(masks).width > Image.open(picture).width
    assert Image.open(run).height > 300
    assert re.match(r"[\d.]+ s\n", text)
    assert "checker acts in" in text
    with pytest.raises(Exception, match="merge needs a LoRA: pick some"):
        client.predict("x", "", [], "merge", 2, 4.0, 2, 3, 1.0, 0.5, api_name="/draw")
