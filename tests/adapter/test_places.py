"""Composition by place: masks, regions, shared adapters and prompts compute what one plain PEFT call per adapter does.

The peer (`lab/bench/places.py`) runs diffusers' own UNet forward, with PEFT's `set_adapters` and a hook per mask.
"""

from __future__ import annotations

import diffusers
import pytest
import torch
from peft import LoraConfig
from PIL import Image

import cmlora
from cmlora import sprites
from cmlora.lab.bench.places import PlacesLoop
from cmlora.lab.bench.tiny import DEVICE, SMALL, add_lora, call, embeddings, relative, sd_pipe, sd_unet, sdxl_pipe
from cmlora.lab.bench.tiny import EVERYTHING as LAYERS
from tests.adapter.loop import EXACT, small_unet
from tests.adapter.test_batch import KINDS
from tests.adapter.test_graphs import Captures
from tests.adapter.test_pipelines import controlnet
from tests.adapter.test_restore import assert_same, snapshot

NAMES, SHARED = ("character", "style", "background"), "quality"
WEIGHTS = {"character": 0.8, "style": 1.2, "background": 1.0, SHARED: 0.6}
STAGE = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0.0, "high": NAMES}


def with_loras(pipe):
    kinds = (LAYERS, KINDS[0][2], LAYERS + "|(conv_in|linear_1)$", LAYERS)
    for i, (name, pattern) in enumerate(zip(WEIGHTS, kinds, strict=True)):
        add_lora(pipe.unet, name, rank=2 + 3 * i, pattern=pattern, seed=i + 1)
    return pipe


@pytest.fixture(scope="module")
def small():
    return with_loras(sd_pipe(small_unet()))


@pytest.fixture(scope="module")
def sdxl():
    return with_loras(sdxl_pipe())


def activate(pipe, names=NAMES):
    pipe.set_adapters([*names], [WEIGHTS[name] for name in names])


def image(pipe, run=call, names=NAMES, **config):
    """What `run` draws with ours."""
    activate(pipe, names)
    with cmlora.accelerated(pipe, **config):
        return run(pipe)


def peers(pipe, rule, run=call, names=NAMES, shared=(), **how):
    weights = [WEIGHTS[name] for name in names]
    with PlacesLoop(pipe.unet, names, rule, weights=weights, shared=shared, **how) as loop:
        loop.weights |= {name: WEIGHTS[name] for name in shared}
        return run(pipe)


def equal(pipe, rule, config, run=call, names=NAMES, shared=(), **how):
    """Ours against the peer, which is not what the adapters draw without masks."""
    want = peers(pipe, rule, run, names, shared, **how)
    everyone = (*names, *shared)
    assert relative(image(pipe, run, everyone, shared=shared, **config), want) < EXACT
    return want


def routed(**config):
    return {"method": "routed", "cache_interval": 1, **config}


def local(**config):
    return {"method": "composite", "combine": "local", "cache_interval": 1, **config}


@pytest.mark.parametrize("guidance", [1.0, 7.5])
@pytest.mark.parametrize("size", [(16, 16), (13, 17)], ids=str)
def test_routed(small, size, guidance):
    given = embeddings(small, 2, size=size)
    run = lambda pipe: call(pipe, 4, guidance, given)  # noqa: E731
    want = equal(small, "routed", routed(), run, halves=2 if guidance > 1 else 1)
    assert relative(image(small, run, method="merge", cache_interval=1), want) > 100 * EXACT, "masks do matter"


@pytest.mark.parametrize("limits", [{"max_rows": 2}, {"max_rows": 6}, {"winograd": True}], ids=str)
def test_routed_with_a_cache_and_few_rows(small, limits):
    """The feature of every prediction is its own, and the merged one goes on alone."""
    run = lambda pipe: call(pipe, 5)  # noqa: E731
    equal(small, "routed", routed(cache_interval=2, mask_steps=3, **limits), run, interval=2, mask_steps=3)


def test_routed_within_a_budget(small):
    names = NAMES[:2]
    activate(small, names)
    with cmlora.accelerated(small, **routed(cache_interval=2)):
        call(small, 3)
        budget = int(0.9 * cmlora.summary(small).peak_bytes)
    config = routed(cache_interval=2, memory_budget=budget)
    equal(small, "routed", config, lambda pipe: call(pipe, 3), names, interval=2)


@pytest.mark.parametrize("model", ["small", "sdxl"])
def test_less_of_the_adapters_where_there_are_no_places(request, model):
    """The prompt's keys and values and the time step's embedding, of the unmasked first step, too."""
    pipe = request.getfixturevalue(model)
    want = equal(pipe, "routed", routed(cache_interval=2, mask_text=0.4), interval=2, mask_text=0.4)
    assert relative(image(pipe, **routed(cache_interval=2)), want) > 100 * EXACT


