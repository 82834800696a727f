"""What frequencies are in pictures: any image files, or a sweep's folder; as CMLoRA's notebook looks at them.

For every picture the radial amplitude profile of its brightness and how much of it lies beyond a cutoff; for a sweep
the LoRAs ranked by their solo pictures, and for two pictures of one size where they differ in their high frequencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cmlora.errors import CMLoRAError
from cmlora.lab.markdown import header, row
from cmlora.lab.report import mean_with_interval
from cmlora.lab.score.pictures import Shot, labels_of, read_shots
from cmlora.lab.sweep.folder import MANIFEST
from cmlora_kernels import radial_profile
from cmlora_kernels.spectrum_finish import first_high_bin

CUTOFF = 0.2
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Of one picture.

    Attributes:
        name: of its file. group: what it is averaged with; profile: [bins] amplitude per radius, largest bin 1.
        intensity: mean of the profile beyond the cutoff.
    """

    name: str
    group: str
    profile: Tensor
    intensity: float


def spectrum_of(image: Image.Image, cutoff: float = CUTOFF) -> tuple[Tensor, float]:
    """Profile [bins] of the mean over the colours, largest bin 1, and its mean beyond cutoff x the largest radius."""
    profile = radial_profile(pixels(image).permute(2, 0, 1)[None], True)[0].cpu()
    return profile, float(profile[first_high_bin(len(profile), cutoff) :].mean())


def pixels(image: Image.Image) -> Tensor:
    """[height, width, 3] in 0..1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255)


def find_pictures(paths: Sequence[Path]) -> list[tuple[str, str, Path]]:
    """Name, group and file of everything that the paths stand for.

    A sweep's folder groups composed pictures by method and solo pictures by LoRA; another folder's pictures and single
    files are groups of their own.

    Raises:
        CMLoRAError: a path that is neither, or no picture at all.
    """
    found: list[tuple[str, str, Path]] = []
    for path in paths:
        if (path / MANIFEST).exists():
            shots = read_shots(path)
            found += [(s.file, _group(s, label), s.path) for s, label in zip(shots, labels_of(shots), strict=True)]
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            found += [(file.relative_to(path).as_posix(), file.stem, file) for file in files]
        elif path.is_file():
            found.append((path.name, path.stem, path))
        else:
            raise CMLoRAError(f"{path}: neither an image file nor a folder")
    if not found:
        raise CMLoRAError(f"no pictures in {', '.join(map(str, paths))}")
    return found


def _group(shot: Shot, label: str) -> str:
    return f"{shot.loras[0]} alone" if shot.kind == "solo" else label


def measure(paths: Sequence[Path], cutoff: float = CUTOFF) -> list[Spectrum]:
    """The spectrum of every picture.

    Raises:
        CMLoRAError: a file that is no picture; a cutoff outside of [0, 1).
    """
    if not 0 <= cutoff < 1:
        raise CMLoRAError(f"cutoff must be in [0, 1), got {cutoff}")
    return [
        Spectrum(name, group, *spectrum_of(open_picture(path), cutoff)) for name, group, path in find_pictures(paths)
    ]


def open_picture(path: Path) -> Image.Image:
    """RGB.

    Raises:
        CMLoRAError: no picture.
    """
    try:
        return Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CMLoRAError(f"{path} is no picture: {error}") from None


def by_group(spectra: Sequence[Spectrum]) -> dict[str, list[Spectrum]]:
    """Of every group, the largest mean intensity first: with a sweep's solo pictures, the LoRAs from high to low."""
    groups: dict[str, list[Spectrum]] = {}
    for one in spectra:
        groups.setdefault(one.group, []).append(one)
    return dict(sorted(groups.items(), key=lambda item: -float(np.mean([one.intensity for one in item[1]]))))


def table(groups: Mapping[str, Sequence[Spectrum]]) -> str:
    """Markdown: pictures and their high-frequency intensity per group, with a 95 % bootstrap interval."""
    lines = list(header("", "pictures", "high-frequency intensity"))
    for name, spectra in groups.items():
        mean, low, high = mean_with_interval([one.intensity for one in spectra])
        lines.append(row(name, len(spectra), f"{mean:.4f} ({low:.4f}-{high:.4f})"))
    return "\n".join(lines)
