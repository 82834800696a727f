"""The first part: kernel variants against their float64 definitions.

Run as a module it prints one JSON line a check.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator

import torch

from cmlora.lab.doctor.cases import Case, Results, small_layers, variants_of
from cmlora.lab.doctor.findings import Finding, announce, judge, send
from cmlora.lab.doctor.step_cases import step_cases
from cmlora_kernels.launch import arch_of

RANKS = (16, 32, 64, 128)


def cases(device: torch.device, backend: str) -> list[Case]:
    """What is checked on a device, the most usual first.

    Args:
        device: where. backend: "triton": all variants of fp16, and of bf16 and fp32 at rank 16; "interpreter" and
            "definition": small shapes, in which every kernel occurs.
    """
    if backend != "triton":
        half = (torch.float16,)  # bfloat16 is run by its definition: the interpreter's tl.dot misreads it
        return [
            *small_layers(half, (16, 136)),
            *small_layers((torch.float32,), (8,)),
            *step_cases(torch.float16, 24, 16),
            *step_cases(torch.float32, 24, 16),
        ]
    target = arch_of(device)
    odd = [*small_layers((torch.float16, torch.bfloat16, torch.float32), RANKS, tokens=77)]
    steps = [case for dtype in (torch.float16, torch.float32) for size in (64, 128) for case in step_cases(dtype, size)]
    layers = variants_of(target, torch.float16, (16,))
    known = {case.name for case in layers}
    wider = [case for case in variants_of(target, torch.float16, RANKS) if case.name not in known]
    others = [case for dtype in (torch.bfloat16, torch.float32) for case in variants_of(target, dtype, (16,))]
    return [*steps, *layers, *odd, *wider, *others]


def check(case: Case, device: torch.device) -> Finding:
    """Run one case and compare: at most the definition's error and one rounding of the largest value.

    float32 is summed in another order, and on matrix units is three products of shorter numbers (tf32x3, bf16x6): eight
    units in the last place are right there.
    """
    start = time.perf_counter()
    try:
        found = case.run(device)
        error, allowed = _errors(found)
    except Exception as error_of_the_case:  # whatever it is, it is what the doctor was asked for
        text = f"{type(error_of_the_case).__name__}: {error_of_the_case}"
        return Finding(case.name, "failed", text[:300], seconds=time.perf_counter() - start)
    return judge(case.name, error, allowed, time.perf_counter() - start)


def _errors(found: Results) -> tuple[float, float]:
    """The kernel's largest error, and the largest that is right."""
    scale = found.exact.abs().max().item()
    ulps = 8.0 if found.got.dtype == torch.float32 else 0.5
    rounding = ulps * torch.finfo(found.got.dtype).eps * scale
    error, of_definition = ((t.double() - found.exact).abs().max().item() for t in (found.got, found.definition))
    return (error if found.whole.isfinite().all() else float("nan")), of_definition + rounding


@torch.inference_mode()
def check_all(wanted: Iterable[Case], device: torch.device, seconds: float) -> Iterator[Finding]:
    """Findings as they come; after so many seconds the rest is left out, each by name."""
    end = time.perf_counter() + seconds
    for case in wanted:
        if time.perf_counter() > end:
            yield Finding(case.name, "left out", "no time left")
            continue
        announce(case.name)
        yield check(case, device)


def main() -> None:
    """Arguments: the backend, seconds, and how many cases to pass over (those that a process before this one did)."""
    backend, seconds, skip = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    send(check_all(cases(device, backend)[skip:], device, seconds))


if __name__ == "__main__":
    main()
