"""Ahead-of-time compilation of everything that the library launches, and what the compiled code says. No GPU needed.

for row in inspect_kernels(targets=["sm_90"]):
    print(row.kernel, row.variant, row.registers, row.spill_bytes)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from cmlora_kernels.cards import chip
from cmlora_kernels.chips import LAUNCH_SECONDS, TARGETS, UNITS
from cmlora_kernels.launch import Launch
from cmlora_kernels.machine_code import MachineCode, read_amdgcn, read_cubin
from cmlora_kernels.triton_shim import HAS_TRITON
from cmlora_kernels.variants import DTYPES, MODELS, UNETS, Variant, variants

INSPECTED_RANKS = (16,)  # the other buckets: `ranks=`; compiling all of them takes over half an hour


@dataclass(frozen=True)
class KernelReport:
    """One compiled variant on one target.

    Attributes:
        kernel: its file and name, e.g. "multi_lora_linear". variant: the shape that moves most bytes.
        others: further shapes that run the same code.
        registers ... narrow_access_bytes: see `MachineCode`.
        shared_bytes, shared_limit: shared memory of a block, and the most that the chip allows.
        occupancy: resident warps by registers, shared memory and block slots, as a share of the chip's most.
        bytes: loaded and stored by all programs; unique_bytes: every element once; flops: 2 per multiply-add.
        intensity: flops per unique byte.
        bound: "memory", "compute", or "launch" where the predicted time is below that of the launch itself.
    """

    kernel: str
    variant: str
    model: str
    target: str
    dtype: str
    others: int
    registers: int
    spill_bytes: int
    local_bytes: int
    shared_bytes: int
    shared_limit: int
    occupancy: float
    tensor_core: str
    async_copy: str
    access_bytes: int
    narrow_access_bytes: int
    bytes: int
    unique_bytes: int
    flops: int
    intensity: float
    bound: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def inspect_kernels(
    targets: Iterable[str] = TARGETS,
    models: Iterable[str] = tuple(UNETS),
    dtypes: Iterable[torch.dtype] = DTYPES,
    ranks: Iterable[int] = INSPECTED_RANKS,
    processes: int = 2,
) -> Iterator[KernelReport]:
    """Compile what the library launches, one row per compiled code, as the compilers finish, in a fixed order.

    Args:
        targets: of `TARGETS`. models: of "sd15", "sdxl", "flux", each with 2 to 5 adapters.
        dtypes: float16, bfloat16, float32. ranks: of the LoRAs.
        processes: compilers at once.

    Raises:
        ValueError: an unknown target or model.
        RuntimeError: triton is not installed, or a variant does not compile; it names the variant and the target.
    """
    targets, models, dtypes, ranks = tuple(targets), tuple(models), tuple(dtypes), tuple(ranks)
    for name, given, known in (("targets", targets, TARGETS), ("models", models, MODELS)):
        if unknown := set(given) - set(known):
            raise ValueError(f"{name} must be of {known}, got {sorted(unknown)}")
    jobs = [(target, models, dtypes, ranks, i) for target in targets for i in _indices(target, models, dtypes, ranks)]
    yield from _in_processes(_inspect_job, jobs, processes)


def inspect_launch(launch: Launch, target: str, model: str = "", dtype: str = "", others: int = 0) -> KernelReport:
    """Compile one launch for one target, in this process; not under TRITON_INTERPRET."""
    compiled = compile_launch(launch, target)
    code, limit = _machine_code(compiled, target), chip(target)
    seconds = max(
        launch.flops / (limit.float_flops if dtype == "float32" else limit.half_flops),
        launch.unique_bytes / limit.bandwidth,
    )
    memory_bound = seconds == launch.unique_bytes / limit.bandwidth
    return KernelReport(
        kernel=kernel_name(launch),
        variant=launch.name,
        model=model,
        target=target,
        dtype=dtype,
        others=others,
        **dataclasses.asdict(code),
        shared_bytes=compiled.metadata.shared,
        shared_limit=limit.shared,
        occupancy=occupancy(code.registers, compiled.metadata.shared, launch.num_warps, target),
        bytes=launch.bytes,
        unique_bytes=launch.unique_bytes,
        flops=launch.flops,
        intensity=round(launch.flops / launch.unique_bytes, 2),
        bound="launch" if seconds < LAUNCH_SECONDS else "memory" if memory_bound else "compute",
    )


def compile_launch(launch: Launch, target: str) -> Any:
    """Triton's compiled kernel for a target such as "sm_90" or "gfx942".

    Raises:
        RuntimeError: triton is not installed, runs as interpreter, or cannot compile the launch.
    """
    if not HAS_TRITON:
        raise RuntimeError("inspecting kernels needs triton, which is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels cannot be compiled in a process that runs them in Triton's interpreter")
    import triton

    gpu = gpu_target(target)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    try:
        return triton.compile(launch.source(gpu), target=gpu, options=options)
    except Exception as error:
        raise RuntimeError(f"{kernel_name(launch)} ({launch.name}) does not compile for {target}: {error}") from error


def gpu_target(target: str) -> Any:
    """Triton's name of a target such as "sm_90" or "gfx942"."""
    from triton.backends.compiler import GPUTarget

    if target.startswith("sm_"):
        return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)


