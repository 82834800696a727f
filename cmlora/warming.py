"""Everything that a pipeline compiles and captures, before the first image that somebody waits for."""

from __future__ import annotations

from typing import Any

import torch

from cmlora.engine.hook import find
from cmlora.errors import CMLoRAError

STEPS = 6
"""Of a warming call: with any cache interval up to 3 every kind of step occurs."""


def warm_up(pipe: Any, *args: Any, **call: Any) -> None:
    """Run an accelerated pipeline twice, a few steps, so that its kernels are compiled and its steps captured.

    Triton keeps what it compiles on disk, so on the next start this takes seconds. Random numbers drawn elsewhere are
    not disturbed; `summary(pipe)` is then of this run.

    Args:
        pipe: accelerated.
        *args, **call: what later calls will pass that decides shapes: prompt, height, width, guidance_scale,
            num_images_per_prompt, image, ... `num_inference_steps` defaults to 6; a run whose steps come in more kinds
            (long cache intervals, cuda_graphs=True) asks for the number that later calls will have.

    Raises:
        CMLoRAError: the pipeline is not accelerated.
    """
    if find(pipe) is None:
        raise CMLoRAError("warm_up needs an accelerated pipeline; call cmlora.accelerate(pipe) first")
    if not args and not {"prompt", "prompt_embeds"} & set(call):
        call["prompt"] = ""
    call = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    device = pipe.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        for _ in range(2):  # the first step of a run, too, is captured at its second occurrence
            pipe(*args, **call)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
