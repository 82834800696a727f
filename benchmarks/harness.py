"""What every benchmark shares: it refuses to time a wrong result, alternates the rivals and writes JSONL.

On a GPU it times the kernels with CUDA events. Without one it times the torch definitions on the CPU, and prints the
counted bytes of the kernels and the ratio that they predict, called predicted.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.float16 if GPU else torch.float32
BACKEND = "triton" if GPU else "torch"
OUTPUT = Path(os.environ.get("CMLORA_BENCHMARKS", "benchmarks.jsonl"))


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of one call, averaged over `repeats` calls in a row."""
    if not GPU:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / repeats


def check(results: Mapping[str, Callable[[], Any]], want: torch.Tensor, tolerance: float) -> None:
    """Raise AssertionError, naming the rival, unless every result is within `tolerance` of the largest value."""
    for name, run in results.items():
        error = ((run().double().cpu() - want.double().cpu()).abs().max() / want.abs().max().cpu()).item()
        assert error <= tolerance, f"{name} is wrong by {error:.1e} (allowed {tolerance:.1e}): not timed"


def compare(
    case: str,
    rivals: Mapping[str, Callable[[], Any]],
    want: torch.Tensor,
    tolerance: float,
    kernel_bytes: int,
    rival_bytes: Mapping[str, int],
    pairs: int = 7,
    repeats: int = 3,
) -> dict[str, Any]:
    """Check all, then time ours (the first) against each rival in alternating pairs; print and write what came out.

    Args:
        case: shape and what is computed. rivals: name -> call; the first is ours.
        want: the right result; tolerance: relative to its largest value.
        kernel_bytes: what our kernels move, counted; rival_bytes: the same per rival, counted by hand.
    """
    check(rivals, want, tolerance)
    (ours, run_ours), *others = rivals.items()
    record: dict[str, Any] = {"case": case, "device": _device(), "kernel_bytes": kernel_bytes, "rivals": {}}
    for name, run in others:
        times = [(seconds(run_ours, repeats), seconds(run, repeats)) for _ in range(pairs)]
        mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
        row: dict[str, Any] = {"ours_s": mine, "rival_s": theirs, "ratio": statistics.median(b / a for a, b in times)}
        if name in rival_bytes:
            row["rival_bytes"] = rival_bytes[name]
            row["predicted_ratio"] = rival_bytes[name] / kernel_bytes
        record["rivals"][name] = row
        _print(case, ours, name, row, kernel_bytes)
    with OUTPUT.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def compare_calls(
    case: str, ours: Callable[[], Any], rival: Callable[[], Any], error: float | None, pairs: int = 3
) -> dict[str, Any]:
    """Time whole calls in alternating pairs; print and write medians and the median ratio.

    Args:
        case: what is compared. error: relative difference of the two results; None where they are not alike by design.
    """
    times = [(seconds(ours, 1), seconds(rival, 1)) for _ in range(pairs)]
    mine, theirs = (statistics.median(side) for side in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    record = {"case": case, "device": _device(), "ours_s": mine, "rival_s": theirs, "time_ratio": ratio, "error": error}
    alike = "" if error is None else f", latents differ by {error:.1e}"
    print(f"\n{case}: {mine:.3f} s against {theirs:.3f} s, {ratio:.2f}x the time{alike}")
    with OUTPUT.open("a") as file:
        file.write(json.dumps(record) + "\n")
    return record


def _print(case: str, ours: str, name: str, row: Mapping[str, Any], kernel_bytes: int) -> None:
    what = ours if GPU else f"{ours} (torch definition, CPU)"
    print(
        f"\n{case}: {what} {row['ours_s'] * 1e6:.0f} us, {name} {row['rival_s'] * 1e6:.0f} us, ratio {row['ratio']:.2f}"
    )
    if "predicted_ratio" in row:
        print(
            f"  kernels move {kernel_bytes / 1e6:.2f} MB, {name} {row['rival_bytes'] / 1e6:.2f} MB: "
            f"predicted ratio on a GPU {row['predicted_ratio']:.2f} (bytes alone, launches not counted)"
        )


def _device() -> str:
    return torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads"
