"""Wrong input: an error that says what was expected, what came and what to do, and a pipeline that still works."""

from __future__ import annotations

import re
from types import SimpleNamespace

import peft
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, UNet2DConditionModel
from diffusers.callbacks import SDCFGCutoffCallback

import cmlora
from cmlora.lab.bench.tiny import DEVICE, add_lora, call, embeddings, relative, sd_pipe
from tests.adapter.loop import EXACT, loop, refused, small_unet, with_loras

SEVERAL = ("composite", "cmlora")


@pytest.fixture
def sd():
    return with_loras(sd_pipe(small_unet()))


# --- the configuration


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("method", ["mean", None, 3]),
        ("partition", ["on"]),
        ("combine", ["sum"]),
        ("late_stage", ["high"]),
        ("backend", ["cuda", None]),
        ("adapters", ["a", ["a", "a"], [1], 5]),
        ("high", ["a", ["a", "a"], None]),
        ("low", ["a", [2]]),
        ("cache_interval", [0, -1, 1.5, True, "often", None]),
        ("cache_branch", [(0,), (0, -1), "01", (0, 1, 2), (0.0, 1), 1]),
        ("max_cache_age", [0, -2, 2.5]),
        ("switch_step", [0, "5"]),
        ("max_rows", [0, 1.5, True]),
        ("cuda_graphs", [1, "always"]),
        ("merge_weights", [2, "auto"]),
        ("winograd", [2, "auto"]),
        ("memory_budget", [0, 1e9, "6GB"]),
        ("quadratic_interval", [0, 2.0]),
        ("quadratic_center", [-0.1, 1.1]),
        ("quadratic_power", [1, 1e9, float("inf")]),
        ("dominant_weight", [-1, float("nan"), float("inf"), "2"]),
        ("dominant_decay", [-0.1, 1.1, float("nan")]),
        ("dominant_floor", [-0.1, float("inf")]),
        ("offline_boundary", [-0.1, 1.01]),
        ("online_gate", [-0.1, 1.01, True]),
        ("online_cutoff", [-0.1, 1]),
        ("async_switch", [0, 1.1]),
    ],
)
def test_a_field_out_of_range_names_itself(field, values):
    for value in values:
        came = re.escape(repr(value))
        with pytest.raises(cmlora.ConfigError, match=rf"^{field} must .*got ({came}|a more than once)$"):
            cmlora.CMLoRAConfig(**{field: value})


def test_contradictions_and_unknown_fields(sd):
    with pytest.raises(cmlora.ConfigError, match=r"high and low must not share .* a "):
        cmlora.CMLoRAConfig(high=["a"], low=["a"])
    refused(sd, cmlora.ConfigError, "interval is no field", "cache_interval", interval=2)
    refused(sd, cmlora.ConfigError, "config must be a CMLoRAConfig", "dict", config={"method": "merge"})
    refused(sd, cmlora.ConfigError, "high names z", "a, b", high=["z"])
    refused(sd, cmlora.ConfigError, "cache_branch must", "(1, 0..0)", "(7, 0)", cache_branch=(7, 0))


def test_interval_longer_than_the_run_refreshes_once(sd):
    want = loop(sd, lambda p: call(p, 3), interval=100)
    with cmlora.accelerated(sd, method="composite", combine="mean", cache_interval=100):
        assert relative(call(sd, 3), want) < EXACT
        assert [s.rows_full for s in cmlora.summary(sd).steps] == [4, 0, 0]


# --- adapters at the time of accelerate


def test_unknown_adapter(sd):
    refused(sd, cmlora.AdapterError, "'zebra'", "a, b", "not loaded", adapters=["a", "zebra"])


@pytest.mark.parametrize("method", SEVERAL)
def test_one_adapter_where_two_are_needed(sd, method):
    refused(sd, cmlora.AdapterError, method, "at least two", "got a", "set_adapters", method=method, adapters=["a"])


def test_no_adapter_at_all():
    refused(sd_pipe(small_unet()), cmlora.AdapterError, "no LoRA layer", "load_lora_weights")


def test_fused(sd):
    sd.fuse_lora()
    refused(sd, cmlora.AdapterError, "fused", "unfuse_lora")


def test_disabled(sd):
    sd.disable_lora()
    refused(sd, cmlora.AdapterError, "disabled", "enable_lora", method="composite")


