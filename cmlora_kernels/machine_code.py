"""What a compiled kernel is made of, read from its machine code: registers, spills, instructions.

NVIDIA: the cubin, through cuobjdump and nvdisasm of triton's wheel. AMD: the assembly that Triton keeps, with its
metadata. The main loop is the innermost one that loads from global memory. One with matrix instructions goes before
others, and of those one that stores nothing: where it stores, it expands what another loop has summed. A kernel without
such a loop is taken as a whole.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


@dataclass(frozen=True)
class MachineCode:
    """What the machine code says.

    Attributes:
        registers: per thread (AMD: vector registers, accumulation registers included).
        spill_bytes: bytes per thread of registers kept in memory: stores to local memory (NVIDIA), spilled vector
            registers (AMD).
        local_bytes: per thread: stack frame and local memory.
        tensor_core: the matrix instruction, "" if none.
        async_copy: how the main loop copies global to shared memory past the registers, "" where any of its loads
            does not.
        access_bytes: widest global load of the main loop, per thread; narrow_access_bytes the narrowest one.
    """

    registers: int
    spill_bytes: int
    local_bytes: int
    tensor_core: str
    async_copy: str
    access_bytes: int
    narrow_access_bytes: int


class Words(NamedTuple):
    """How an assembler writes what a main loop is known by; `branch` captures the label."""

    branch: re.Pattern[str]
    load: re.Pattern[str]
    store: re.Pattern[str]
    matrix: re.Pattern[str]


NVIDIA = Words(
    branch=re.compile(r"\bBRA(?:\.\w+)* (?:!?\w+, )?`\((\.L_[\w.]+)\)"),
    load=re.compile(r"\b(LDG|LDGSTS|UTMALDG)\b([.\w]*)"),
    store=re.compile(r"\bSTG\b"),
    matrix=re.compile(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)[.\w]*"),
)
AMD = Words(
    branch=re.compile(r"\bs_c?branch\w* (\.LBB\w+)"),
    load=re.compile(r"\b(?:global|buffer|flat)_load_(\w+)"),
    store=re.compile(r"\b(?:global|buffer|flat)_store_"),
    matrix=re.compile(r"\bv_(s?mfmac?|wmma)_\w+"),
)
_NV_NAMES = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
_NV_ASYNC = {"LDGSTS": "cp.async", "UTMALDG": "tma"}
_LABEL = re.compile(r"^(\.L\w[\w.]*):")
_AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


def read_cubin(cubin: bytes, tools: Path) -> MachineCode:
    """Read a cubin with the cuobjdump and nvdisasm found in `tools`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read_sass(
            _output(tools / "nvdisasm", "-c", file.name), _output(tools / "cuobjdump", "-res-usage", file.name)
        )


def read_sass(code: str, usage: str) -> MachineCode:
    """Read what nvdisasm says of a cubin, and cuobjdump of its resources."""
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    matrix = NVIDIA.matrix.search(code)
    # every spill slot is stored at least once; wider stores spill several registers
    slots = {m[1]: _nvidia_width(m[0]) for m in re.finditer(r"\bSTL[.\w]* (\[[^\]]+\])", code)}
    loads = [m for line in main_loop(code.splitlines(), NVIDIA) if (m := NVIDIA.load.search(line))]
    widths = [16 if m[1] == "UTMALDG" else _nvidia_width(m[2]) for m in loads]
    copies = {_NV_ASYNC.get(m[1], "") for m in loads}
    return MachineCode(
        registers=int(found["REG"]),
        spill_bytes=sum(slots.values()),
        local_bytes=int(found["STACK"]) + int(found["LOCAL"]),
        tensor_core=_NV_NAMES.get(matrix[1], matrix[1]) if matrix else "",
        async_copy="" if "" in copies else "+".join(sorted(copies)),
        access_bytes=max(widths, default=0),
        narrow_access_bytes=min(widths, default=0),
    )


def read_amdgcn(assembly: str) -> MachineCode:
    """Read AMD assembly as Triton keeps it (`asm["amdgcn"]`)."""
    meta = {name: int(n) for name, n in re.findall(r"^\s+\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    matrix = AMD.matrix.search(assembly)
    loads = [(line, m[1]) for line in main_loop(assembly.splitlines(), AMD) if (m := AMD.load.search(line))]
    widths = [_amd_width(suffix) for _, suffix in loads]
    direct = [suffix.startswith("lds_") or line.rstrip().endswith(" lds") for line, suffix in loads]
    return MachineCode(
        registers=meta["vgpr_count"],
        spill_bytes=4 * meta["vgpr_spill_count"],
        local_bytes=meta["private_segment_fixed_size"],
        tensor_core=matrix[1] if matrix else "",
        async_copy="global_load_lds" if direct and all(direct) else "",
        access_bytes=max(widths, default=0),
        narrow_access_bytes=min(widths, default=0),
    )


def main_loop(code: list[str], words: Words) -> list[str]:
    """The lines of the main loop as the module's head defines it."""

    def has(loop: list[str], word: re.Pattern[str]) -> bool:
        return any(word.search(line) for line in loop)

    loaded = [loop for loop in _loops(code, words.branch) if has(loop, words.load)]
    multiplying = [loop for loop in loaded if has(loop, words.matrix)] or loaded
    reducing = [loop for loop in multiplying if not has(loop, words.store)] or multiplying
    return min(reducing, key=len, default=code)


def _loops(code: list[str], branch: re.Pattern[str]) -> list[list[str]]:
    """From a label to each jump back to it."""
    labels: dict[str, int] = {}
    loops = []
    for number, line in enumerate(code):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = number
        elif (jump := branch.search(line)) and jump[1] in labels:
            loops.append(code[labels[jump[1]] : number])
    return loops


def _nvidia_width(suffix: str) -> int:
    for word, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if word in suffix:
            return width
    return 4


def _amd_width(suffix: str) -> int:
    for word, width in _AMD_WIDTHS.items():
        if re.fullmatch(rf"(?:lds_)?{word}", suffix):
            return width
    return 1 if "byte" in suffix or suffix.startswith(("u8", "i8")) else 2


def _output(tool: Path, *arguments: str) -> str:
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout
