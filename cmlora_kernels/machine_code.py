"""What a compiled kernel is made of, read from its machine code: registers, spills, instructions.

NVIDIA: the cubin, through cuobjdump and nvdisasm of triton's wheel. AMD: the assembly that Triton keeps, with its
metadata. The main loop is the innermost loop with matrix instructions and global loads, else with global loads; a
kernel without such a loop is taken as a whole.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MachineCode:
    """What the machine code says.

    Attributes:
        registers: per thread (AMD: vector registers, accumulation registers included).
        spill_bytes: bytes per thread of registers kept in memory: stores to local memory (NVIDIA), spilled vector
            registers (AMD).
        local_bytes: per thread: stack frame and local memory.
        tensor_core: the matrix instruction, "" if none.
        async_copy: the instruction that copies global to shared memory past the registers, "" if none.
        access_bytes: widest global load of the main loop, per thread; narrow_access_bytes the narrowest one.
    """

    registers: int
    spill_bytes: int
    local_bytes: int
    tensor_core: str
    async_copy: str
    access_bytes: int
    narrow_access_bytes: int


_NV_MATRIX = re.compile(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|UTCQMMA|IMMA|DMMA)[.\w]*")
_NV_NAMES = {"HMMA": "mma.sync", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
_NV_LOAD = re.compile(r"\b(LDG|LDGSTS)\.E([.\w]*)")
_NV_ASYNC = {"LDGSTS": "cp.async", "UTMALDG": "tma"}
_NV_BRANCH = re.compile(r"\bBRA(?:\.\w+)* (?:\w+, )?`\((\.L_[\w.]+)\)")
_AMD_MATRIX = re.compile(r"\bv_(s?mfmac?|wmma)_\w+")
_AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+)")
_AMD_BRANCH = re.compile(r"\bs_c?branch\w* (\.LBB\w+)")
_LABEL = re.compile(r"^(\.L\w[\w.]*):")
_AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "b32": 4, "b64": 8, "b96": 12, "b128": 16}


def read_cubin(cubin: bytes, tools: Path) -> MachineCode:
    """Read a cubin with the cuobjdump and nvdisasm found in `tools`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name).splitlines()
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    text = "\n".join(code)
    matrix = _NV_MATRIX.search(text)
    # every spill slot is stored at least once; wider stores spill several registers
    slots = {m[1]: _nvidia_width(m[0]) for m in re.finditer(r"\bSTL[.\w]* (\[[^\]]+\])", text)}
    widths = [
        _nvidia_width(m[2])
        for line in main_loop(code, _NV_BRANCH, _NV_LOAD, _NV_MATRIX)
        if (m := _NV_LOAD.search(line))
    ]
    if "UTMALDG" in text:
        widths.append(16)
    return MachineCode(
        registers=int(found["REG"]),
        spill_bytes=sum(slots.values()),
        local_bytes=int(found["STACK"]) + int(found["LOCAL"]),
        tensor_core=_NV_NAMES.get(matrix[1], matrix[1]) if matrix else "",
        async_copy=next((name for word, name in _NV_ASYNC.items() if word in text), ""),
        access_bytes=max(widths, default=0),
        narrow_access_bytes=min(widths, default=0),
    )


def read_amdgcn(assembly: str) -> MachineCode:
    """Read AMD assembly as Triton keeps it (`asm["amdgcn"]`)."""
    meta = {name: int(n) for name, n in re.findall(r"^\s+\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    code = assembly.splitlines()
    matrix = _AMD_MATRIX.search(assembly)
    loop = main_loop(code, _AMD_BRANCH, _AMD_LOAD, _AMD_MATRIX)
    widths = [_amd_width(m[1]) for line in loop if (m := _AMD_LOAD.search(line))]
    return MachineCode(
        registers=meta["vgpr_count"],
        spill_bytes=4 * meta["vgpr_spill_count"],
        local_bytes=meta["private_segment_fixed_size"],
        tensor_core=matrix[1] if matrix else "",
        async_copy="global_load_lds" if re.search(r"\b(global_load_lds|buffer_load\w* .*\blds$)", assembly) else "",
        access_bytes=max(widths, default=0),
        narrow_access_bytes=min(widths, default=0),
    )


def main_loop(code: list[str], branch: re.Pattern[str], load: re.Pattern[str], matrix: re.Pattern[str]) -> list[str]:
    """The lines of the main loop as the module's head defines it."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for number, line in enumerate(code):
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = number
        elif (jump := branch.search(line)) and jump[1] in labels:
            loops.append((labels[jump[1]], number))
    loaded = [loop for loop in loops if any(load.search(line) for line in code[slice(*loop)])]
    multiplied = [loop for loop in loaded if any(matrix.search(line) for line in code[slice(*loop)])]
    start, end = min(multiplied or loaded, key=lambda loop: loop[1] - loop[0], default=(0, len(code)))
    return code[start:end]


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
