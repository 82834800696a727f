"""Predicted milliseconds per denoising step on GPUs, from the trace of real steps on `meta` and from data sheets.

Nothing is measured: a kernel takes as long as the slowest of its arithmetic, its memory traffic and the least time of a
kernel; a step takes as long as the slower of device and host. What that leaves out: csrc_docs/roofline.md. The command
that prints the tables: benchmarks/roofline.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cmlora.lab.bench.launched import Op
from cmlora.lab.bench.steps import ALIKE, MetaPipe, Step
from cmlora_kernels.chips import BEST_FROM, CARDS, SIZE_SHARE, TRITON_SHARE

RANK, MOST_ADAPTERS = 16, 8
WITHOUT = "loop, set_adapters free"  # a rival that exists on paper only


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        name: in tables. arch: the target that our kernels are chosen for, its card named.
        half_flops: fp16 matrix peak per second with fp32 accumulation, dense. bandwidth: bytes per second.
        source: where the two stand.
        best: of that peak in the library's fastest GEMM, as others measured it. best_source: who.
    """

    name: str
    arch: str
    half_flops: float
    bandwidth: float
    source: str
    best: float
    best_source: str = ""


def _listed(name: str, arch: str, card: str, source: str) -> Gpu:
    """A GPU of the table that the kernels' own cost model has, `cmlora_kernels.chips`."""
    found = next(each for each in CARDS[arch] if each.name == card)
    target = f"{arch}/{found.units}/{card}"
    return Gpu(name, target, found.half_flops, found.bandwidth, source, found.best, BEST_FROM.get(card, "assumed"))


