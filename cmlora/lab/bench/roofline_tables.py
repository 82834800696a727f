"""The tables of `benchmarks/roofline.py`, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

from cmlora.lab.bench.roofline import RANK, WITHOUT, Assumptions, Gpu, Prediction, Traces, predict_all
from cmlora.lab.bench.steps import INTERVAL, MODELS, RUN
from cmlora.lab.markdown import header, row

OURS = ("cmlora", "routed", "merge")
NAMES = {
    "cmlora": "cmlora, the default",
    "routed": f"routed, of a run of {RUN} steps",
    "merge": "merge, merged weights",
    "plain": "plain pipeline, no LoRA or fused by PEFT",
}


def times_table(model: str, found: Sequence[Prediction]) -> Iterator[str]:
    """Rows N and method, columns GPUs: ms, and for cmlora how many times that the loop takes."""
    by = {(p.method, p.adapters, p.gpu): p.step_ms for p in found}
    gpus = list(dict.fromkeys(p.gpu for p in found))
    yield f"{title(model)}: ms per step."
    yield "Behind cmlora's how many times that the PEFT loop takes, in brackets with its set_adapters for free."
    yield "The loop computes the papers' mean; the default, local, runs the base model besides."
    yield ""
    yield from header("N", "ms of a step, predicted", *gpus)
    for n in dict.fromkeys(p.adapters for p in found):
        for method in OURS:
            if (method, n, gpus[0]) in by:
                yield row(n, NAMES[method], *(_cell(by, method, n, gpu) for gpu in gpus))
    n = found[0].adapters
    yield row("any", NAMES["plain"], *(_cell(by, "plain", n, gpu) for gpu in gpus))


def _cell(by: Mapping[tuple[str, int, str], float], method: str, n: int, gpu: str) -> str:
    ms = by[method, n, gpu]
    if method != "cmlora":
        return f"{ms:.1f} ms"
    return f"{ms:.1f} ms, {by['loop', n, gpu] / ms:.1f}x ({by[WITHOUT, n, gpu] / ms:.1f}x)"


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
    yield from header("assumption", "value", "cmlora, predicted ms", "loop / cmlora", "set_adapters free")
    for name, values in (
        ("host_us", (5, 10, 20, 40)),
        ("kernel_us", (2, 5)),
        ("size_share", (0.5, 1.0)),
        ("triton_share", (0.65, 1.0)),
        ("attention_share", (0.2, 0.6)),
        ("bandwidth_share", (0.6, 1.0)),
    ):
        for value in values:
            other = replace(given, **{name: value})
            some = {key: steps for key, steps in traces.items() if key in (("cmlora", adapters), ("loop", adapters))}
            by = {p.method: p for p in predict_all(model, some, [gpu], other)}
            ours = by["cmlora"]
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
    yield from header(
        "GPU", "fp16 peak, TFLOP/s", "bandwidth, TB/s", "source", "best share of the peak", "who measured it"
    )
    for gpu in gpus:
        peak, bandwidth = f"{gpu.half_flops / 1e12:g}", f"{gpu.bandwidth / 1e12:g}"
        yield row(gpu.name, peak, bandwidth, gpu.source, f"{gpu.best:g}", gpu.best_source)