def test_fields_of_the_masks(small):
    fields = {"mask_steps": 1, "mask_temperature": 0.2, "mask_blur": 5}
    equal(small, "routed", routed(**fields), mask_steps=1, temperature=0.2, blur=5)
    equal(small, "local", local(mask_temperature=0.7, mask_blur=1), temperature=0.7, blur=1)


def test_routed_on_sdxl(sdxl):
    given = embeddings(sdxl, 2, size=(13, 10))
    config = routed(cache_interval=2, max_rows=8)
    equal(sdxl, "routed", config, lambda pipe: call(pipe, 4, given=given), interval=2)


def test_routed_in_img2img_and_with_a_controlnet():
    unet = small_unet()
    kind = diffusers.StableDiffusionControlNetImg2ImgPipeline
    pipe = with_loras(sd_pipe(unet, kind=kind, controlnet=controlnet(unet)))
    given = embeddings(pipe)
    del given["latents"]
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def run(pipe):
        how = {"image": picture, "control_image": picture, "strength": 0.6, "num_inference_steps": 7}
        return pipe(**given, **how, generator=torch.Generator().manual_seed(0), output_type="latent").images

    equal(pipe, "routed", routed(cache_interval=2), run, interval=2)
    activate(pipe)
    with cmlora.accelerated(pipe, **routed()):
        run(pipe)
        assert len(cmlora.summary(pipe).steps) == 4


@pytest.mark.parametrize("config", [routed(cache_interval=2), local(cache_interval=2)], ids=lambda c: c["method"])
def test_captured_steps_with_masks_equal_eager_ones(small, config):
    """Masks and prompts change from run to run and must not be baked in."""
    activate(small)
    if config["method"] == "composite":
        config["prompts"] = {"style": torch.randn(1, 77, 24, generator=torch.Generator().manual_seed(7)).to(DEVICE)}
    found = []
    for graphs in (False, True):
        with cmlora.accelerated(small, cuda_graphs=graphs, **config):
            captures = small.unet.forward.cmlora.denoiser.spending.capture = Captures()
            found.append([call(small, 6, given=embeddings(small, seed=seed)) for seed in (3, 4, 5)])
    assert captures.replayed > 3
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_local(small, guidance):
    given = embeddings(small, 2, size=(13, 17))
    run = lambda pipe: call(pipe, 3, guidance, given)  # noqa: E731
    halves = 2 if guidance > 1 else 1
    want = equal(small, "local", local(), run, halves=halves)
    plain = image(small, run, method="composite", combine="deviation", cache_interval=1)
    assert relative(plain, want) > 100 * EXACT


def test_local_with_dominance_and_a_cache(small):
    config = local(method="cmlora", cache_interval=2, **STAGE)
    equal(small, "local", config, lambda pipe: call(pipe, 5), interval=2, dominance=2.5, follow=True)


HALF = torch.zeros(24, 24)
HALF[:, :10] = 1
REGIONS = {"character": HALF, "background": 0.75 * (1 - HALF)}


@pytest.mark.parametrize(
    ("rule", "config"),
    [
        ("mean", {"method": "composite", "combine": "mean"}),
        ("deviation", {"method": "composite", "combine": "deviation"}),
        ("local", {"method": "composite", "combine": "local"}),
        ("routed", {"method": "routed"}),
        ("mean", {"method": "cmlora", "combine": "mean", **STAGE}),
    ],
    ids=lambda x: x if isinstance(x, str) else x["method"],
)
def test_regions(small, rule, config):
    """Of another size than the latents; the style has none and acts everywhere."""
    given = embeddings(small, 2, size=(13, 17))
    run = lambda pipe: call(pipe, 3, given=given)  # noqa: E731
    dominance = {"dominance": 2.5} if config["method"] == "cmlora" else {}
    equal(small, rule, {"cache_interval": 1, "regions": REGIONS, **config}, run, regions=REGIONS, **dominance)


def test_regions_where_nobody_acts_are_the_plain_mean(small):
    nowhere = dict.fromkeys(NAMES, torch.zeros(4, 4))
    mean = {"method": "composite", "combine": "mean"}
    assert relative(image(small, regions=nowhere, **mean), image(small, **mean)) < EXACT


