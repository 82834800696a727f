"""The batch computes what a loop over the adapters computes, on SDXL's structure, ranks mixed, with convolutions."""

import pytest
import torch

import cmlora
from cmlora.lab.bench.loop import CachedLoop
from cmlora.lab.bench.tiny import ATTENTION, EVERYTHING, add_lora, call, embeddings, relative, sdxl_pipe

STAGE = {"partition": "offline", "offline_boundary": 1.0, "dominant_decay": 0}
KINDS = (  # rank, alpha, layers
    (4, None, ATTENTION),
    (8, 4.0, EVERYTHING),
    (3, 6.0, r"(to_q|to_v|conv1)$"),
    (16, None, r"(to_k|to_out\.0|conv_in|conv_out|time_emb_proj)$"),
    (1, 0.5, r"(ff\.net\.2|proj_in|conv_shortcut|linear_1)$"),
)


def pipe_with(count):
    pipe = sdxl_pipe()
    names = [
        add_lora(pipe.unet, f"lora_{i}", rank, alpha, pattern, seed=i + 1)
        for i, (rank, alpha, pattern) in enumerate(KINDS[:count])
    ]
    return pipe, names


def peer(count, weights, **how):
    pipe, names = pipe_with(count)
    sequential = CachedLoop(pipe.unet, names, weights, **how)
    return call(pipe, 5), sequential


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_cmlora_with_cache_equals_the_loop(count):
    weights = [1.0, 0.5, 1.3, 0.8, 0.7][:count]
    want, sequential = peer(count, weights, interval=2, dominance=count - 0.5)
    pipe, names = pipe_with(count)
    pipe.set_adapters(names, weights)
    cmlora.accelerate(pipe, combine="mean", cache_interval=2, **STAGE)
    assert relative(call(pipe, 5), want) < 1e-5
    full = [step.rows_full // 2 for step in cmlora.summary(pipe).steps]
    assert full == [len(passes) for passes in sequential.full_passes]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize(("combine", "follow"), [("mean", False), ("deviation", False), ("deviation", True)])
@pytest.mark.parametrize("method", ["composite", "cmlora"])
def test_every_combination_equals_the_loop(method, combine, follow, interval):
    dominance = 2.5 if method == "cmlora" else None
    how = {"interval": interval, "dominance": dominance, "deviation": combine == "deviation", "follow": follow}
    want, _ = peer(3, None, **how)
    pipe, names = pipe_with(3)
    pipe.set_adapters(names)
    config = {"method": method, "combine": combine, "cache_follow": follow, "cache_interval": interval}
    cmlora.accelerate(pipe, **config, **STAGE)
    assert relative(call(pipe, 5), want) < 1e-5


def test_every_row_alone_equals_a_plain_call_with_its_adapter():
    pipe, names = pipe_with(5)
    given = embeddings(pipe, images=2)
    time_ids = torch.tensor([[128.0, 128, 0, 0, 128, 128]]).repeat(2, 1)
    added = {"text_embeds": given["pooled_prompt_embeds"], "time_ids": time_ids}
    pipe.scheduler.set_timesteps(3)
    t = pipe.scheduler.timesteps[0]
    plain = []
    for name in names:
        pipe.unet.set_adapters([name])
        plain.append(pipe.unet(given["latents"], t, given["prompt_embeds"], added_cond_kwargs=added).sample)
    pipe.unet.set_adapters(names)
    cmlora.accelerate(pipe, method="composite", combine="mean")
    noises = []
    hook = pipe.unet.conv_out.register_forward_hook(lambda module, inputs, output: noises.append(output))
    pipe.unet(given["latents"], t, given["prompt_embeds"], added_cond_kwargs=added)
    hook.remove()
    for row, want in zip(noises[0].chunk(5), plain, strict=True):
        assert relative(row, want) < 1e-5


def test_permuting_the_adapters_permutes_nothing_but_the_rows():
    pipe, names = pipe_with(4)
    images = []
    for order in (names, names[::-1]):
        cmlora.accelerate(pipe, method="composite", adapters=order, cache_interval=2)
        images.append(call(pipe))
    assert relative(images[1], images[0]) < 1e-5


def test_merge_equals_peft_with_all_adapters_active():
    pipe, names = pipe_with(5)
    pipe.set_adapters(names, [0.9, 0.4, 1.2, 0.3, 0.8])
    want = call(pipe)
    cmlora.accelerate(pipe, method="merge", cache_interval=1)
    assert relative(call(pipe), want) < 1e-5


def test_same_seed_same_image():
    pipe, _ = pipe_with(3)
    cmlora.accelerate(pipe)
    assert torch.equal(call(pipe), call(pipe))
