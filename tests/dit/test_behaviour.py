"""What users of these pipelines do, on accelerated ones: callbacks, interrupts, loops, hooks, limits, saved LoRAs."""

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cmlora
from cmlora.lab.bench.tiny import relative
from cmlora.lab.bench.tiny_transformers import KINDS, NAMES, draw, pipeline, transformer, with_loras
from tests.adapter.test_graphs import Captures
from tests.adapter.test_online import high_frequency_share
from tests.dit.peer import Peer
from tests.lora.test_behaviour import quantise

EXACT = 1e-5
CMLORA = {"method": "cmlora", "combine": "deviation", "partition": "offline", "cache_interval": 2}


@pytest.fixture(scope="module", params=KINDS)
def drawn(request):
    kind = request.param
    return kind, with_loras(pipeline(kind), kind)


@pytest.fixture(scope="module")
def flux():
    return with_loras(pipeline("flux"), "flux")


def snapshot(pipe, kind):
    net, image = pipe.transformer, draw(pipe, kind)
    return {
        "state": {k: v.clone() for k, v in net.state_dict().items()},
        "dicts": [(name, type(module), sorted(module.__dict__)) for name, module in net.named_modules()],
        "active": net.active_adapters(),
        "image": image,
    }


def test_restore_leaves_nothing_behind(drawn):
    kind, pipe = drawn
    before = snapshot(pipe, kind)
    for config in ({"method": "merge"}, CMLORA, {"method": "routed"}):
        cmlora.accelerate(pipe, **config)
        assert not torch.equal(draw(pipe, kind), before["image"])
        cmlora.restore(pipe)
        after = snapshot(pipe, kind)
        assert all(torch.equal(after["state"][k], v) for k, v in before["state"].items())
        assert after["state"].keys() == before["state"].keys()
        assert (after["dicts"], after["active"]) == (before["dicts"], before["active"])
        assert torch.equal(after["image"], before["image"])


@pytest.mark.parametrize("config", [CMLORA, {"method": "routed"}, {"method": "composite", "combine": "local"}])
def test_an_image_of_a_batch_is_the_image_that_it_is_alone(drawn, config):
    kind, pipe = drawn
    cmlora.accelerate(pipe, **config)
    kwargs = {"guided": kind != "flux"}
    made = {"images": 2, **kwargs}
    together, calls = draw(pipe, kind, **made), []
    given = _given(pipe, kind, made)
    for i in range(2):
        alone = {k: v[i : i + 1] if k.endswith(("embeds", "mask", "latents")) else v for k, v in given.items()}
        calls.append(pipe(**alone).images)
    cmlora.restore(pipe)
    assert relative(torch.cat(calls), together) < EXACT


def _given(pipe, kind, made):
    """What `draw` passes to the pipeline."""
    seen = {}

    def spy(**kwargs):
        seen.update(kwargs)
        raise StopIteration

    class Spy:
        transformer = pipe.transformer
        __call__ = staticmethod(spy)

    with pytest.raises(StopIteration):
        draw(Spy(), kind, **made)
    return seen


def test_the_online_gate_sees_latents_as_images(drawn):
    kind, pipe = drawn
    latents = []

    def record(pipe, step, timestep, kwargs):
        x = kwargs["latents"]
        x = pipe._unpack_latents(x, 128, 128, 8) if kind in ("flux", "qwen") else x
        latents.append((x[:, :, 0] if x.ndim == 5 else x).double().numpy())
        return {}

    cmlora.accelerate(pipe, partition="online", low=["background"], online_gate=0.4, cache_interval=2)
    draw(pipe, kind, steps=6, images=2, callback_on_step_end=record)
    steps = cmlora.summary(pipe).steps
    cmlora.restore(pipe)
    for i in (2, 4):
        assert steps[i].gate == pytest.approx([high_frequency_share(x) for x in latents[i - 1]], rel=1e-4)


