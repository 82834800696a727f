"""Predicted milliseconds per denoising step on GPUs, from the trace of real steps on `meta` and from data sheets.

    python benchmarks/roofline.py [--model sd15|sdxl] [--adapters 1 2 ...] [--gpus H100 ...] [--out DIR]

Prints the assumptions and the tables; --out writes every figure as JSON and a plot per model (matplotlib, the `plots`
extra). Nothing is measured: a kernel takes as long as the slowest of its arithmetic, its memory traffic and the least
time of a kernel; a step takes as long as the slower of device and host. What that leaves out: csrc_docs/roofline.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, it finds its neighbours and the peer

from benchmarks.counting import Op
from benchmarks.steps import INTERVAL, MODELS, MetaPipe, Step
from cmlora_kernels.tiles import BLAS_SHARE, CHIPS, TRITON_SHARE

RANK, MOST_ADAPTERS = 16, 8
WITHOUT = "loop, set_adapters free"  # a rival that exists on paper only


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet.

    Attributes:
        name: in tables. arch: the target that our kernels are chosen for.
        half_flops: fp16 matrix peak per second with fp32 accumulation, dense. bandwidth: bytes per second.
        source: where the two stand.
    """

    name: str
    arch: str
    half_flops: float
    bandwidth: float
    source: str


def _listed(name: str, arch: str, source: str) -> Gpu:
    """A GPU whose peaks the kernels' own cost model has already."""
    return Gpu(name, arch, CHIPS[arch].half_flops, CHIPS[arch].bandwidth, source)


