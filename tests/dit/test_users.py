"""What users put around a transformer or into its classes: drawn as the plain pipeline draws it, or refused."""

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

import cmlora
from cmlora.lab.bench.tiny import add_lora, relative, sd_pipe
from cmlora.lab.bench.tiny_transformers import NAMES, draw, pipeline, with_loras
from cmlora.models.dit.flux import FluxFamily
from tests.dit.peer import Peer

EXACT = 1e-5


def louder(module, args, kwargs):
    """A hook before the model: the first guidance half, or image, gets other latents than the second."""
    if args:
        first, *others = args[0]
        return ([first * 1.5, *others], *args[1:]), kwargs
    latents = kwargs["hidden_states"].clone()
    latents[0] *= 1.5
    return args, kwargs | {"hidden_states": latents}


@pytest.mark.parametrize("kind", ["sd3", "z_image"])
def test_a_hook_before_the_model_may_part_the_guidance_halves(kind):
    pipe = with_loras(pipeline(kind), kind)
    pipe.transformer.register_forward_pre_hook(louder, with_kwargs=True)
    with Peer(pipe, kind, NAMES[:3], "mean"):
        want = draw(pipe, kind, guided=True)
    with cmlora.accelerated(pipe, method="composite", combine="mean", cache_interval=1):
        assert relative(draw(pipe, kind, guided=True), want) < EXACT


@pytest.mark.parametrize("kind", [FluxTransformer2DModel, UNet2DConditionModel])
def test_a_class_whose_forward_was_replaced_is_refused(kind, monkeypatch):
    """As recipes for caches do, for all pipelines at once."""
    if kind is UNet2DConditionModel:
        pipe = sd_pipe()
        add_lora(pipe.unet, "one")
    else:
        pipe = with_loras(pipeline("flux"), "flux")
    forward = kind.forward

    def cached(self, *args, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", cached)
    with pytest.raises(cmlora.UnsupportedModelError, match="would be bypassed"):
        cmlora.accelerate(pipe)


def test_an_attention_whose_class_was_changed_is_called(monkeypatch):
    attend = FluxAttnProcessor.__call__

    def sharper(self, attn, hidden_states, *args, **kwargs):
        return attend(self, attn, hidden_states * 1.1, *args, **kwargs)

    pipe = with_loras(pipeline("flux"), "flux")
    before = draw(pipe, "flux")
    monkeypatch.setattr(FluxAttnProcessor, "__call__", sharper)
    want = draw(pipe, "flux")
    assert relative(before, want) > 1e-4
    with cmlora.accelerated(pipe, method="merge", cache_interval=1):
        assert relative(draw(pipe, "flux"), want) < EXACT


@pytest.mark.parametrize("rule", ["mean", "routed"])
def test_one_prompt_for_two_images(rule):
    """Flux takes embeddings as they are given, and its blocks spread them over the latents."""
    pipe = with_loras(pipeline("flux"), "flux")
    latents = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(7))
    given = {"latents": latents, "num_images_per_prompt": 2}
    with Peer(pipe, "flux", NAMES[:3], rule):
        want = draw(pipe, "flux", **given)
    config = {"method": "routed"} if rule == "routed" else {"method": "composite", "combine": "mean"}
    with cmlora.accelerated(pipe, cache_interval=1, **config):
        assert relative(draw(pipe, "flux", **given), want) < EXACT


def test_diffusers_caches_put_on_by_their_function_are_refused():
    pipe = with_loras(pipeline("flux"), "flux")
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(cmlora.UnsupportedModelError, match=r"hook 'fbc_leader_block_hook' keeps something"):
        cmlora.accelerate(pipe)


def test_a_reference_image_that_fills_the_places_up_is_not_taken_for_one_picture():
    """2 x 4 places and a reference of 4 x 2: as many tokens as 4 x 4 places have."""

    def places(image, height, width):
        ids = torch.zeros(height, width, 3)
        ids[..., 0], ids[..., 1], ids[..., 2] = image, torch.arange(height)[:, None], torch.arange(width)
        return ids.reshape(-1, 3)

    family = FluxFamily()
    assert family._size(places(0, 4, 4), 16) == (4, 4)
    with pytest.raises(cmlora.RunError, match=r"2 x 4 x 4 places for 16 tokens: reference images"):
        family._size(torch.cat([places(0, 2, 4), places(1, 4, 2)]), 16)


def test_qwen_s_editing_calls_are_refused_by_name():
    pipe = with_loras(pipeline("qwen"), "qwen")
    with (
        cmlora.accelerated(pipe, method="merge"),
        pytest.raises(cmlora.RunError, match=r"reference images beside the latents.*QwenImageEditPipeline"),
    ):
        pipe.transformer(hidden_states=torch.randn(1, 128, 16), img_shapes=[[(1, 8, 8), (1, 8, 8)]])
