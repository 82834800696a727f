"""A profile as plots and JSON, and the plots of `cmlora quality`.

Needs matplotlib (the extra `plots`); importing this room without it is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmlora.errors import CMLoRAError
from cmlora.lab.report import Score, frontier
from cmlora.profile import Profile, Signal, high_frequency_difference

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # without pyplot: no window, nothing global
except ImportError as error:
    raise CMLoRAError("plots need matplotlib: pip install 'cmlora[plots]'") from error

SIGNALS: tuple[tuple[Signal, str], ...] = (("feature", "cached feature"), ("latents", "latents"))


def write_profile(
    profile: Profile,
    out: Path,
    every: int = 5,
    compare: tuple[str, str] | None = None,
    setting: Mapping[str, Any] | None = None,
) -> Iterator[Path]:
    """Write intensity.png, spectra.png, similarity.png, difference.png and profile.json; yields each once written.

    Args:
        profile: of `profile_loras`.
        out: folder; made if absent.
        every: radial spectra of every so many steps.
        compare: two LoRAs of the profile or image files for difference.png; None: the LoRAs of the highest and the
            lowest intensity, or no difference.png where only one was profiled or no images were drawn.
        setting: what else the JSON shall say: prompt, seed, ...

    Raises:
        CMLoRAError: `compare` names neither a LoRA with an image nor an image file.
        ValueError: two images of different sizes.
    """
    pair = _default_pair(profile) if compare is None else compare
    images = [_image(profile, name) for name in pair]
    numbers = {**(setting or {}), **profile.as_dict(every)}
    out.mkdir(parents=True, exist_ok=True)
    plots = {"intensity": _intensity(profile), "spectra": _spectra(profile, every), "similarity": _similarity(profile)}
    if images:
        difference = high_frequency_difference(images[0], images[1], profile.online_cutoff)
        plots["difference"] = _difference(images, [Path(name).stem for name in pair], difference)
        numbers["difference"] = {"of": list(pair), "mean": float(difference.mean()), "max": float(difference.max())}
    for name, figure in plots.items():
        figure.savefig(out / f"{name}.png", dpi=110)
        yield out / f"{name}.png"
    (out / "profile.json").write_text(json.dumps(numbers, indent=1) + "\n")
    yield out / "profile.json"


def _ranked(profile: Profile) -> list[str]:
    return sorted(profile.loras, key=lambda name: -profile.spectra(name, profile.by).mean)


def _default_pair(profile: Profile) -> tuple[str, ...]:
    ranked = _ranked(profile)
    drawn = len(ranked) > 1 and all(lora.image is not None for lora in profile.loras.values())
    return (ranked[0], ranked[-1]) if drawn else ()


def _image(profile: Profile, name: str) -> Tensor:
    """[height, width, 3] in 0..1 of a LoRA or a file."""
    image = profile.loras[name].image if name in profile.loras else None
    if image is not None:
        return image
    if not Path(name).is_file():
        raise CMLoRAError(
            f"compare must name LoRAs with images ({', '.join(profile.loras)}) or image files, got {name!r}"
        )
    return torch.from_numpy(np.asarray(Image.open(name).convert("RGB")) / 255.0).float()


def _line(profile: Profile, name: str) -> dict[str, Any]:
    """Colour by the LoRA's place, dashed for the low half."""
    place = list(profile.loras).index(name)
    return {"color": colormaps["tab10"](place % 10), "linestyle": "-" if name in profile.high else "--"}


