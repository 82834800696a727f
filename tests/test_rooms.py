"""Imports run downwards only, and importing the library costs no triton and no device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RANKS = (  # from the top: a folder of cmlora imports folders of lower ranks and itself; "" holds the files of the front
    ("cli",),
    ("lab",),
    ("",),
    ("engine",),
    ("models", "compose"),
    ("lora",),
    ("batch",),
    ("base",),
)
BASE = ("config", "errors")  # files beside the front that every room may import; they and compose import no torch
OUTSIDE = {"sprites": {"sprites", "base", ""}}  # the shipped model and its making
ONLY_HERE = {"peft": {"lora", "sprites", "lab"}, "matplotlib": {"lab", "sprites"}}  # sprites: training; lab: the peers
NO_TORCH = ("config.py", "errors.py", "compose/plan.py", "engine/budget.py")


def room_of(module: str) -> str:
    """The room of a module of cmlora, "" being the front: cmlora.lora.bank -> lora, cmlora.config -> base."""
    parts = module.split(".")[1:]
    if not parts:
        return ""
    if (ROOT / "cmlora" / parts[0]).is_dir():
        return parts[0]
    return "base" if parts[0] in BASE else "cli" if parts[0] == "cli" else ""


def imports(path: Path) -> set[str]:
    """All modules that a file imports, in whatever form: `from cmlora import x` is cmlora.x where x is a module."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found.add(base)
            found |= {f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}")}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def allowed(room: str) -> set[str]:
    """The rooms that a room may import."""
    if room in OUTSIDE:
        return OUTSIDE[room]
    rank = next(i for i, rooms in enumerate(RANKS) if room in rooms)
    below = {other for rooms in RANKS[rank + 1 :] for other in rooms} | {room}
    return below | ({"sprites"} if room in ("lab", "cli") else set())


FILES = sorted(path.relative_to(ROOT / "cmlora").as_posix() for path in (ROOT / "cmlora").rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_only_its_own_room_and_those_below(file):
    path = ROOT / "cmlora" / file
    module = ".".join(("cmlora", *Path(file).with_suffix("").parts)).removesuffix(".__init__")
    used = imports(path)
    own = {name for name in used if name.split(".")[0] == "cmlora" and name != "cmlora"}
    if "cmlora" in used:  # `from cmlora import accelerate`: the package's front
        own.add("cmlora.accelerate")
    assert {room_of(name) for name in own} <= allowed(room_of(module))
    others = {name.split(".")[0] for name in used}
    for package, rooms in ONLY_HERE.items():
        assert package not in others or room_of(module) in rooms
    if file in NO_TORCH:
        assert others - {"cmlora"} <= set(sys.stdlib_module_names)


def test_no_file_imports_itself_in_a_circle():
    graph = {}
    for file in FILES:
        module = ".".join(("cmlora", *Path(file).with_suffix("").parts)).removesuffix(".__init__")
        graph[module] = {name for name in imports(ROOT / "cmlora" / file) if name != "cmlora" and is_file(name)}
    graph.pop("cmlora")  # the front's names, imported by all that use it as a user does
    seen: list[str] = []

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in seen:
            for used in graph.get(module, ()):
                visit(used, (*path, module))
            seen.append(module)

    for module in graph:
        visit(module, ())


def is_file(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or ((path / "__init__.py").is_file() and bool(room_of(name)))


def test_every_room_has_a_rank():
    rooms = {path.name for path in (ROOT / "cmlora").iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms == {room for rooms in RANKS for room in rooms} - {"", "base"} | set(OUTSIDE)


def test_the_kernels_know_no_diffusers_and_no_adapter():
    for path in (ROOT / "cmlora_kernels").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)
        assert outside <= {"torch", "triton", "cmlora_kernels"}, path.name


def test_benchmarks_and_tests_do_not_import_each_other():
    for folder, other in (("benchmarks", "tests"), ("tests", "benchmarks")):
        for path in (ROOT / folder).rglob("*.py"):
            assert other not in {name.split(".")[0] for name in imports(path)}, path.relative_to(ROOT)


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
