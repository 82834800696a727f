"""Published LoRA files, on a UNet with SD1.5's names and widths and random weights."""

import pytest
import torch
from diffusers import UNet2DConditionModel

import cmlora
from cmlora.lab.bench.tiny import call, embeddings, sd_pipe
from tests.conftest import shared

GOOD = ("sd15_attn_rank4_a", "sd15_attn_rank4_b", "sd15_attn_rank4_c_old_processor_keys")
BAD = {
    "pokemon_style_unprefixed": "changed no layer of the UNet.*'unet.' \\+ k",
    "disney_rank1_indexed": "Invalid LoRA checkpoint",
    "sd21_width1024_bf16": "size mismatch",
    "bad_keys": "lora_unet_unet",
    "sdxl_truncated": "Unable to load weights",
}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(cross_attention_dim=768, sample_size=8).eval()


def draw(pipe):
    return call(pipe, 2, guidance=1, given=embeddings(pipe, size=(8, 8)))


@pytest.fixture(scope="module")
def base(unet):
    with torch.no_grad():
        return draw(sd_pipe(unet))


def test_published_files_compose_and_leave_no_trace(unet, base):
    folder = shared("loras")
    pipe = sd_pipe(unet)
    for name in GOOD:
        pipe.load_lora_weights(folder / f"{name}.safetensors", adapter_name=name)
    cmlora.accelerate(pipe, cache_interval=2)
    image = draw(pipe)
    assert torch.isfinite(image).all()
    assert not torch.allclose(image, base)
    assert cmlora.summary(pipe).adapters == GOOD
    cmlora.restore(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_does_not_fit_is_refused_and_the_pipe_stays_usable(unet, base, name):
    folder = shared("loras")
    pipe = sd_pipe(unet)
    pipe.load_lora_weights(folder / f"{GOOD[0]}.safetensors", adapter_name="good")
    # where diffusers itself refuses the file, its message is the clear error; where it only warns, ours is
    with pytest.raises((cmlora.AdapterError, ValueError, RuntimeError, KeyError, OSError), match=BAD[name]):
        pipe.load_lora_weights(folder / f"{name}.safetensors", adapter_name="bad")
        cmlora.accelerate(pipe, method="composite", adapters=["good", "bad"])
    cmlora.restore(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), base)


def test_rekeying_as_the_error_says_makes_an_unprefixed_file_work(unet):
    from safetensors.torch import load_file

    state = load_file(shared("loras") / "pokemon_style_unprefixed.safetensors")
    pipe = sd_pipe(unet)
    pipe.load_lora_weights({"unet." + k: v for k, v in state.items()}, adapter_name="pokemon")
    cmlora.accelerate(pipe, method="merge")
    assert cmlora.summary(pipe).adapters == ("pokemon",)
    cmlora.restore(pipe)
    pipe.unload_lora_weights()
