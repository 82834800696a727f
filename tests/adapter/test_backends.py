"""The same step through the Triton kernels, and as one compiled graph."""

import torch

import cmlora
from cmlora.lab.bench.tiny import ATTENTION, SMALL, call, embeddings, relative, three_adapters
from cmlora.models.unet.conditions import UNetInputs


def test_online_steps_through_the_kernels_equal_the_definitions():
    """Linear layers alone and stacked, convolutions of 1 and 3 taps; without guidance, for the interpreter is slow."""
    pipe = three_adapters(r"(to_q|to_k|to_v|to_out\.0|net\.2|conv1|conv_shortcut)$", **SMALL)
    given = embeddings(pipe, size=(8, 8))
    images = []
    for backend in ("torch", "triton"):
        cmlora.accelerate(pipe, partition="online", online_gate=1.0, cache_interval=2, backend=backend)
        images.append(call(pipe, 3, guidance=1.0, given=given))
    assert relative(images[1], images[0]) < 1e-5


def test_a_step_is_one_graph():
    """torch.compile(fullgraph=True) of a refresh and of a reuse step, as their callers will compile them."""
    pipe = three_adapters(ATTENTION, **SMALL)
    cmlora.accelerate(pipe, partition="offline", offline_boundary=1.0, cache_interval=2)
    call(pipe, 3)
    denoiser = pipe.unet.forward.cmlora.denoiser
    run, lane, batched = denoiser.last_run, denoiser.last_run.lanes[0], denoiser.batched
    given = embeddings(pipe)
    context = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    sample = torch.cat([given["latents"]] * 2)
    timesteps = run.timesteps
    everyone = lane.rows_of(run.plan[0], tuple(range(len(run.plan[0].slots))), sample.device)
    some = lane.rows_of(run.plan[2], run.plan[2].refresh, sample.device)
    first = UNetInputs(sample, timesteps[0], context)
    conditions = batched.prepare(first, everyone, None, timesteps)
    _, cache = batched.run(first, everyone, everyone, None, conditions, 0)

    def step(sample, cache, deep, number):
        inputs = UNetInputs(sample, timesteps[number], context)
        follow = run.plan[2].bases if deep is some else ()
        return batched.run(inputs, everyone, deep, cache, conditions, number, follow=follow)[0]

    for deep, number in ((None, 1), (some, 2)):
        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        want = step(sample, cache.clone(), deep, number)
        assert torch.equal(compiled(sample, cache.clone(), deep, number), want)
