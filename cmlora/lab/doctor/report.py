"""What the doctor says: ten lines for a bug report, and everything as JSON."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import cmlora
from cmlora.lab.doctor.examination import Examination
from cmlora.lab.doctor.findings import Finding
from cmlora.lab.doctor.machine import Machine
from cmlora_kernels.chips import data_sheet, split

FORMAT = 1
SHOWN = 3  # findings that are wrong, by name


def as_dict(found: Examination) -> dict[str, Any]:
    """For JSON."""
    return {
        "format": FORMAT,
        "cmlora": _version(),
        "healthy": found.healthy,
        "machine": asdict(found.machine),
        "findings": [asdict(finding) for finding in found.findings],
        "timed": [{**asdict(timed), "share": timed.share} for timed in found.timed],
        "measured": None if found.measured is None else asdict(found.measured),
        "file": None if found.file is None else str(found.file),
        "file_said": found.file_said,
        "seconds": round(found.seconds, 1),
    }


def machine_lines(machine: Machine) -> list[str]:
    """What there is, and what follows from it."""
    arch, units, _ = split(machine.target)
    what = f"{machine.card}, {arch}, {units} units, {machine.memory / 2**30:.1f} GiB" if not machine.cpu else "no GPU"
    driver = f", driver {machine.driver}" if machine.driver else ""
    versions = f"torch {machine.torch}, triton {machine.triton}, python {machine.python}, {machine.system}"
    return [
        f"cmlora {_version()} on {what}{driver}",
        f"{versions}, C compiler {machine.compiler or 'none'}",
        "; ".join(machine.follows) or "nothing is missing",
    ]


def summary_lines(found: Examination) -> list[str]:
    """Ten lines at most, for a bug report."""
    kernels = [f for f in found.findings if not f.name.startswith(("compose", "torch.compile", "speed"))]
    composed = [f for f in found.findings if f.name.startswith(("compose", "torch.compile"))]
    bad = [f for f in found.findings if f.bad]
    how = {"triton": "", "interpreter": " in the interpreter, small shapes", "definition": " as definitions"}
    lines = [
        *machine_lines(found.machine),
        f"kernels{how[found.machine.backend]}: {_counted(kernels)}",
        f"compositions: {_counted(composed)}",
        _speed_line(found),
        _strategy_line(found),
        _file_line(found),
    ]
    if bad:
        more = f", and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        lines.append("WRONG: " + "; ".join(f"{f.name}: {f.detail}"[:160] for f in bad[:SHOWN]) + more)
    lines.append(f"{'healthy' if found.healthy else 'NOT healthy'}, {found.seconds:.0f} s")
    return lines


def _counted(findings: Sequence[Finding]) -> str:
    counts = collections.Counter(finding.state for finding in findings)
    said = ", ".join(f"{counts[state]} {state}" for state in ("right", "wrong", "failed", "left out") if counts[state])
    worst = max((f for f in findings if f.error is not None and f.allowed), key=_used, default=None)
    return f"{said or 'none'}" + (f"; nearest to its bound: {worst.name}, {_used(worst):.0%}" if worst else "")


def _used(finding: Finding) -> float:
    if finding.error is None or not finding.allowed or finding.error != finding.error:
        return 0.0
    return finding.error / finding.allowed


def _speed_line(found: Examination) -> str:
    measured, cpu = found.measured, found.machine.cpu
    if measured is None:
        return "speed: not measured"
    sheet = "" if cpu else _of_the_sheet(found)
    where = "CPU, float32, cut shapes, definitions: " if cpu else ""
    half = "" if cpu else f"fp16 GEMM {measured.half_flops / 1e12:.1f} TFLOP/s, "
    return (
        f"speed: {where}{half}fp32 GEMM {measured.float_flops / 1e12:.2f} TFLOP/s, copy "
        f"{measured.bandwidth / 1e9:.0f} GB/s{sheet}, a launch {measured.launch_seconds * 1e6:.1f} us of the host"
    )


def _of_the_sheet(found: Examination) -> str:
    assert found.measured is not None
    known = data_sheet(*split(found.machine.target))
    half, copied = found.measured.half_flops / known.half_flops, found.measured.bandwidth / known.bandwidth
    return f" ({half:.0%} and {copied:.0%} of {known.name}'s data sheet)"


def _strategy_line(found: Examination) -> str:
    if not found.timed:
        return "strategies: not measured"
    over = {
        name: statistics.median(getattr(timed, name) / timed.library for timed in found.timed)
        for name in ("fused", "add", "merged")
    }
    best = collections.Counter(min(("fused", "add"), key=lambda name: getattr(t, name)) for t in found.timed)
    agreed = sum(t.chosen == min(("fused", "add"), key=lambda name: getattr(t, name)) for t in found.timed)
    listed = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in over.items())
    return (
        f"strategies over the library's GEMM without LoRA (median of {len(found.timed)} shapes): {listed}; faster: "
        f"{', '.join(f'{name} on {count}' for name, count in best.items())}; the model agreed on {agreed}"
    )


def _file_line(found: Examination) -> str:
    said = f"; before: {found.file_said}" if found.file_said else ""
    if found.file is None:
        return f"card's file: not written{said}"
    used = " (nothing reads it: there is no card)" if found.machine.cpu else ""
    return f"card's file: {found.file}{used}{said}"


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(cmlora.__name__)
    except PackageNotFoundError:
        return "from source"
