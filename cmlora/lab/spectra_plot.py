"""What `cmlora spectra` writes; needs matplotlib (the extra `plots`), and importing it without is an error."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from cmlora.errors import CMLoRAError
from cmlora.lab.spectra import CUTOFF, Spectrum, by_group, measure, open_picture, pixels, table
from cmlora.profile import high_frequency_difference

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError as error:
    raise CMLoRAError("plots need matplotlib: pip install 'cmlora[plots]'") from error


def write_spectra(
    paths: Sequence[Path], out: Path, cutoff: float = CUTOFF, compare: tuple[Path, Path] | None = None
) -> Iterator[Path]:
    """Write spectra.png, spectra.json, spectra.md and, for two pictures, difference.png; yields each once written.

    Args:
        compare: two image files of one size.

    Raises:
        CMLoRAError: as `measure`; two pictures of other sizes.
    """
    pair = None if compare is None else [pixels(open_picture(path)) for path in compare]
    if pair and pair[0].shape != pair[1].shape:
        sizes = " and ".join(f"{one.shape[1]} x {one.shape[0]}" for one in pair)
        raise CMLoRAError(f"--compare must name two pictures of one size, got {sizes}")
    groups = by_group(measure(paths, cutoff))
    out.mkdir(parents=True, exist_ok=True)
    plot_spectra(groups, cutoff, out / "spectra.png")
    yield out / "spectra.png"
    numbers = {
        name: [{"name": one.name, "intensity": one.intensity, "profile": one.profile.tolist()} for one in spectra]
        for name, spectra in groups.items()
    }
    (out / "spectra.json").write_text(json.dumps({"cutoff": cutoff, "groups": numbers}, indent=1) + "\n")
    yield out / "spectra.json"
    (out / "spectra.md").write_text(table(groups) + "\n")
    yield out / "spectra.md"
    if pair and compare:
        where = high_frequency_difference(pair[0], pair[1], cutoff)
        plot_difference(pair, [path.stem for path in compare], where, out / "difference.png")
        yield out / "difference.png"


def plot_spectra(groups: Mapping[str, Sequence[Spectrum]], cutoff: float, path: Path) -> None:
    """Left the mean profile of every group over the share of the largest radius, right the ranking."""
    figure = Figure(figsize=(11, 0.25 * len(groups) + 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, spectra in enumerate(groups.values()):
        colour = colormaps["turbo"](0.05 + 0.9 * i / max(1, len(groups) - 1))
        for bins in {len(one.profile) for one in spectra}:  # pictures of several sizes have profiles of their own
            profiles = np.stack([one.profile.numpy() for one in spectra if len(one.profile) == bins])
            left.semilogy(np.linspace(0, 1, bins), profiles.mean(0), color=colour)
        right.barh(i, np.mean([one.intensity for one in spectra]), color=colour)
        right.plot([one.intensity for one in spectra], [i] * len(spectra), "k.", markersize=3)
    left.axvline(cutoff, color="grey", linestyle=":", linewidth=0.8)
    left.set(xlabel="share of the largest radius", ylabel="relative amplitude", title="mean radial profile")
    right.set_yticks(range(len(groups)), list(groups), fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="mean amplitude beyond the cutoff", title="high-frequency intensity; dots: pictures")
    figure.savefig(path, dpi=110)


def plot_difference(images: Sequence[Tensor], names: Sequence[str], where: Tensor, path: Path) -> None:
    """Two pictures [height, width, 3] and where they differ in their high frequencies [height, width]."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, image, name in zip(axes, images, names, strict=False):
        axis.imshow(image.numpy(), interpolation="nearest")
        axis.set_title(name, fontsize=8)
    shown = axes[2].imshow(where.numpy(), cmap="magma", interpolation="nearest")
    axes[2].set_title("|difference of high frequencies|", fontsize=8)
    figure.colorbar(shown, ax=axes[2])
    for axis in axes:
        axis.axis("off")
    figure.savefig(path, dpi=110)
