"""Calls and loops, as people had them in public bug reports, through the public API: the plain
pipeline's picture, that of a loop of plain calls, or an error that says what to do. Never silently another picture."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

import cmlora
from cmlora.lab.bench.tiny import call, embeddings, relative
from tests.adapter.loop import NAMES, WEIGHTS
from tests.adapter.wild import DEVIATION, KINDS, MEAN, MERGE, NEAR, or_refused, ours, right


@pytest.mark.parametrize("kind", [MERGE, MEAN, DEVIATION], ids=["merge", "mean", "deviation"])
def test_another_scale_in_every_step(kind, sd):
    def run(pipe):
        given, seen = embeddings(pipe), []
        pipe.scheduler.set_timesteps(4)
        x = given["latents"]
        for t, scale in zip(pipe.scheduler.timesteps, (1.0, 0.6, 0.2, 0.0), strict=True):
            noise = pipe.unet(x, t, given["prompt_embeds"], cross_attention_kwargs={"scale": scale}).sample
            x = pipe.scheduler.step(noise, t, x).prev_sample
            seen.append(noise)
        return torch.stack(seen)

    assert relative(ours(sd, kind, run), right(sd, kind, run)) < NEAR


def weaker(pipe, i):
    pipe.set_adapters(list(NAMES), [WEIGHTS[0] * (1 - 0.25 * (i + 1)), WEIGHTS[1]])


def one_less(pipe, i):
    pipe.set_adapters(["b"] if i == 1 else list(NAMES))


def off_and_on(pipe, i):
    pipe.disable_lora() if i == 0 else pipe.enable_lora()


def swapped(pipe, i):
    for module in pipe.unet.modules():
        if hasattr(module, "lora_A") and i == 1:
            module.lora_A["a"].weight.data.mul_(1.5)


def written(pipe, i):
    for module in pipe.unet.modules():
        if hasattr(module, "lora_A"):  # whatever the step: a run begins with what the last one left
            module.lora_A["a"].weight.mul_(1.5 if i % 2 == 0 else 1 / 1.5)


@pytest.mark.parametrize("switch", [weaker, one_less, off_and_on, written], ids=lambda switch: switch.__name__)
@KINDS
def test_adapters_switched_in_a_step_callback(kind, switch, sd):
    def run(pipe):
        def callback(pipe, i, t, tensors):
            switch(pipe, i)
            return tensors

        return call(pipe, 4, callback_on_step_end=callback)

    if kind is MERGE:
        want = right(sd, kind, run)
        sd.enable_lora()
        assert relative(ours(sd, kind, run), want) < NEAR
        return
    sd.unet.set_adapters(list(NAMES), list(WEIGHTS))
    unswitched = right(sd, kind, functools.partial(call, steps=4))
    with or_refused("adapter", "set_adapters"):
        assert relative(ours(sd, kind, run), unswitched) > NEAR, "the switch was passed by"


@KINDS
def test_weights_of_an_adapter_swapped_between_calls(kind, sd):
    cmlora.accelerate(sd, **kind)
    before = call(sd, 3)
    swapped(sd, 1)
    got = call(sd, 3)
    assert relative(got, right(cmlora.restore(sd), kind)) < NEAR
    assert relative(got, before) > NEAR


@KINDS
def test_two_prompts_from_one_noise_behind_a_guided_call(kind, sd):
    def run(pipe):
        given = embeddings(pipe, 2)
        x = given["latents"][:1].repeat(2, 1, 1, 1)
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t, given["prompt_embeds"]).sample, t, x).prev_sample
        return x

    want = right(sd, kind, run)
    cmlora.accelerate(sd, **kind)
    call(sd, 2)
    assert relative(run(sd), want) < NEAR


def test_prompts_sliced_anew_and_written_to_in_every_step(sd):
    """New views of the same memory are the same prompt, until it is written to."""

    def run(pipe):
        given = embeddings(pipe, 2)
        context, x = given["prompt_embeds"].clone(), given["latents"][:1]
        pipe.scheduler.set_timesteps(4)
        for i, t in enumerate(pipe.scheduler.timesteps):
            if i == 2:
                context[0] *= 2
            x = pipe.scheduler.step(pipe.unet(x, t, context[:1]).sample, t, x).prev_sample
        return x

    for mode in (False, True):
        with torch.inference_mode(mode):
            assert relative(ours(sd, MEAN, run), right(sd, MEAN, run)) < NEAR


@KINDS
def test_two_threads_on_one_pipeline(kind, sd):
    want = right(sd, kind)
    cmlora.accelerate(sd, **kind)
    seen: list[object] = []

    def draw():
        try:
            with torch.no_grad():
                seen.append(call(sd, 3))
        except cmlora.CMLoRAError as error:
            seen.append(str(error))

    threads = [threading.Thread(target=draw) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 2
    for one in seen:
        assert "thread" in one if isinstance(one, str) else relative(one, want) < NEAR
    assert relative(call(sd, 3), want) < NEAR