def test_kinds_of_regions(small):
    levels = (REGIONS["background"] * 255).round().to(torch.uint8)
    kinds = (levels, levels.numpy(), Image.fromarray(levels.numpy()), levels[None, None].double() / 255)
    drawn = [image(small, **routed(regions={"background": kind})) for kind in (*kinds, (levels / 255).numpy())]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (routed(regions={"nobody": HALF}), "regions names nobody, but the adapters are character, style, background"),
        (routed(regions={"style": HALF[0]}), r"regions\['style'\] must be \[height, width\], got \(24,\)"),
        (routed(regions={"style": 2 * HALF}), r"regions\['style'\] must lie in 0..1, got 0 to 2"),
        (routed(regions={"style": HALF / 0}), r"regions\['style'\] must lie in 0..1"),
        (routed(regions={SHARED: HALF}, shared=(SHARED,)), "regions must not name shared adapters"),
        (routed(prompts={"style": "x"}), "prompts must go with method='composite' or 'cmlora', got 'routed'"),
        (local(prompts={"nobody": "x"}), "prompts names nobody, but the adapters are"),
        (local(prompts={"style": "x"}), r"prompts\['style'\] is text, but the pipeline has no tokenizer"),
        (local(prompts={"style": 3}), r"prompts\['style'\] must be text, embeddings .*, got int"),
        (local(prompts={"style": torch.zeros(1, 7, 24)}), r"prompts must be encoder_hidden_states \[1 or 1, 77, 24\]"),
        (local(prompts={"style": torch.zeros(3, 77, 24)}), r"got \(3, 77, 24\)"),
        ({"method": "cmlora", "shared": ("style",), "high": ("style",)}, "high must not name shared adapters"),
        (routed(shared=("nobody",)), "nobody"),
        (routed(merge_weights=True), "merge_weights must not be True with method='routed'"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x[:24],
)
def test_errors_name_the_field(small, config, message):
    with pytest.raises(cmlora.CMLoRAError, match=message):
        image(small, names=(*NAMES, SHARED), **({"adapters": NAMES} | config))


def test_halves_that_are_called_one_by_one_have_no_masks(small):
    activate(small)
    given = embeddings(small)
    small.scheduler.set_timesteps(3, device=DEVICE)
    t = small.scheduler.timesteps[0]
    for config in (routed(), local()):
        with cmlora.accelerated(small, **config):
            small.unet(given["latents"], t, given["negative_prompt_embeds"])
            with pytest.raises(cmlora.RunError, match=r"pass both in one batch, or give `regions`"):
                small.unet(given["latents"], t, given["prompt_embeds"])


@pytest.mark.parametrize(
    ("rule", "config"),
    [
        ("mean", {"method": "composite", "combine": "mean"}),
        ("deviation", {"method": "cmlora", "combine": "deviation", **STAGE}),
        ("local", {"method": "composite", "combine": "local"}),
        ("routed", {"method": "routed"}),
    ],
    ids=["mean", "deviation", "local", "routed"],
)
def test_shared_adapters_act_in_every_prediction(small, rule, config):
    dominance = {"dominance": 2.5} if config["method"] == "cmlora" else {}
    config = {"cache_interval": 2, **config}
    equal(small, rule, config, shared=(SHARED,), interval=2, follow=True, **dominance)


def test_shared_adapters_of_one_prediction(small):
    everyone = (*NAMES, SHARED)
    activate(small, everyone)
    merged = call(small)
    activate(small, (SHARED,))
    alone = call(small)
    one = {"cache_interval": 1, "shared": (SHARED,)}
    assert relative(image(small, names=everyone, method="merge", **one), merged) < EXACT
    assert relative(image(small, names=everyone, method="no_lora", **one), alone) < EXACT


def own_prompts(pipe, images):
    """Random ones for two adapters: of one image for all, and of each; with pooled ones where the model takes them."""
    generator, width = torch.Generator().manual_seed(9), pipe.unet.config.cross_attention_dim
    pooled = hasattr(pipe, "text_encoder_2")

    def random(count):
        tensors = torch.randn(count, 77, width, generator=generator), torch.randn(count, 24, generator=generator)
        return (tensors[0].to(DEVICE), tensors[1].to(DEVICE) if pooled else None)

    return {"style": random(1), "background": random(images)}


@pytest.mark.parametrize("kind", ["small", "sdxl"])
@pytest.mark.parametrize("rule", ["mean", "deviation", "local"])
def test_prompts(request, kind, rule):
    """An adapter is compared with the base model on the same prompt."""
    pipe = request.getfixturevalue(kind)
    given, prompts = embeddings(pipe, 2), own_prompts(pipe, 2)
    run = lambda pipe: call(pipe, 4, given=given)  # noqa: E731
    config = {"method": "composite", "combine": rule, "cache_interval": 2}
    config["prompts"] = {name: pair if pair[1] is not None else pair[0] for name, pair in prompts.items()}
    equal(pipe, rule, config, run, prompts=prompts, interval=2, follow=True)