def test_a_callback_changes_latents_and_an_interrupted_pipeline_draws_the_next_image(drawn):
    kind, pipe = drawn

    def louder(pipe, step, timestep, kwargs):
        return {"latents": kwargs["latents"] * 1.1}

    def stop(pipe, step, timestep, kwargs):
        pipe._interrupt = step == 1
        return {}

    with Peer(pipe, kind, NAMES[:3], "mean", interval=2):
        want = draw(pipe, kind, callback_on_step_end=louder)
    cmlora.accelerate(pipe, method="composite", combine="mean", cache_interval=2, cache_branch=(1, 1))
    assert relative(draw(pipe, kind, callback_on_step_end=louder), want) < EXACT
    before = draw(pipe, kind)
    draw(pipe, kind, callback_on_step_end=stop)
    assert len(cmlora.summary(pipe).steps) == 2
    assert torch.equal(draw(pipe, kind), before)
    cmlora.restore(pipe)


@pytest.mark.parametrize("config", [CMLORA, {"method": "routed"}])
def test_rows_in_parts_and_a_budget_give_the_same_picture(drawn, config):
    kind, pipe = drawn
    made = {"images": 2, "guided": kind in ("sd3", "z_image")}
    cmlora.accelerate(pipe, merge_weights=False, **config)
    want, peak = draw(pipe, kind, **made), cmlora.summary(pipe).peak_bytes
    least = 4 if made["guided"] else 2
    cmlora.accelerate(pipe, merge_weights=False, max_rows=least, **config)
    assert relative(draw(pipe, kind, **made), want) < 1e-6
    assert cmlora.summary(pipe).strategy.at_once == 1
    less = cmlora.summary(pipe).peak_bytes
    assert less < peak
    cmlora.accelerate(pipe, memory_budget=(less + peak) // 2, **config)
    assert relative(draw(pipe, kind, **made), want) < 1e-6
    cmlora.accelerate(pipe, memory_budget=1000, **config)
    with pytest.raises(cmlora.RunError, match="memory_budget must be at least"):
        draw(pipe, kind, **made)
    cmlora.restore(pipe)


def test_loras_are_saved_and_loaded_beside_acceleration(drawn, tmp_path):
    kind, pipe = drawn
    cmlora.accelerate(pipe, **CMLORA)
    want = draw(pipe, kind)
    for name in NAMES[:3]:
        pipe.transformer.save_lora_adapter(tmp_path / name, adapter_name=name)
    other, file = pipeline(kind), "pytorch_lora_weights.safetensors"
    for name in NAMES[:3]:
        state = load_file(tmp_path / name / file)
        other.transformer.load_lora_adapter(state, prefix=None, adapter_name=name)
    other.transformer.set_adapters(list(NAMES[:3]))
    cmlora.accelerate(other, **CMLORA)
    assert torch.equal(draw(other, kind), want)
    other.transformer.set_adapters(list(NAMES[:3]), [0.5, 1.0, 1.0])
    assert not torch.equal(draw(other, kind), want), "a weight that was changed is picked up"
    cmlora.restore(pipe)


def test_the_adapters_scale_of_a_call(drawn):
    kind, pipe = drawn
    kwargs = {"attention_kwargs" if kind == "qwen" else "joint_attention_kwargs": {"scale": 0.3}}
    want = draw(pipe, kind, **kwargs)
    with cmlora.accelerated(pipe, method="merge", cache_interval=1):
        assert relative(draw(pipe, kind, **kwargs), want) < EXACT


def test_a_user_s_hook_in_a_block_sees_each_prediction_and_changes_it(drawn):
    kind, pipe = drawn
    block = pipe.transformer.layers[1] if kind == "z_image" else pipe.transformer.transformer_blocks[1]

    def louder(module, args, kwargs, out):
        return out * 1.05 if torch.is_tensor(out) else tuple(o * 1.05 for o in out)

    handle = block.register_forward_hook(louder, with_kwargs=True)
    try:
        with Peer(pipe, kind, NAMES[:3], "mean"):
            want = draw(pipe, kind)
        with cmlora.accelerated(pipe, method="composite", combine="mean", cache_interval=1):
            assert relative(draw(pipe, kind), want) < EXACT
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_captured_steps_follow_prompts_and_sizes_from_image_to_image(kind):
    pipe = with_loras(pipeline(kind), kind, edges=True)
    found = []
    for captures in (None, Captures()):
        cmlora.accelerate(pipe, merge_weights=False, cuda_graphs=captures is not None, **CMLORA)
        if captures is not None:
            pipe.transformer.forward.cmlora.denoiser.spending.capture = captures
        found.append([draw(pipe, kind, steps=5, seed=seed, images=images) for seed, images in ((1, 1), (2, 1), (3, 2))])
    assert captures.replayed
    assert all(map(torch.equal, *found))


def own_loop(pipe, kind, announce):
    """A loop of the user's own on Flux: sigmas by hand, the model called with t / 1000."""
    generator, net = torch.Generator().manual_seed(2), pipe.transformer
    x, text = torch.randn(1, 64, 16, generator=generator), torch.randn(1, 7, 24, generator=generator)
    ids = torch.zeros(8, 8, 3)
    ids[..., 1], ids[..., 2] = torch.arange(8)[:, None], torch.arange(8)
    given = {"img_ids": ids.reshape(64, 3), "txt_ids": torch.zeros(7, 3), "encoder_hidden_states": text}
    given |= {"pooled_projections": torch.randn(1, 20, generator=generator), "guidance": torch.tensor([3.5])}
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 0.25, 4))
    for t in pipe.scheduler.timesteps:
        noise = net(hidden_states=x, timestep=t.expand(1) / 1000, **given, return_dict=False)[0]
        x = pipe.scheduler.step(noise, t, x, return_dict=False)[0] if announce else x - 0.2 * noise
    return x