def test_dora(sd):
    sd.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], use_dora=True), "d")
    refused(sd, cmlora.AdapterError, "'d'", "DoRA", adapters=["a", "d"])


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig])
@pytest.mark.parametrize("method", ["composite", "no_lora"])
def test_a_tuner_that_is_no_lora(kind, method):
    pipe = sd_pipe(small_unet())
    pipe.unet.add_adapter(kind(r=2, target_modules=["time_emb_proj"], init_weights=False), "h")
    with_loras_on_attention(pipe)
    pipe.unet.set_adapters(["a", "b", "h"])
    refused(pipe, cmlora.AdapterError, "'h'", "only LoRA", method=method, adapters=["a", "b"])


def with_loras_on_attention(pipe):
    for seed, name in enumerate("ab"):
        add_lora(pipe.unet, name, seed=seed)
    return pipe


# --- pipelines and UNets


def test_a_pipeline_of_another_model():
    flux = SimpleNamespace(transformer=torch.nn.Linear(2, 2))
    with pytest.raises(
        cmlora.UnsupportedModelError, match=r"transformer is a Linear, which no.*StableDiffusionXLPipeline"
    ):
        cmlora.accelerate(flux)
    assert cmlora.restore(flux) is flux
    with pytest.raises(cmlora.CMLoRAError, match="not accelerated"):
        cmlora.summary(flux)


def test_kandinsky_blocks():
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    with pytest.raises(
        cmlora.UnsupportedModelError, match=r"ResnetDownsampleBlock2D.*supported are CrossAttnDownBlock2D"
    ):
        cmlora.accelerate(SimpleNamespace(unet=unet))
    assert "forward" not in unet.__dict__


def test_foreign_unet_and_fused_projections(sd):
    with pytest.raises(cmlora.UnsupportedModelError, match="unet is a Linear, which no model family of cmlora can run"):
        cmlora.accelerate(SimpleNamespace(unet=torch.nn.Linear(2, 2)))
    sd.fuse_qkv_projections(vae=False)
    refused(sd, cmlora.UnsupportedModelError, "unfuse_qkv_projections")


def test_attention_that_changes_after_accelerate(sd):
    want = loop(sd, lambda p: call(p, 2))
    cmlora.accelerate(sd, method="composite", combine="mean")
    sd.fuse_qkv_projections(vae=False)
    with pytest.raises(cmlora.UnsupportedModelError, match="unfuse_qkv_projections"):
        call(sd, 2)
    sd.unfuse_qkv_projections(vae=False)
    assert relative(call(sd, 2), want) < EXACT


def test_perturbed_attention_guidance():
    """Its processors take the batch apart, and the LoRA layers need not notice."""
    pipe = sd_pipe(small_unet(), kind=StableDiffusionPAGPipeline)
    for seed, name in enumerate("ab"):
        add_lora(pipe.unet, name, pattern=r"net\.2$", seed=seed)
    own = dict(pipe.unet.attn_processors)
    cmlora.accelerate(pipe, method="composite", combine="mean")
    with pytest.raises(cmlora.UnsupportedModelError, match=r"PAG.*without perturbed-attention"):
        call(pipe, 2, pag_scale=3.0)
    pipe.unet.set_attn_processor(own)  # diffusers leaves its own behind in a call that fails
    assert call(pipe, 2, pag_scale=0.0).isfinite().all()


# --- during a run

SETTINGS_APART = (
    {"method": "composite", "combine": "mean"},
    {"partition": "online", "online_gate": 0.9, "low": ["b"], "combine": "deviation"},
    {"partition": "async", "combine": "mean"},
)


def test_timestep_from_elsewhere(sd):
    given, want = embeddings(sd), loop(sd, lambda p: call(p, 2))
    cmlora.accelerate(sd, method="composite", combine="mean")
    sd.scheduler.set_timesteps(4, device=DEVICE)
    for timestep in (torch.tensor(981), 981, sd.scheduler.timesteps[0].clone()):
        with pytest.raises(cmlora.RunError, match=r"element of pipe\.scheduler\.timesteps.*set_timesteps"):
            sd.unet(given["latents"], timestep, given["prompt_embeds"])
    assert relative(call(sd, 2), want) < EXACT