def test_prompts_with_few_rows(small):
    prompts = own_prompts(small, 1)
    config = local(method="cmlora", cache_interval=2, max_rows=4, **STAGE)
    config["prompts"] = {name: pair[0] for name, pair in prompts.items()}
    equal(small, "local", config, prompts=prompts, interval=2, follow=True, dominance=2.5)


def test_text_goes_through_the_adapters_own_part_of_the_text_encoder():
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sprites.model_path(), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    names = ("zebrin", "tophat")
    for i, name in enumerate(names):
        pipe.load_lora_weights(sprites.lora_path(name), adapter_name=name)
        torch.manual_seed(i)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        pipe.text_encoder.add_adapter(config, adapter_name=name)
    pipe = pipe.to(DEVICE)

    def run(pipe):
        seed = torch.Generator().manual_seed(6)
        text = "a zebrin creature, wearing a tophat"
        return pipe(text, num_inference_steps=3, guidance_scale=4.0, generator=seed, output_type="latent").images

    pipe.set_adapters(["tophat"])
    own = pipe.encode_prompt("wearing a tophat", DEVICE, 1, do_classifier_free_guidance=False)[0]
    pipe.set_adapters([*names])
    both = pipe.encode_prompt("wearing a tophat", DEVICE, 1, do_classifier_free_guidance=False)[0]
    assert relative(own, both) > 1e-3
    with PlacesLoop(pipe.unet, names, "deviation", prompts={"tophat": (own, None)}):
        want = run(pipe)
    pipe.set_adapters([*names])
    how = {"method": "composite", "combine": "deviation", "cache_interval": 1}
    with cmlora.accelerated(pipe, prompts={"tophat": "wearing a tophat"}, **how):
        assert relative(run(pipe), want) < EXACT
    assert set(pipe.text_encoder.active_adapters()) == set(names)


@pytest.mark.parametrize("config", [routed(), local()], ids=lambda c: c["method"])
def test_masks_are_an_images_own_and_follow_the_adapters(small, config):
    """Neither the other images of a batch nor the order of the adapters matter."""
    given = embeddings(small, 2)

    def drawn(given, names):
        activate(small, NAMES)
        with cmlora.accelerated(small, adapters=names, **config):
            return call(small, 4, given=given), cmlora.summary(small).masks

    together, masks = drawn(given, NAMES)
    assert torch.stack([*masks.values()]).amax(0).eq(1).all(), "the strongest adapter of a place has 1"
    assert [*masks] == [*NAMES]
    assert any(relative(mask[0], mask[1]) > 0.01 for mask in masks.values())
    turned, permuted = drawn(given, NAMES[::-1])
    assert relative(turned, together) < EXACT
    for name in NAMES:
        assert masks[name].shape == (2, 16, 16)
        assert relative(permuted[name], masks[name]) < EXACT
    for i in range(2):
        alone, own = drawn({key: value[i : i + 1] for key, value in given.items()}, NAMES)
        assert relative(alone, together[i : i + 1]) < EXACT
        assert all(relative(own[name][0], masks[name][i]) < EXACT for name in NAMES)


def test_runs_after_one_another_share_no_masks(small):
    given = embeddings(small, 2, seed=8)
    want = image(small, lambda pipe: call(pipe, 4, given=given), **routed(cache_interval=2))
    got = image(small, lambda pipe: (call(pipe, 3), call(pipe, 4, given=given))[1], **routed(cache_interval=2))
    assert torch.equal(got, want)


def test_switch_by_stages_is_one_adapter_after_the_other(small):
    """Two high adapters as long as step <= 3, the first one twice as in the published callback; then the low one."""
    order = iter(["character", "character", "style", "character", "background", "background"])
    own = small.unet.forward

    def forward(*args, **kwargs):
        name = next(order)
        small.unet.set_adapters([name], [WEIGHTS[name]])
        return own(*args, **kwargs)

    small.unet.forward = forward
    want = call(small, 6)
    del small.unet.__dict__["forward"]
    stages = {"method": "switch", "switch_stages": True, "switch_step": 1, "offline_boundary": 0.5}
    assert relative(image(small, lambda pipe: call(pipe, 6), cache_interval=1, **stages), want) < EXACT


@pytest.mark.parametrize(
    "config",
    [routed(shared=(SHARED,)), local(regions={"style": HALF}, prompts={"style": torch.ones(1, 77, 24)})],
    ids=lambda c: c["method"],
)
def test_restore_leaves_nothing_behind(config):
    pipe = with_loras(sd_pipe(sd_unet(**SMALL)))
    activate(pipe, WEIGHTS)
    before = snapshot(pipe)
    cmlora.accelerate(pipe, **config)
    assert not torch.equal(call(pipe), before["image"])
    cmlora.restore(pipe)
    assert_same(before, snapshot(pipe))