def kernel_name(launch: Launch) -> str:
    """The kernel's file, and its own name where that adds something."""
    module = launch.kernel.__module__.rsplit(".", 1)[-1]
    name = launch.kernel.__name__.removesuffix("_kernel")
    return module if name in module else f"{module}.{name}"


def occupancy(registers: int, shared: int, num_warps: int, target: str) -> float:
    """Resident warps of a unit as a share of the most it holds."""
    unit = UNITS[target]
    allocated = math.ceil(max(registers, 1) / unit.step) * unit.step
    per_scheduler = unit.registers // unit.schedulers // allocated
    blocks = min(per_scheduler * unit.schedulers // num_warps, unit.blocks, unit.warps // num_warps)
    if shared:
        blocks = min(blocks, unit.shared // (shared + unit.reserved))
    return round(blocks * num_warps / unit.warps, 3)


COLUMNS = {
    "kernel": "kernel",
    "target": "target",
    "dtype": "dtype",
    "variant": "variant",
    "registers": "regs",
    "spill_bytes": "spill",
    "shared_bytes": "shared",
    "occupancy": "occ",
    "tensor_core": "matrix",
    "async_copy": "async",
    "access_bytes": "B/access",
    "bytes": "MB",
    "intensity": "flop/B",
    "bound": "bound",
}


def write_table(rows: Iterable[KernelReport], file: TextIO | None = None) -> None:
    """Write rows as they come; widths are fixed, so the first appears before the last is compiled."""
    file = file or sys.stdout
    widths = [27, 8, 9, 52, 5, 5, 7, 6, 9, 8, 8, 9, 8, 8]
    file.write("".join(f"{title:<{w}}" for title, w in zip(COLUMNS.values(), widths, strict=True)).rstrip() + "\n")
    for row in rows:
        values = {**row.as_dict(), "bytes": f"{row.bytes / 1e6:.1f}", "occupancy": f"{row.occupancy:.0%}"}
        cells = (f"{values[name]!s:<{w - 1}} " for name, w in zip(COLUMNS, widths, strict=True))
        file.write("".join(cells).rstrip() + "\n")
        file.flush()


def _machine_code(compiled: Any, target: str) -> MachineCode:
    if not target.startswith("sm_"):
        return read_amdgcn(compiled.asm["amdgcn"])
    import triton

    return read_cubin(compiled.asm["cubin"], Path(triton.__file__).parent / "backends/nvidia/bin")


@functools.lru_cache(maxsize=16)
def _variants(
    target: str, models: tuple[str, ...], dtypes: tuple[torch.dtype, ...], ranks: tuple[int, ...]
) -> Sequence[Variant]:
    return variants(target, models, dtypes, ranks)


def _indices(*question: Any) -> range:
    return range(len(_variants(*question)))


def _inspect_job(job: tuple[Any, ...]) -> KernelReport:
    """Kernels cannot be pickled; a worker finds the variant anew by its number."""
    *question, number = job
    variant = _variants(*question)[number]
    dtype = str(variant.dtype).removeprefix("torch.")
    return inspect_launch(variant.launch, question[0], variant.model, dtype, variant.others)


def _in_processes(function: Any, jobs: Sequence[Any], processes: int) -> Iterator[Any]:
    """function over jobs in order, in fresh processes: this one may have chosen the interpreter."""
    context = multiprocessing.get_context("spawn")
    with _without_interpreter(), ProcessPoolExecutor(processes, mp_context=context) as pool:
        yield from pool.map(function, jobs, chunksize=4)


@contextmanager
def _without_interpreter() -> Iterator[None]:
    chosen = os.environ.pop("TRITON_INTERPRET", None)
    try:
        yield
    finally:
        if chosen is not None:
            os.environ["TRITON_INTERPRET"] = chosen