GPUS = {
    "3060": _listed(
        "RTX 3060", "sm_86", "NVIDIA GeForce RTX 3060", "as the GA102 whitepaper's cards: twice its fp32 peak"
    ),
    "4090": _listed(
        "RTX 4090",
        "sm_89",
        "NVIDIA GeForce RTX 4090",
        "NVIDIA Ada GPU Architecture whitepaper, RTX 4090, fp32 accumulate",
    ),
    "5090": _listed(
        "RTX 5090",
        "sm_120",
        "NVIDIA GeForce RTX 5090",
        "NVIDIA RTX Blackwell GPU Architecture whitepaper, RTX 5090, fp32 accumulate",
    ),
    "L4": _listed("L4", "sm_89", "NVIDIA L4", "NVIDIA L4 Tensor Core GPU datasheet (242 with sparsity)"),
    "A100": _listed("A100 SXM", "sm_80", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB Tensor Core GPU datasheet, SXM"),
    "H100": _listed(
        "H100 SXM",
        "sm_90",
        "NVIDIA H100 80GB HBM3",
        "NVIDIA H100 Tensor Core GPU datasheet, SXM (1,979 with sparsity)",
    ),
    "H200": _listed("H200", "sm_90", "NVIDIA H200", "NVIDIA H200 Tensor Core GPU datasheet, SXM (1,979 with sparsity)"),
    "MI300X": _listed("MI300X", "gfx942", "AMD Instinct MI300X", "AMD Instinct MI300X Accelerator data sheet"),
}


def _assume(value: Any, why: str) -> Any:
    return field(default=value, metadata={"why": why})


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet tells; each field says why it has its value."""

    host_us: float = _assume(
        10, "host time of a launch, eager: dispatcher and module of an op; op call and Triton launch of ours"
    )
    set_adapters_sd15_ms: float = _assume(20, "host time of one unet.set_adapters with PEFT, measured on a CPU host")
    set_adapters_sdxl_ms: float = _assume(130, "the same on SDXL")
    kernel_us: float = _assume(3, "least time of a kernel on the device, with the gap to the next one")
    size_share: float = _assume(
        SIZE_SHARE,
        "of a GPU's best share of its peak (below) in cuBLAS, cuDNN and the like, at a step's sizes (chips.SIZE_SHARE)",
    )
    triton_share: float = _assume(
        TRITON_SHARE, "of the library's speed in our Triton GEMMs, whole tiles counted (chips.TRITON_SHARE)"
    )
    attention_share: float = _assume(
        0.35,
        "of the matrix peak in flash attention: FlashAttention-2 on an H100 (arXiv 2407.08608), heads padded",
    )
    bandwidth_share: float = _assume(0.8, "of the memory bandwidth, by all kernels that wait for memory")


@dataclass(frozen=True)
class Time:
    """Predicted seconds of one step.

    Attributes:
        compute, memory, small: device seconds of kernels bound by arithmetic, by memory traffic, by the least time.
        host: seconds that the host needs to launch all of it, set_adapters included.
    """

    compute: float = 0.0
    memory: float = 0.0
    small: float = 0.0
    host: float = 0.0

    @property
    def device(self) -> float:
        """Seconds of all kernels: the step as one captured graph."""
        return self.compute + self.memory + self.small

    @property
    def step(self) -> float:
        """The slower of device and host."""
        return max(self.device, self.host)

    @property
    def waiting(self) -> float:
        """Seconds in which the device waits for the host."""
        return self.step - self.device


def op_seconds(op: Op, gpu: Gpu, given: Assumptions) -> tuple[str, float]:
    """What bounds a kernel ("compute", "memory" or "small"), and its seconds."""
    library = given.size_share * gpu.best
    share = {
        "none": 1.0,  # no matrix work
        "library": library,
        "triton": library * given.triton_share,
        "attention": given.attention_share,
    }[op.unit]
    bounds = {
        "compute": op.work / (share * gpu.half_flops),
        "memory": op.bytes / (given.bandwidth_share * gpu.bandwidth),
        "small": given.kernel_us * 1e-6,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return bound, bounds[bound]


def step_time(ops: Sequence[Op], gpu: Gpu, given: Assumptions, extra_host: float = 0.0) -> Time:
    """The predicted time of a step of these kernels; `extra_host` is host time beside the launches."""
    parts = {"compute": 0.0, "memory": 0.0, "small": 0.0}
    for op in ops:
        bound, seconds = op_seconds(op, gpu, given)
        parts[bound] += seconds
    return Time(**parts, host=len(ops) * given.host_us * 1e-6 + extra_host)


@dataclass(frozen=True)
class Prediction:
    """One method with N adapters on one GPU, averaged over the steps of a cache interval; times in ms, predicted."""

    model: str
    method: str
    adapters: int
    gpu: str
    launches: float
    set_adapters: float
    gflop: float
    gigabytes: float
    compute_ms: float
    memory_ms: float
    small_ms: float
    device_ms: float
    host_ms: float
    waiting_ms: float
    step_ms: float


def predict(
    model: str, method: str, adapters: int, gpu: Gpu, steps: Sequence[Step], given: Assumptions, free: bool = False
) -> Prediction:
    """The average of the steps, each as often as it stands for; `free`: set_adapters takes no time."""
    ops = [step.trace.ops(gpu.arch) for step in steps]
    each = 0.0 if free else getattr(given, f"set_adapters_{model}_ms") * 1e-3
    times = [step_time(kernels, gpu, given, step.set_adapters * each) for kernels, step in zip(ops, steps, strict=True)]

    def mean(values: Iterable[float], unit: float = 1.0) -> float:
        weighted = (step.times * value for step, value in zip(steps, values, strict=True))
        return sum(weighted) / sum(step.times for step in steps) / unit

    return Prediction(
        model,
        WITHOUT if free else method,
        adapters,
        gpu.name,
        launches=mean(map(len, ops)),
        set_adapters=mean(step.set_adapters for step in steps),
        gflop=mean((sum(op.flops for op in kernels) for kernels in ops), 1e9),
        gigabytes=mean((sum(op.bytes for op in kernels) for kernels in ops), 1e9),
        **{
            f"{part}_ms": mean((getattr(time, part) for time in times), 1e-3)
            for part in ("compute", "memory", "small", "device", "host", "waiting", "step")
        },
    )


Traces = dict[tuple[str, int], list[Step]]  # (method, adapters) -> its steps


def trace_all(model: str, wanted: Iterable[tuple[str, int]]) -> Traces:
    """The steps of methods with numbers of adapters; what launches the same for every number is traced once."""
    pipe, once = MetaPipe(model, MOST_ADAPTERS, RANK), functools.cache(MetaPipe.steps)
    return {(method, n): once(pipe, method, MOST_ADAPTERS if method in ALIKE else n) for method, n in wanted}


def predict_all(model: str, traces: Traces, gpus: Iterable[Gpu], given: Assumptions) -> list[Prediction]:
    """Everything that was traced, on every GPU; the loop also with set_adapters free."""
    found = []
    for gpu in gpus:
        for (method, n), steps in traces.items():
            found.append(predict(model, method, n, gpu, steps, given))
            if method == "loop":
                found.append(predict(model, method, n, gpu, steps, given, free=True))
    return found