def _intensity(profile: Profile) -> Figure:
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for column, (signal, label) in enumerate(SIGNALS):
        for name in _ranked(profile):
            spectra, line = profile.spectra(name, signal), _line(profile, name)
            half = "high" if name in profile.high else "low"
            axes[0, column].plot(spectra.intensity, label=f"{name}: {half}", **line)
            axes[1, column].plot(range(1, len(spectra.intensity)), spectra.change, **line)
        axes[0, column].set_title(f"{label}{' (decides)' if signal == profile.by else ''}")
        axes[1, column].axhline(0, color="grey", linewidth=0.6)
        axes[1, column].set_xlabel("step")
        axes[1, column].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("high-frequency intensity")
    axes[1, 0].set_ylabel("its change from step to step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def _spectra(profile: Profile, every: int) -> Figure:
    figure = Figure(figsize=(1.6 + 2.3 * len(profile.loras), 5.4), layout="constrained")
    axes = figure.subplots(2, len(profile.loras), squeeze=False, sharex="row", sharey="row")
    for row, (signal, label) in enumerate(SIGNALS):
        for column, name in enumerate(profile.loras):
            axis, profiles = axes[row, column], profile.spectra(name, signal).profiles
            shown = range(0, len(profiles), every)
            for step in shown:
                colour = colormaps["viridis"](step / max(1, len(profiles) - 1))
                axis.semilogy(profiles[step], color=colour, label=f"step {step}")
            axis.axvline(profile.online_cutoff * (profiles.shape[1] - 1), color="grey", linewidth=0.8, linestyle=":")
            axis.set_title(name)
            axis.set_xlabel("radius")
        axes[row, 0].set_ylabel(f"{label}\nrelative amplitude")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend([*handles, axes[0, 0].lines[-1]], [*labels, "cutoff"], loc="outside right upper")
    return figure


def _similarity(profile: Profile) -> Figure:
    names = list(profile.loras)
    columns = min(len(names), 5)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(7, 1 + 2.4 * columns), 2.5 * rows + 2.8), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(2.5 * rows, 2.8))[:, 0]
    axes = above.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    least = min(float(lora.similarity.min()) for lora in profile.loras.values())
    for axis, name in zip(axes, names, strict=False):
        shown = axis.imshow(profile.loras[name].similarity, vmin=least, vmax=1, cmap="viridis", origin="lower")
        axis.set_title(name)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    above.supxlabel("step")
    above.supylabel("step")
    above.colorbar(shown, ax=list(axes), label="cosine of cached features")
    axis = below.subplots()
    for name in names:
        near = profile.loras[name].similarity.diagonal(1)
        axis.plot(range(1, len(near) + 1), near, label=name, **_line(profile, name))
    axis.set_xlabel("step")
    axis.set_ylabel("cosine with the step before")
    axis.xaxis.get_major_locator().set_params(integer=True)
    below.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


def _difference(images: Sequence[Tensor], names: Sequence[str], difference: Tensor) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, image, name in zip(axes, images, names, strict=False):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(name)
    shown = axes[2].imshow(difference, cmap="magma", interpolation="nearest")
    axes[2].set_title("difference of their high frequencies")
    figure.colorbar(shown, ax=axes[2], label="mean over channels, of 0..1")
    for axis in axes:
        axis.set_axis_off()
    return figure


def plot_quality(found: Sequence[Score], path: Path) -> None:
    """All-present rate over the number of LoRAs, with intervals, a line per setting; dashed for a mean."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    settings = list(dict.fromkeys(line.setting for line in found))
    for i, setting in enumerate(settings):
        own = [score for score in found if score.setting == setting]
        x = [score.size + 0.7 * ((i + 0.5) / len(settings) - 0.5) for score in own]
        present = np.array([score.present for score in own])
        line = axes.errorbar(
            x, present[:, 0], _error(present), marker="o", capsize=2, color=colormaps["tab20"](i % 20), label=setting
        )
        line[0].set_linestyle("--" if setting.endswith("mean") else "-")
    axes.set(xlabel="LoRAs in one image", ylabel="all concepts present", ylim=(-0.03, 1.03))
    axes.set_xticks(sorted({line.size for line in found}))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=110)


def plot_frontier(points: Sequence[Score], path: Path) -> None:
    """Concept score over FLOPs per image, a point per setting, and the line that none lies above."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for point in points:
        colour = "tab:blue" if "mean" in point.setting else "tab:orange" if "deviation" in point.setting else "tab:grey"
        score = np.array([point.concept])
        axes.errorbar([point.gflop], score[:, 0], _error(score), marker="o", color=colour, capsize=2)
        label = point.setting.replace("interval ", "i").replace("branch ", "b")
        axes.annotate(label, (point.gflop, point.concept[0]), fontsize=6, xytext=(4, 3), textcoords="offset points")
    ahead = frontier(points)
    axes.plot(
        [point.gflop for point in ahead],
        [point.concept[0] for point in ahead],
        drawstyle="steps-post",
        color="grey",
        linewidth=1,
    )
    axes.set(xlabel="GFLOP per image (UNet)", ylabel="concept score")
    figure.savefig(path, dpi=110)


def _error(values: Any) -> Any:
    """Mean, low, high [n, 3] as lengths [2, n] below and above."""
    return np.maximum(0, [values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])
