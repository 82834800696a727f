"""The same step through the Triton kernels, and as one compiled graph."""

import torch

import cmlora
from cmlora.lab.bench.tiny import EVERYTHING, add_lora, call, embeddings, relative, sd_pipe, sd_unet
from cmlora.models.unet.conditions import Inputs


def small_pipe(pattern):
    unet = sd_unet(
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    pipe = sd_pipe(unet)
    for i, name in enumerate(("character", "style", "background")):
        add_lora(unet, name, rank=2 + i, pattern=pattern, seed=i + 1)
    return pipe


def test_online_steps_through_the_kernels_equal_the_definitions():
    pipe = small_pipe(EVERYTHING)
    given = embeddings(pipe, size=(8, 8))
    images = []
    for backend in ("torch", "triton"):
        cmlora.accelerate(pipe, partition="online", online_gate=1.0, cache_interval=2, backend=backend)
        images.append(call(pipe, 3, given=given))
    assert relative(images[1], images[0]) < 1e-5


def test_a_step_is_one_graph():
    """torch.compile(fullgraph=True) of a refresh and of a reuse step, as their callers will compile them."""
    pipe = small_pipe(r"(to_q|to_k|to_v|to_out\.0)$")
    cmlora.accelerate(pipe, partition="offline", offline_boundary=1.0, cache_interval=2)
    call(pipe, 3)
    denoiser = pipe.unet.forward.cmlora.denoiser
    run, batched = denoiser.last_run, denoiser.batched
    given = embeddings(pipe)
    context = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])
    sample = torch.cat([given["latents"]] * 2)
    timesteps = run.timesteps
    everyone = run.rows_of(run.plan[0], tuple(range(len(run.plan[0].slots))), sample.device)
    some = run.rows_of(run.plan[2], run.plan[2].refresh, sample.device)
    first = Inputs(sample, timesteps[0], context)
    conditions = batched.prepare(first, everyone, None, timesteps)
    _, cache = batched.run(first, everyone, everyone, None, conditions, 0)

    def step(sample, cache, deep, number):
        inputs = Inputs(sample, timesteps[number], context)
        return batched.run(inputs, everyone, deep, cache, conditions, number, follow=deep is some)[0]

    for deep, number in ((None, 1), (some, 2)):
        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        want = step(sample, cache.clone(), deep, number)
        assert torch.equal(compiled(sample, cache.clone(), deep, number), want)
