"""What there is: card, driver, torch, triton, C compiler, and what follows from them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch

from cmlora_kernels.cards import triton_version
from cmlora_kernels.chips import data_sheet, split
from cmlora_kernels.dispatch import why_not
from cmlora_kernels.launch import arch_of
from cmlora_kernels.triton_shim import HAS_TRITON


@dataclass(frozen=True)
class Machine:
    """One machine.

    Attributes:
        device: "cuda" or "cpu". card: the GPU's name as the driver gives it, or "CPU".
        target: what kernels are chosen for. memory: of the GPU, bytes.
        driver, compiler: as their own tools give them, "" where there is none.
        backend: how kernels are checked: "triton", "interpreter" or "definition".
        follows: what the user should know, a sentence each.
    """

    device: str
    card: str
    target: str
    memory: int
    driver: str
    torch: str
    triton: str
    compiler: str
    python: str
    system: str
    backend: str
    follows: tuple[str, ...]

    @property
    def cpu(self) -> bool:
        """Whether there is no GPU to examine."""
        return self.device == "cpu"


def examine_machine() -> Machine:
    """Look at this machine; starts no work on the GPU but Triton's own helper."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    target, compiler = arch_of(device), c_compiler()
    missing = why_not(target) if gpu else ""
    runs = HAS_TRITON and not missing
    backend = "definition" if not runs else "triton" if gpu else "interpreter"
    return Machine(
        device=device.type,
        card=torch.cuda.get_device_name(device) if gpu else "CPU",
        target=target,
        memory=torch.cuda.get_device_properties(device).total_memory if gpu else 0,
        driver=_driver() if gpu else "",
        torch=torch.__version__,
        triton=triton_version(),
        compiler=compiler,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        backend=backend,
        follows=tuple(_follows(gpu, target, missing, compiler)),
    )


def c_compiler() -> str:
    """What triton would call: $CC, else gcc or clang on the path; "" where there is none."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    return found or ""


def _follows(gpu: bool, target: str, missing: str, compiler: str) -> list[str]:
    if not gpu:
        return ["no GPU: kernels are checked in Triton's interpreter on small shapes, times are the CPU's"]
    arch, units, name = split(target)
    known = data_sheet(arch, units, name)
    said = []
    if missing:
        said.append(f"the kernels cannot run, images are right but slower: {missing}")
    if not compiler:
        said.append("no C compiler: triton needs one (gcc, clang, or $CC)")
    if known.name != name:
        said.append(f"{name} is not in the table: {known.name}'s figures, scaled by units, serve until it is measured")
    return said


def _driver() -> str:
    """The driver's version by the vendor's tool, else what torch was built for."""
    tool = shutil.which("nvidia-smi")
    if tool and torch.version.hip is None:
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout.split("\n")[0]
        except (OSError, subprocess.TimeoutExpired):
            said = ""
        if said.strip():
            return f"{said.strip()}, CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"


def environment(machine: Machine) -> dict[str, str]:
    """For a process that examines a part: this checkout first, the interpreter where there is no GPU."""
    import cmlora

    given = dict(os.environ)
    root = os.path.dirname(os.path.dirname(os.path.abspath(cmlora.__file__)))
    given["PYTHONPATH"] = os.pathsep.join(p for p in (root, given.get("PYTHONPATH", "")) if p)
    given.pop("TRITON_INTERPRET", None)
    if machine.backend == "interpreter":
        given["TRITON_INTERPRET"] = "1"
    return given


def command(module: str, *arguments: str) -> list[str]:
    """That runs a module of ours with this Python."""
    return [sys.executable, "-W", "ignore", "-m", module, *arguments]
