"""The batch computes what a loop over the adapters computes, on SDXL's structure, ranks mixed, with convolutions."""

from contextlib import nullcontext

import pytest
import torch

import cmlora
from cmlora.lab.bench.loop import CachedLoop
from cmlora.lab.bench.tiny import ATTENTION, DEVICE, EVERYTHING, add_lora, call, embeddings, relative, sdxl_pipe

STAGE = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0}
KINDS = (  # rank, alpha, layers
    (4, None, ATTENTION),
    (8, 4.0, EVERYTHING),
    (3, 6.0, r"(to_q|to_v|conv1)$"),
    (16, None, r"(to_k|to_out\.0|conv_in|conv_out|time_emb_proj)$"),
    (1, 0.5, r"(ff\.net\.2|proj_in|conv_shortcut|linear_1)$"),
)


NAMES = tuple(f"lora_{i}" for i in range(len(KINDS)))
WEIGHTS = (1.0, 0.5, 1.3, 0.8, 0.7)


@pytest.fixture(scope="module")
def sdxl():
    """Every test says which of its adapters are active."""
    pipe = sdxl_pipe()
    for i, (rank, alpha, pattern) in enumerate(KINDS):
        add_lora(pipe.unet, NAMES[i], rank, alpha, pattern, seed=i + 1)
    return pipe


def ours(pipe, steps=5, **config):
    """The latents, and the summary of the run."""
    with cmlora.accelerated(pipe, **config):
        return call(pipe, steps), cmlora.summary(pipe)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_cmlora_with_cache_equals_the_loop(sdxl, count):
    names, weights = NAMES[:count], WEIGHTS[:count]
    with CachedLoop(sdxl.unet, names, weights, interval=2, dominance=count - 0.5) as loop:
        want = call(sdxl, 5)
    sdxl.set_adapters(list(names), list(weights))
    got, summary = ours(sdxl, combine="mean", cache_interval=2, **STAGE)
    assert relative(got, want) < 1e-5
    assert [step.rows_full // 2 for step in summary.steps] == [len(passes) for passes in loop.full_passes]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(("combine", "follow"), [("mean", False), ("deviation", False), ("deviation", True)])
@pytest.mark.parametrize("method", ["composite", "cmlora"])
def test_every_combination_equals_the_loop(sdxl, method, combine, follow, interval):
    dominance = 2.5 if method == "cmlora" else None
    how = {"interval": interval, "dominance": dominance, "deviation": combine == "deviation", "follow": follow}
    with CachedLoop(sdxl.unet, NAMES[:3], WEIGHTS[:3], **how):
        want = call(sdxl, 5)
    sdxl.set_adapters(list(NAMES[:3]), list(WEIGHTS[:3]))
    got, _ = ours(sdxl, method=method, combine=combine, cache_follow=follow, cache_interval=interval, **STAGE)
    assert relative(got, want) < 1e-5


def rows_of_a_step(pipe, given, **config):
    """What the UNet predicts in its first step, row for row: [adapters * images, 4, height, width]."""
    images = len(given["latents"])
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]], device=DEVICE).repeat(images, 1)
    added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": time_ids}
    pipe.scheduler.set_timesteps(3, device=DEVICE)
    noises = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: noises.append(output))
    with cmlora.accelerated(pipe, **config) if config else nullcontext():
        pipe.unet(given["latents"], pipe.scheduler.timesteps[0], given["prompt_embeds"], added_cond_kwargs=added)
    hook.remove()
    return torch.cat(noises)


def test_every_row_alone_equals_a_plain_call_with_its_adapter(sdxl):
    given, plain = embeddings(sdxl, images=2), []
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        sdxl.unet.set_adapters([name], [weight])
        plain.append(rows_of_a_step(sdxl, given))
    sdxl.unet.set_adapters(list(NAMES), list(WEIGHTS))
    rows = rows_of_a_step(sdxl, given, method="composite", combine="mean")
    for row, want in zip(rows.chunk(len(NAMES)), plain, strict=True):
        assert relative(row, want) < 1e-5


def test_permuting_the_adapters_permutes_nothing_but_the_rows(sdxl):
    """With weights that differ: a row that took another's adapter or weight would be seen."""
    names, given = NAMES[:4], embeddings(sdxl)
    sdxl.set_adapters(list(names), list(WEIGHTS[:4]))
    rows, images = [], []
    for order in (names, (names[2], names[0], names[3], names[1])):
        step = rows_of_a_step(sdxl, given, method="composite", combine="mean", adapters=order)
        rows.append(dict(zip(order, step, strict=True)))
        images.append(ours(sdxl, 4, method="composite", adapters=order, cache_interval=2)[0])
    for name in names:
        assert relative(rows[1][name], rows[0][name]) < 1e-6
        assert all(relative(rows[0][name], rows[0][other]) > 1e-3 for other in names if other != name)
    assert relative(images[1], images[0]) < 1e-5


def test_merge_equals_peft_with_all_adapters_active(sdxl):
    sdxl.set_adapters(list(NAMES), [0.9, 0.4, 1.2, 0.3, 0.8])
    want = call(sdxl)
    assert relative(ours(sdxl, 4, method="merge", cache_interval=1)[0], want) < 1e-5


def test_same_seed_same_image(sdxl):
    sdxl.set_adapters(list(NAMES[:3]), list(WEIGHTS[:3]))
    assert torch.equal(ours(sdxl, 4)[0], ours(sdxl, 4)[0])
