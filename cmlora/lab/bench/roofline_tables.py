"""The tables of `benchmarks/roofline.py`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace

from cmlora.lab.bench.roofline import RANK, WITHOUT, Assumptions, Gpu, Prediction, Traces, predict_all
from cmlora.lab.bench.steps import INTERVAL, MODELS
from cmlora.lab.markdown import header, row


def ratio_table(model: str, found: Sequence[Prediction]) -> Iterator[str]:
    """Rows N, columns GPUs: ours in ms, and how many times that the loop takes."""
    by = {(p.method, p.adapters, p.gpu): p.step_ms for p in found}
    gpus = list(dict.fromkeys(p.gpu for p in found))
    yield f"{title(model)}: ms per step of ours,"
    yield "how many times that the PEFT loop takes, and in brackets the same if its set_adapters calls took no time."
    yield ""
    yield from header("N, predicted", *gpus)
    for n in dict.fromkeys(p.adapters for p in found):
        cells = []
        for gpu in gpus:
            ours = by["ours", n, gpu]
            loop, free = by["loop", n, gpu] / ours, by[WITHOUT, n, gpu] / ours
            cells.append(f"{ours:.1f} ms, {loop:.1f}x ({free:.1f}x)")
        yield row(n, *cells)


def counts_table(model: str, found: Sequence[Prediction], gpu: Gpu, adapters: int) -> Iterator[str]:
    """What was counted, per method; ours with the kernels that are chosen on `gpu`."""
    yield f"Counted for {MODELS[model].title}, N = {adapters}, average of a step (ours: kernels chosen for {gpu.name}):"
    yield ""
    yield from header("method", "launches", "set_adapters", "GFLOP", "GB")
    for p in found:
        if p.adapters == adapters and p.gpu == gpu.name and p.method != WITHOUT:
            yield row(p.method, f"{p.launches:.0f}", f"{p.set_adapters:.0f}", f"{p.gflop:.0f}", f"{p.gigabytes:.1f}")


def parts_table(model: str, found: Sequence[Prediction], adapters: int) -> Iterator[str]:
    """Where the time goes, per GPU and method, for one number of adapters."""
    yield f"{title(model)}, N = {adapters}: where the ms of a step go."
    yield "Device = arithmetic + memory + small (kernels bound by each), which is also the step as one CUDA graph;"
    yield "step = the slower of device and host."
    yield ""
    yield from header("GPU, predicted", "method", "arithmetic", "memory", "small", "device", "host", "step")
    for p in found:
        if p.adapters == adapters:
            times = (p.compute_ms, p.memory_ms, p.small_ms, p.device_ms, p.host_ms, p.step_ms)
            yield row(p.gpu, p.method, *(f"{ms:.1f}" for ms in times))


def sensitivity_table(model: str, traces: Traces, gpu: Gpu, adapters: int, given: Assumptions) -> Iterator[str]:
    """The ratio under other assumptions, one at a time."""
    yield f"{title(model)}, N = {adapters}, {gpu.name}:"
    yield "under other assumptions, one at a time."
    yield ""
    yield from header("assumption", "value", "ours, predicted ms", "loop / ours", "loop / ours, set_adapters free")
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
            yield row(name, f"{value:g}", f"{ours.step_ms:.1f}", *(f"{r:.1f}x" for r in ratios))


def title(model: str) -> str:
    """What a table of a model is of."""
    return f"Predicted for {MODELS[model].title}, fp16, N LoRAs of rank {RANK} on attention, cache interval {INTERVAL}"


def assumptions_table(given: Assumptions, gpus: Iterable[Gpu]) -> Iterator[str]:
    """The assumptions and the data sheets."""
    yield from header("assumption", "value", "why")
    for f in fields(given):
        yield row(f.name, f"{getattr(given, f.name):g}", f.metadata["why"])
    yield ""
    yield from header("GPU", "fp16 peak, TFLOP/s", "bandwidth, TB/s", "source")
    for gpu in gpus:
        yield row(gpu.name, f"{gpu.half_flops / 1e12:g}", f"{gpu.bandwidth / 1e12:g}", gpu.source)
