"""Denoising steps of Flux at its real size on `meta`, by us and by a loop of `set_adapters`, traced.

The pipeline's own call runs, so that nothing of it may read a value: `meta` tensors have none. Blocks of a kind launch
alike, so that a few are traced and the others follow (`Flux`); tests/dit/test_counts.py holds that at a further size.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor

from cmlora.accelerate import accelerated
from cmlora.lab.bench.counting import Trace
from cmlora.lab.bench.roofline import GPUS, Assumptions, step_time
from cmlora.lab.bench.tiny_transformers import pipeline
from cmlora.models.dit.step import cut_of

STEPS, INTERVAL = 28, 2
DOUBLE, SINGLE = 19, 38  # FLUX.1-dev's blocks of two streams and of one
CARDS = ("A100", "H100", "H200", "MI300X")
COUNTED_ON = "sm_90"
LAYERS = r".*blocks\..*(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|proj_mlp|proj_out|net\.0\.proj|net\.2)"
"""What trainers change: attention and feed-forward of both streams."""


@dataclass(frozen=True)
class Counted:
    """Of one image of STEPS steps, on average per step.

    Attributes:
        ops: kernels launched on COUNTED_ON. flops: 2 per multiply-add. bytes: read and written, every element once.
        ms: predicted (`roofline.step_time`) on each of CARDS, set_adapters for free.
    """

    ops: float
    flops: float
    bytes: float
    ms: tuple[float, ...]

    def __add__(self, other: Counted) -> Counted:
        ms = tuple(x + y for x, y in zip(self.ms, other.ms, strict=True))
        return Counted(self.ops + other.ops, self.flops + other.flops, self.bytes + other.bytes, ms)

    def __rmul__(self, factor: float) -> Counted:
        ms = tuple(factor * x for x in self.ms)
        return Counted(factor * self.ops, factor * self.flops, factor * self.bytes, ms)


class Blocks(NamedTuple):
    """How many run in every step at the beginning (of two streams), are cached, and run at the end (of one)."""

    first: int
    deep_double: int
    deep_single: int
    last: int


FEW = Blocks(2, 1, 1, 1)  # the very first block is like no other: its rows are still the same


def all_blocks() -> Blocks:
    """FLUX.1-dev's, by the default cut."""
    first, last = cut_of(DOUBLE + SINGLE, None, cached=True)
    return Blocks(first, DOUBLE - first, SINGLE - last, last)


class Flux:
    """FLUX.1-dev, counted on a few blocks: each further one of a kind adds what one more of them adds.

    Args:
        adapters: LoRAs that it carries.
    """

    def __init__(self, adapters: int) -> None:
        self.adapters = adapters
        self._models: dict[tuple[int, int], MetaFlux] = {}

    def count(self, blocks: Blocks | None = None, **config: Any) -> Counted:
        """By us, `config` of CMLoRAConfig; `blocks`: all of them, or so many."""
        cached = config.get("cache_interval", INTERVAL) != 1

        def of(model: MetaFlux, cut: tuple[int, int]) -> Counted:
            return model.count(**({"cache_branch": cut} | config))

        return self._followed(of, blocks, cached=cached)

    def count_loop(self, blocks: Blocks | None = None, interval: int = INTERVAL) -> Counted:
        """By a loop of plain calls, with the same cache unless the interval is 1."""

        def of(model: MetaFlux, cut: tuple[int, int]) -> Counted:
            return model.count_loop(interval, cut)

        return self._followed(of, blocks, cached=interval != 1)

    def traced(self, of: Callable[[MetaFlux, tuple[int, int]], Counted], blocks: Blocks) -> Counted:
        """What a model of just these blocks does."""
        sizes = blocks.first + blocks.deep_double, blocks.deep_single + blocks.last
        if sizes not in self._models:
            self._models[sizes] = MetaFlux(self.adapters, num_layers=sizes[0], num_single_layers=sizes[1])
        return of(self._models[sizes], (blocks.first, blocks.last))

    def _followed(
        self, of: Callable[[MetaFlux, tuple[int, int]], Counted], blocks: Blocks | None, cached: bool
    ) -> Counted:
        few = self.traced(of, FEW)
        total, wanted = few, all_blocks() if blocks is None else blocks
        if not cached:  # there are two kinds then
            first, double, single, last = wanted
            wanted = Blocks(FEW.first, first + double - FEW.first, single + last - FEW.last, FEW.last)
        for kind, count, more in zip(Blocks._fields, FEW, wanted, strict=True):
            if more != count:
                one = self.traced(of, FEW._replace(**{kind: count + 1}))
                total = total + (more - count) * (one + -1 * few)
        return total


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

    def count(self, **config: Any) -> Counted:
        """By us, `config` of CMLoRAConfig."""
        self.pipe.transformer.set_adapters(self.names)
        with accelerated(self.pipe, **({"cache_interval": INTERVAL} | config)):
            return self._image()

    def count_loop(self, interval: int = INTERVAL, cut: tuple[int, int] = (0, 0)) -> Counted:
        """By a loop of plain calls, the mean of all adapters; with an interval, deep blocks are left out as we do."""
        with _Loop(self.pipe.transformer, self.names, interval, cut):
            return self._image()

    def _image(self) -> Counted:
        """The first four steps stand for all: the first interval, in which masks are found, and one that repeats."""
        steps = [_of_step(trace) for trace in self._traces(2 * INTERVAL)]
        share = (STEPS - INTERVAL) / INTERVAL
        first, repeated = (functools.reduce(operator.add, part) for part in (steps[:INTERVAL], steps[INTERVAL:]))
        return (1 / STEPS) * (first + share * repeated)

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


def _of_step(trace: Trace) -> Counted:
    ops, given = trace.ops(COUNTED_ON), Assumptions()
    gpus = [GPUS[card] for card in CARDS]
    ms = tuple(1e3 * step_time(trace.ops(gpu.arch), gpu, given).step for gpu in gpus)
    return Counted(len(ops), sum(op.flops for op in ops), sum(op.bytes for op in ops), ms)


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


def counts_table(rows: dict[str, Counted]) -> list[str]:
    """Kernels, flops and bytes of a step."""
    lines = ["| | kernels | TFLOP | GB |", "|---|---|---|---|"]
    return lines + [f"| {n} | {c.ops:.0f} | {c.flops / 1e12:.1f} | {c.bytes / 1e9:.1f} |" for n, c in rows.items()]


def times_table(rows: dict[str, Counted]) -> list[str]:
    """Milliseconds of a step, predicted."""
    lines = [f"| ms of a step, predicted | {' | '.join(CARDS)} |", "|---" * (1 + len(CARDS)) + "|"]
    return lines + [f"| {n} | {' | '.join(f'{ms:.0f}' for ms in c.ms)} |" for n, c in rows.items()]
