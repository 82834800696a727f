"""Imports run downwards only, and importing the library costs no triton and no device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {  # a room of cmlora -> the rooms that it may import
    "errors": set(),
    "config": {"errors"},
    "plan": {"config", "errors"},
    "adapters": {"errors"},
    "winograd": {"adapters"},
    "layers": {"adapters", "errors", "winograd"},
    "rows": set(),
    "conditions": {"adapters", "layers", "rows"},
    "transformer": {"conditions", "layers", "rows"},
    "units": {"adapters", "errors"},
    "unet": {"conditions", "layers", "rows", "transformer", "units"},
    "budget": {"errors"},
    "footprint": {"budget", "conditions", "layers", "plan", "rows", "unet"},
    "graphs": {"conditions", "rows", "unet"},
    "run": {"budget", "conditions", "errors", "footprint", "plan", "rows"},
    "denoise": {
        "adapters",
        "budget",
        "conditions",
        "config",
        "errors",
        "footprint",
        "graphs",
        "layers",
        "plan",
        "rows",
        "run",
        "unet",
        "units",
        "winograd",
    },
    "summary": {"budget", "denoise", "plan", "run"},
    "pictures": {"summary"},
    "demo": {"accelerate", "pictures", "sprites"},
    "quality": {"accelerate", "config", "sprites"},
    "report": {"quality", "sprites"},
    "hook": {"denoise"},
    "profile": {"adapters", "config", "denoise", "errors", "hook", "units"},
    "plots": {"errors", "profile", "report"},
    "accelerate": {"config", "denoise", "errors", "hook", "profile", "summary", "units"},
    "__init__": {"accelerate", "config", "errors", "summary"},
}
STANDARD_ONLY = ("budget", "errors", "config", "plan")


def imports(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_the_rooms_below_it(room):
    used = imports(ROOT / "cmlora" / f"{room}.py")
    own = {name.split(".")[1] for name in used if name.startswith("cmlora.")}
    assert own <= BELOW[room]
    if room in STANDARD_ONLY:
        others = {name.split(".")[0] for name in used} - {"cmlora"}
        assert others <= set(sys.stdlib_module_names)
    assert "peft" not in {name.split(".")[0] for name in used} or room == "adapters"


def test_the_kernels_know_no_diffusers_and_no_adapter():
    for path in (ROOT / "cmlora_kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "cmlora_kernels"}, path.name


def test_import_needs_no_triton_and_touches_no_device():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; torch.cuda._lazy_init = lambda: sys.exit('a device was touched')\n"
        "import cmlora, cmlora_kernels; print(sorted(cmlora.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "accelerate" in done.stdout


def test_supported_pipelines_are_diffusers_own():
    import diffusers

    import cmlora

    for name in cmlora.supported_pipelines():
        assert hasattr(diffusers, name)