def halves_apart(pipe, steps=4):
    """A loop of one's own that calls the UNet once per guidance half."""
    given = embeddings(pipe)
    pipe.scheduler.set_timesteps(steps)
    x = given["latents"]
    for t in pipe.scheduler.timesteps:
        u, c = (pipe.unet(x, t, given[f"{side}prompt_embeds"]).sample for side in ("negative_", ""))
        x = pipe.scheduler.step(u + 7.5 * (c - u), t, x).prev_sample
    return x


@pytest.mark.parametrize("settings", SETTINGS_APART, ids=lambda s: "-".join(map(str, s.values())))
def test_unet_called_once_per_guidance_half_has_a_cache_per_half(sd, settings):
    with cmlora.accelerated(sd, cache_interval=2, **settings):
        together = call(sd, 4)
        assert relative(halves_apart(sd), together) < EXACT
        told = cmlora.summary(sd)
        assert len(told.steps) == 4
        rows = 2 * (3 if settings.get("combine") == "deviation" else 2)
        assert {step.rows_full + step.rows_shallow for step in told.steps} == {rows}


def test_two_calls_of_one_timestep_that_are_no_halves(sd):
    given, want = embeddings(sd), loop(sd, lambda p: call(p, 2))
    cmlora.accelerate(sd, method="composite", combine="mean")
    sd.scheduler.set_timesteps(4)
    t, x = sd.scheduler.timesteps[0], given["latents"]
    sd.unet(x, t, given["prompt_embeds"])
    with pytest.raises(cmlora.RunError, match="twice for one timestep with the same conditions"):
        sd.unet(x, t, given["prompt_embeds"])
    sd.unet(x, t, given["prompt_embeds"])
    with pytest.raises(cmlora.RunError, match=r"different latents: these are no guidance halves"):
        sd.unet(x + 1, t, given["negative_prompt_embeds"])
    assert relative(call(sd, 2), want) < EXACT


def test_nan_goes_through_as_in_the_plain_pipeline(sd):
    given = embeddings(sd, 2)
    given["latents"][0, 0, 0, 0] = torch.nan
    want = loop(sd, lambda p: call(p, 3, given=given))
    for method in SEVERAL:
        with cmlora.accelerated(sd, method=method, low=["b"]):
            got = call(sd, 3, given=given)
        assert torch.equal(got.isnan().all((1, 2, 3)), want.isnan().all((1, 2, 3)))  # one image's NaN stays its own
        assert not got[1].isnan().any()


def cut_off(pipe, i, t, tensors):
    """What diffusers' cut-off callback does, for several images."""
    if i == 1:
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
        pipe._guidance_scale = 0.0
    return tensors


@pytest.mark.parametrize("dominance", [None, 1.5])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_guidance_cut_off_in_mid_run(sd, dominance, interval):
    given = embeddings(sd, 2)
    hook = {"callback_on_step_end": cut_off, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    want = loop(sd, lambda p: call(p, 5, given=given, **hook), interval, dominance=dominance)
    settings = {"method": "composite"}
    if dominance:
        settings = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0.0}
    with cmlora.accelerated(sd, combine="mean", cache_interval=interval, **settings):
        assert relative(call(sd, 5, given=given, **hook), want) < EXACT
        assert len(cmlora.summary(sd).steps) == 5


def test_diffusers_own_cut_off_with_the_online_gate(sd):
    hook = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)}
    hook["callback_on_step_end_tensor_inputs"] = ["prompt_embeds"]
    with cmlora.accelerated(sd, partition="online", low=["b"], cache_interval=2):
        assert call(sd, 5, **hook).isfinite().all()
        assert [len(s.gate) for s in cmlora.summary(sd).steps] == [0, 1, 1, 1, 1]


def test_a_batch_that_changes_otherwise(sd):
    given, want = embeddings(sd), loop(sd, lambda p: call(p, 2))
    cmlora.accelerate(sd, method="composite", combine="mean")
    sd.scheduler.set_timesteps(4, device=DEVICE)
    first, second, *_ = sd.scheduler.timesteps
    x, context = given["latents"], given["prompt_embeds"]
    for other in (x.repeat(3, 1, 1, 1), x[..., :8]):
        sd.unet(x, first, context)
        with pytest.raises(cmlora.RunError, match=r"batch changed from \(1, 4, 16, 16\) to"):
            sd.unet(other, second, context.repeat(len(other), 1, 1))
    assert relative(call(sd, 2), want) < EXACT
