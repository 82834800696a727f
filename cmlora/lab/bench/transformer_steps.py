"""Denoising steps of Flux at its real size on `meta`, by us and by a loop of `set_adapters`, traced.

The pipeline's own call runs, so that nothing of it may read a value: `meta` tensors have none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from cmlora.accelerate import accelerated
from cmlora.lab.bench.counting import Op, Trace
from cmlora.lab.bench.roofline import GPUS, Assumptions, Gpu, step_time
from cmlora.lab.bench.tiny_transformers import pipeline

STEPS, INTERVAL = 28, 2
LAYERS = r".*blocks\..*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2)"
"""What trainers change: attention and feed-forward of both streams."""


@dataclass(frozen=True)
class Counted:
    """Of one image of STEPS steps, on average per step.

    Attributes:
        ops: kernels launched. flops: 2 per multiply-add. bytes: read and written, every element once.
        ms: predicted (`roofline.step_time`), set_adapters for free.
    """

    ops: float
    flops: float
    bytes: float
    ms: float


class MetaFlux:
    """FluxPipeline on `meta` in bfloat16 with LoRAs on attention and feed-forward.

    Args:
        adapters, rank: of the LoRAs. side: of the image in pixels. text: tokens of the prompt.
        config: of FluxTransformer2DModel, where it is not FLUX.1-dev's.
    """

    def __init__(self, adapters: int, rank: int = 16, side: int = 1024, text: int = 512, **config: Any) -> None:
        with torch.device("meta"):
            model = FluxTransformer2DModel(**({"guidance_embeds": True} | config))
            self.names = [f"lora_{i}" for i in range(adapters)]
            for name in self.names:
                model.add_adapter(LoraConfig(r=rank, target_modules=LAYERS), adapter_name=name)
        self.pipe = pipeline("flux", model.to(torch.bfloat16).eval(), device="meta")
        self.side, self.text = side, text

    def count(self, gpu: str = "H100", **config: Any) -> Counted:
        """By us, `config` of CMLoRAConfig, on a GPU."""
        self.pipe.transformer.set_adapters(self.names)
        with accelerated(self.pipe, **({"cache_interval": INTERVAL} | config)):
            return self._image(GPUS[gpu])

    def count_loop(self, gpu: str = "H100", interval: int = INTERVAL, cut: tuple[int, int] = (0, 0)) -> Counted:
        """By a loop of plain calls, the mean of all adapters; with an interval, deep blocks are left out as we do."""
        with _Loop(self.pipe.transformer, self.names, interval, cut):
            return self._image(GPUS[gpu])

    def _image(self, gpu: Gpu) -> Counted:
        """The first four steps stand for all: the first interval, in which masks are found, and one that repeats."""
        ops = [trace.ops(gpu.arch) for trace in self._traces(2 * INTERVAL)]
        share = (STEPS - INTERVAL) / INTERVAL

        def mean(of: Callable[[list[Op]], float]) -> float:
            first, repeated = (sum(map(of, part)) for part in (ops[:INTERVAL], ops[INTERVAL:]))
            return (first + share * repeated) / STEPS

        given = Assumptions()
        return Counted(
            mean(len),
            mean(lambda step: sum(op.flops for op in step)),
            mean(lambda step: sum(op.bytes for op in step)),
            mean(lambda step: 1e3 * step_time(step, gpu, given).step),
        )

    def _traces(self, steps: int) -> Sequence[Trace]:
        """A trace per step, the scheduler's own work in it."""
        traces = [Trace()]

        def next_step(*_: Any) -> dict[str, Any]:
            traces[-1].__exit__(None, None, None)
            traces.append(Trace())
            traces[-1].__enter__()
            return {}

        config, tokens = self.pipe.transformer.config, (self.side // 16) ** 2
        like: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
        traces[0].__enter__()
        try:
            with torch.no_grad():
                self.pipe(
                    prompt_embeds=torch.empty(1, self.text, config.joint_attention_dim, **like),
                    pooled_prompt_embeds=torch.empty(1, config.pooled_projection_dim, **like),
                    latents=torch.empty(1, tokens, config.in_channels, **like),
                    height=self.side,
                    width=self.side,
                    num_inference_steps=steps,
                    output_type="latent",
                    callback_on_step_end=next_step,
                )
        finally:
            traces[-1].__exit__(None, None, None)
        return traces[:-1]


class _Loop:
    """One adapter after the other in the place of the forward; none of our code in it."""

    def __init__(self, net: Any, names: Sequence[str], interval: int, cut: tuple[int, int]) -> None:
        self.net, self.names, self.interval, self.calls = net, names, interval, 0
        blocks = [*net.transformer_blocks, *net.single_transformer_blocks]
        self.deep = blocks[cut[0] : len(blocks) - cut[1]]
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> None:
        self.forward, self.net.forward = self.net.forward, self

    def __exit__(self, *_: Any) -> None:
        del self.net.__dict__["forward"]

    def __call__(self, **kwargs: Any) -> tuple[Tensor]:
        step, self.calls = self.calls, self.calls + 1
        dominant = self.names[step // self.interval % len(self.names)]
        noises = []
        for name in self.names:
            self.net.set_adapters([name])
            full = step == 0 or self.interval == 1 or (step % self.interval == 0 and name == dominant)
            with self._blocks(name, full):
                noises.append(self.forward(**kwargs)[0])
        return (sum(noises[1:], noises[0]) / len(noises),)

    @contextlib.contextmanager
    def _blocks(self, name: str, full: bool) -> Iterator[None]:
        begin: list[tuple[Tensor, Tensor]] = []

        def enter(_: Any, args: Any, kwargs: Any) -> None:
            begin[:] = [(kwargs["encoder_hidden_states"], kwargs["hidden_states"])]

        def leave(_: Any, args: Any, kwargs: Any, out: tuple[Tensor, Tensor]) -> None:
            self.kept[name] = out[0] - begin[0][0], out[1] - begin[0][1]

        def add(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            return encoder_hidden_states + self.kept[name][0], hidden_states + self.kept[name][1]

        def skip(hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            return encoder_hidden_states, hidden_states

        with contextlib.ExitStack() as stack:
            if full and self.interval > 1:
                stack.callback(self.deep[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(self.deep[-1].register_forward_hook(leave, with_kwargs=True).remove)
            for i, block in enumerate([] if full else self.deep):
                block.forward = skip if i else add
                stack.callback(block.__dict__.pop, "forward")
            yield