@pytest.mark.parametrize("announce", [True, False], ids=["scheduler.step", "no scheduler.step"])
def test_a_loop_of_one_s_own_is_followed(flux, announce):
    with Peer(flux, "flux", NAMES[:3], "mean", interval=2):
        want = own_loop(flux, "flux", announce)
    cmlora.accelerate(flux, method="composite", combine="mean", cache_interval=2, cache_branch=(1, 1))
    assert relative(own_loop(flux, "flux", announce), want) < EXACT
    assert len(cmlora.summary(flux).steps) == 4
    cmlora.accelerate(flux, method="routed")
    own_loop(flux, "flux", announce)
    assert next(iter(cmlora.summary(flux).masks.values())).shape == (1, 16, 16)
    cmlora.restore(flux)


REFUSED = {
    "a cache of diffusers'": lambda net: net.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1)),
    "fused": lambda net: net.fuse_qkv_projections(),
    "forward was replaced": lambda net: setattr(net, "forward", lambda *a, **k: None),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [("a cache of diffusers'", "disable_cache"), ("fused", "unfuse"), ("forward was replaced", "was replaced")],
)
def test_what_would_be_bypassed_is_refused(change, message):
    pipe = with_loras(pipeline("flux"), "flux")
    REFUSED[change](pipe.transformer)
    with pytest.raises(cmlora.UnsupportedModelError, match=message):
        cmlora.accelerate(pipe)


def test_other_transformers_are_refused_by_name_with_what_is_supported():
    class Pipe:
        transformer = diffusers.PixArtTransformer2DModel(num_layers=1, sample_size=8, num_attention_heads=1)

    with pytest.raises(cmlora.UnsupportedModelError, match=r"PixArtTransformer2DModel.*FluxPipeline.*ZImagePipeline"):
        cmlora.accelerate(Pipe())


def test_a_branch_that_leaves_nothing_to_cache_is_refused(flux):
    with pytest.raises(cmlora.ConfigError, match=r"cache_branch must be the blocks \(first, last\) of 5"):
        cmlora.accelerate(flux, cache_branch=(3, 2))


def test_low_precision_draws_what_a_loop_in_it_draws(drawn):
    kind, _ = drawn
    pipe = with_loras(pipeline(kind, transformer(kind)), kind)
    with Peer(pipe, kind, NAMES[:3], "mean"):
        exact = draw(pipe, kind)
    pipe.transformer.to(torch.bfloat16)
    with cmlora.accelerated(pipe, method="composite", combine="mean", cache_interval=1):
        assert relative(draw(pipe, kind).float(), exact) < 0.05


@pytest.mark.parametrize("method", ["mean", "routed"])
def test_a_quantised_base_runs_beside_the_update_of_its_adapters(method):
    pipe = with_loras(pipeline("flux"), "flux")
    for block in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        for layer in (block.attn.to_q, getattr(block, "proj_out", None)):
            if layer is not None:
                quantise(layer.base_layer)
    with Peer(pipe, "flux", NAMES[:3], method):
        want = draw(pipe, "flux")
    config = {"method": "routed"} if method == "routed" else {"method": "composite", "combine": "mean"}
    with cmlora.accelerated(pipe, cache_interval=1, **config):
        assert relative(draw(pipe, "flux"), want) < EXACT