GPUS = {
    "4090": Gpu(
        "RTX 4090", "sm_89", 165.2e12, 1.008e12, "NVIDIA Ada GPU Architecture whitepaper, RTX 4090, fp32 accumulate"
    ),
    "L4": Gpu("L4", "sm_89", 121e12, 0.3e12, "NVIDIA L4 Tensor Core GPU datasheet (242 with sparsity)"),
    "A100": _listed("A100 SXM", "sm_80", "NVIDIA A100 80GB Tensor Core GPU datasheet, SXM"),
    "H100": _listed("H100 SXM", "sm_90", "NVIDIA H100 Tensor Core GPU datasheet, SXM (1,979 with sparsity)"),
    "H200": Gpu("H200", "sm_90", 989e12, 4.8e12, "NVIDIA H200 Tensor Core GPU datasheet, SXM (1,979 with sparsity)"),
    "MI300X": _listed("MI300X", "gfx942", "AMD Instinct MI300X Accelerator data sheet"),
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
    library_share: float = _assume(BLAS_SHARE, "of the matrix peak in cuBLAS, cuDNN and their like (tiles.BLAS_SHARE)")
    triton_share: float = _assume(
        TRITON_SHARE, "of library_share in our Triton GEMMs, whole tiles counted (tiles.TRITON_SHARE)"
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
    share = {
        "none": 1.0,  # no matrix work
        "library": given.library_share,
        "triton": given.library_share * given.triton_share,
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
    """The average of the steps; `free`: set_adapters takes no time."""
    ops = [step.trace.ops(gpu.arch) for step in steps]
    each = 0.0 if free else getattr(given, f"set_adapters_{model}_ms") * 1e-3
    times = [step_time(kernels, gpu, given, step.set_adapters * each) for kernels, step in zip(ops, steps, strict=True)]

    def mean(values: Iterable[float], unit: float = 1.0) -> float:
        return sum(values) / len(steps) / unit

    return Prediction(
        model,
        WITHOUT if free else method,
        adapters,
        gpu.name,
        launches=mean(map(len, ops)),
        set_adapters=mean(step.set_adapters for step in steps),
        gflop=mean((op.flops for op in itertools.chain(*ops)), 1e9),
        gigabytes=mean((op.bytes for op in itertools.chain(*ops)), 1e9),
        **{
            f"{part}_ms": mean((getattr(time, part) for time in times), 1e-3)
            for part in ("compute", "memory", "small", "device", "host", "waiting", "step")
        },
    )


Traces = dict[tuple[str, int], list[Step]]  # (method, adapters) -> its steps


def trace_all(model: str, adapters: Iterable[int], methods: Iterable[str]) -> Traces:
    """The steps of all methods; the plain pipeline knows no adapters and is traced once."""
    pipe, traces = MetaPipe(model, MOST_ADAPTERS, RANK), {}
    plain = pipe.steps("plain", 1) if "plain" in methods else []
    for n in adapters:
        for method in methods:
            traces[method, n] = plain if method == "plain" else pipe.steps(method, n)
    return traces


def predict_all(model: str, traces: Traces, gpus: Iterable[Gpu], given: Assumptions) -> list[Prediction]:
    """Everything that was traced, on every GPU; the loop also with set_adapters free."""
    found = []
    for gpu in gpus:
        for (method, n), steps in traces.items():
            found.append(predict(model, method, n, gpu, steps, given))
            if method == "loop":
                found.append(predict(model, method, n, gpu, steps, given, free=True))
    return found


def ratio_table(model: str, found: Sequence[Prediction]) -> Iterator[str]:
    """Rows N, columns GPUs: ours in ms, and how many times that the loop takes."""
    by = {(p.method, p.adapters, p.gpu): p.step_ms for p in found}
    gpus = list(dict.fromkeys(p.gpu for p in found))
    yield f"{_title(model)}: ms per step of ours,"
    yield "how many times that the PEFT loop takes, and in brackets the same if its set_adapters calls took no time."
    yield ""
    yield from _header("N, predicted", *gpus)
    for n in dict.fromkeys(p.adapters for p in found):
        cells = []
        for gpu in gpus:
            ours = by["ours", n, gpu]
            loop, free = by["loop", n, gpu] / ours, by[WITHOUT, n, gpu] / ours
            cells.append(f"{ours:.1f} ms, {loop:.1f}x ({free:.1f}x)")
        yield _row(n, *cells)


def counts_table(model: str, found: Sequence[Prediction], gpu: Gpu, adapters: int) -> Iterator[str]:
    """What was counted, per method; ours with the kernels that are chosen on `gpu`."""
    yield f"Counted for {MODELS[model].title}, N = {adapters}, average of a step (ours: kernels chosen for {gpu.name}):"
    yield ""
    yield from _header("method", "launches", "set_adapters", "GFLOP", "GB")
    for p in found:
        if p.adapters == adapters and p.gpu == gpu.name and p.method != WITHOUT:
            yield _row(p.method, f"{p.launches:.0f}", f"{p.set_adapters:.0f}", f"{p.gflop:.0f}", f"{p.gigabytes:.1f}")


def parts_table(model: str, found: Sequence[Prediction], adapters: int) -> Iterator[str]:
    """Where the time goes, per GPU and method, for one number of adapters."""
    yield f"{_title(model)}, N = {adapters}: where the ms of a step go."
    yield "Device = arithmetic + memory + small (kernels bound by each), which is also the step as one CUDA graph;"
    yield "step = the slower of device and host."
    yield ""
    yield from _header("GPU, predicted", "method", "arithmetic", "memory", "small", "device", "host", "step")
    for p in found:
        if p.adapters == adapters:
            times = (p.compute_ms, p.memory_ms, p.small_ms, p.device_ms, p.host_ms, p.step_ms)
            yield _row(p.gpu, p.method, *(f"{ms:.1f}" for ms in times))


def sensitivity_table(model: str, traces: Traces, gpu: Gpu, adapters: int, given: Assumptions) -> Iterator[str]:
    """The ratio under other assumptions, one at a time."""
    yield f"{_title(model)}, N = {adapters}, {gpu.name}:"
    yield "under other assumptions, one at a time."
    yield ""
    yield from _header("assumption", "value", "ours, predicted ms", "loop / ours", "loop / ours, set_adapters free")
    for name, values in (
        ("host_us", (5, 10, 20, 40)),
        ("kernel_us", (2, 5)),
        ("library_share", (0.4, 0.8)),
        ("attention_share", (0.2, 0.6)),
        ("bandwidth_share", (0.6, 1.0)),
    ):
        for value in values:
            other = replace(given, **{name: value})
            some = {key: steps for key, steps in traces.items() if key in (("ours", adapters), ("loop", adapters))}
            by = {p.method: p for p in predict_all(model, some, [gpu], other)}
            ours = by["ours"]
            ratios = (by[method].step_ms / ours.step_ms for method in ("loop", WITHOUT))
            yield _row(name, f"{value:g}", f"{ours.step_ms:.1f}", *(f"{r:.1f}x" for r in ratios))


def _title(model: str) -> str:
    return f"Predicted for {MODELS[model].title}, fp16, N LoRAs of rank {RANK} on attention, cache interval {INTERVAL}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _header(*names: str) -> Iterator[str]:
    yield _row(*names)
    yield _row(*["---"] * len(names))


def assumptions_table(given: Assumptions, gpus: Iterable[Gpu]) -> Iterator[str]:
    """The assumptions and the data sheets."""
    yield from _header("assumption", "value", "why")
    for f in fields(given):
        yield _row(f.name, f"{getattr(given, f.name):g}", f.metadata["why"])
    yield ""
    yield from _header("GPU", "fp16 peak, TFLOP/s", "bandwidth, TB/s", "source")
    for gpu in gpus:
        yield _row(gpu.name, f"{gpu.half_flops / 1e12:g}", f"{gpu.bandwidth / 1e12:g}", gpu.source)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Predicted ms per denoising step on GPUs.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--adapters", nargs="+", type=int, choices=range(1, MOST_ADAPTERS + 1), metavar="N")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--brief", action="store_true", help="the table of ratios alone")
    parser.add_argument("--out", type=Path, help="folder for roofline.json and a plot per model")
    args = parser.parse_args(arguments)
    given, gpus = Assumptions(), [GPUS[name] for name in args.gpus]
    adapters = args.adapters or range(1, MOST_ADAPTERS + 1)
    shown = 5 if 5 in adapters else adapters[-1]
    everything: list[Prediction] = []
    if not args.brief:
        print(*assumptions_table(given, gpus), sep="\n")
    for model in args.model:
        traces = trace_all(model, adapters, ("loop", "ours") if args.brief else ("plain", "merge", "loop", "ours"))
        found = predict_all(model, traces, gpus, given)
        everything += found
        tables = [ratio_table(model, found)]
        if not args.brief:
            gpu = GPUS["H100"] if "H100" in args.gpus else gpus[0]
            tables += [counts_table(model, found, gpu, shown), parts_table(model, found, shown)]
            tables.append(sensitivity_table(model, traces, gpu, shown, given))
        for table in tables:
            print("", *table, sep="\n")
        if args.out:
            from benchmarks.roofline_plot import plot

            args.out.mkdir(parents=True, exist_ok=True)
            plot(_title(model), found, args.out / f"roofline_{model}.png")
    if args.out:
        record = {"predicted": [asdict(p) for p in everything], "assumptions": asdict(given)}
        (args.out / "roofline.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
