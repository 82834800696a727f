"""What `cmlora doctor` measured on a card: `<user cache>/cmlora/<device>-<triton>.json`, read in place of data sheets.

Only the choice between strategies follows it, and predictions; tiles are the architecture's and the same on every run.
A file that is absent is not missed; one that is broken or another card's is warned of and not used.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import sys
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from cmlora_kernels.chips import Chip, data_sheet, split
from cmlora_kernels.triton_shim import triton

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """What was measured on one card.

    Attributes:
        device: its name, as the driver gives it. triton: version of the compiler.
        bandwidth: bytes per second of a large copy, read and written.
        half_flops, float_flops: per second of the library's large GEMMs, float32 at full accuracy.
        triton_share: speed of our GEMMs, of the library's on the same shapes.
        launch_seconds: of the host, per launch of ours.
    """

    device: str
    triton: str
    bandwidth: float
    half_flops: float
    float_flops: float
    triton_share: float
    launch_seconds: float


@functools.lru_cache(maxsize=256)
def chip(target: str) -> Chip:
    """The figures of a target; the card's file is read once per process, and only where the target names a card."""
    arch, units, name = split(target)
    known = data_sheet(arch, units, name)
    return (measured(known, name) if name else None) or known


def triton_version() -> str:
    """Of the installed triton; "none" without."""
    version = getattr(triton, "__version__", "none")
    return version if isinstance(version, str) else "none"


def folder() -> Path:
    """Where this user's caches live, and ours in it."""
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "cmlora"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cmlora"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "cmlora"
    return Path.home() / ".cache" / "cmlora"


def path_of(device: str, version: str | None = None) -> Path:
    """The file of a card and a version of triton; None: the installed one."""
    return folder() / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', device)}-{version or triton_version()}.json"


def write(found: Measured) -> Path:
    """Write a card's file, whole or not at all."""
    path = path_of(found.device, found.triton)
    path.parent.mkdir(parents=True, exist_ok=True)
    half_written = path.with_suffix(f".{os.getpid()}")
    half_written.write_text(json.dumps({"format": FORMAT, **asdict(found)}, indent=1) + "\n")
    half_written.replace(path)
    return path


def read(device: str) -> Measured | None:
    """A card's file; None where there is none.

    Raises:
        ValueError: one that cannot be read, is another card's, another triton's or of another format, or that holds
            what no card can do; it names the file and what is wrong.
    """
    path = path_of(device)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(given, dict) or given.get("format") != FORMAT:
        raise ValueError(f"{path} is no card file of format {FORMAT}")
    for name, want in (("device", device), ("triton", triton_version())):
        if given.get(name) != want:
            raise ValueError(f"{path} is a foreign file: its {name} is {given.get(name)!r}, here it is {want!r}")
    return Measured(device, given["triton"], *(_number(path, given, field.name) for field in fields(Measured)[2:]))


def _number(path: Path, given: dict[str, object], name: str) -> float:
    value = given.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{path}: {name} must be a positive number, got {value!r}")
    return float(value)


def measured(known: Chip, device: str) -> Chip | None:
    """A chip with what was measured on it; None, and at most a warning, where no file serves."""
    try:
        found = read(device)
    except ValueError as error:
        warnings.warn(f"{error}; the data sheet is used, `cmlora doctor` writes it anew", RuntimeWarning, stacklevel=2)
        return None
    if found is None:
        return None
    return replace(
        known,
        bandwidth=found.bandwidth,
        half_share=found.half_flops / known.half_flops,
        float_share=found.float_flops / known.float_flops,
        triton_share=found.triton_share,
        launch_seconds=found.launch_seconds,
        measured=True,
    )
