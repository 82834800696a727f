"""What `cmlora quality` tells of its pictures: tables with bootstrap intervals, plots, a sheet to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmlora.quality import Picture, picture_name

RESAMPLES = 2000


@dataclass(frozen=True)
class Line:
    """A line of the table: one setting at one number of LoRAs; intervals are 95 % bootstrap intervals."""

    setting: str
    size: int
    pictures: int
    present: tuple[float, float, float]
    concept: tuple[float, float, float]
    seconds: float
    gflop: float


def mean_with_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % percentile bootstrap interval (2000 resamples, seed 0)."""
    x = np.asarray(values, dtype=np.float64)
    means = x[np.random.default_rng(0).integers(0, len(x), (RESAMPLES, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(x.mean()), float(low), float(high)


def lines(pictures: Sequence[Picture]) -> list[Line]:
    """The table: settings in the order of their first picture, by number of LoRAs."""
    found = []
    for size in sorted({len(p.loras) for p in pictures}):
        for setting in dict.fromkeys(p.setting for p in pictures):
            chosen = [p for p in pictures if len(p.loras) == size and p.setting == setting]
            if chosen:
                found.append(
                    Line(
                        setting=setting,
                        size=size,
                        pictures=len(chosen),
                        present=mean_with_interval([p.present for p in chosen]),
                        concept=mean_with_interval([float(np.mean(list(p.concepts.values()))) for p in chosen]),
                        seconds=float(np.median([p.seconds for p in chosen])),
                        gflop=float(np.mean([p.gflop for p in chosen])),
                    )
                )
    return found


def table(pictures: Sequence[Picture]) -> str:
    """Markdown: a row per setting, a column per number of LoRAs with all-present rate and its interval."""
    found = lines(pictures)
    sizes = sorted({line.size for line in found})
    head = ["setting", *(f"{size} LoRAs" for size in sizes), "concept score", "GFLOP per image", "seconds per image"]
    rows = [head, ["---"] * len(head)]
    for setting in dict.fromkeys(line.setting for line in found):
        own = {line.size: line for line in found if line.setting == setting}
        cells = [_interval(own[size].present) if size in own else "" for size in sizes]
        largest = own[max(own)]
        score = _interval(
            mean_with_interval([float(np.mean(list(p.concepts.values()))) for p in pictures if p.setting == setting])
        )
        rows.append([setting, *cells, score, f"{largest.gflop:.0f}", f"{largest.seconds:.1f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _interval(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    return f"{mean:.2f} ({low:.2f}-{high:.2f})"


def plot(pictures: Sequence[Picture], path: Path) -> None:
    """All-present rate over the number of LoRAs, with intervals, a line per setting.

    Raises:
        ModuleNotFoundError: matplotlib is not installed (extra `plots`).
    """
    plt = pyplot()
    found = lines(pictures)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    settings = list(dict.fromkeys(line.setting for line in found))
    for i, setting in enumerate(settings):
        own = [line for line in found if line.setting == setting]
        x = [line.size + 0.06 * (i - len(settings) / 2) for line in own]
        y = np.array([line.present for line in own])
        error = np.maximum(0, [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]])
        style = "--" if setting.endswith("mean") else "-"
        axes.errorbar(x, y[:, 0], yerr=error, marker="o", linestyle=style, capsize=2, label=setting)
    axes.set(xlabel="LoRAs in one image", ylabel="all concepts present", ylim=(-0.03, 1.03))
    axes.set_xticks(sorted({line.size for line in found}))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def frontier(pictures: Sequence[Picture], path: Path) -> str:
    """Concept score over FLOPs per image, a point per setting; returns it as a Markdown table, cheapest first.

    A setting is on the frontier where none that costs less scores as much.
    """
    plt = pyplot()
    points = []
    for setting in dict.fromkeys(p.setting for p in pictures):
        own = [p for p in pictures if p.setting == setting]
        score = mean_with_interval([float(np.mean(list(p.concepts.values()))) for p in own])
        present = mean_with_interval([p.present for p in own])
        points.append((float(np.mean([p.gflop for p in own])), score, present, setting))
    points.sort()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rows = ["| setting | GFLOP per image | concept score | all present | on the frontier |", "|---|---|---|---|---|"]
    best, front = -1.0, []
    for cost, score, present, setting in points:
        ahead = score[0] > best
        best = max(best, score[0])
        front += [(cost, score[0])] if ahead else []
        error = [[score[0] - score[1]], [score[2] - score[0]]]
        colour = "tab:blue" if setting.startswith("mean") else "tab:orange"
        axes.errorbar([cost], [score[0]], yerr=error, marker="o", color=colour, capsize=2)
        axes.annotate(setting, (cost, score[0]), fontsize=6, xytext=(4, 3), textcoords="offset points")
        rows.append(
            f"| {setting} | {cost:.1f} | {_interval(score)} | {_interval(present)} | {'yes' if ahead else ''} |"
        )
    axes.plot(*zip(*front, strict=True), drawstyle="steps-post", color="gray", linewidth=1)
    axes.set(xlabel="GFLOP per image (UNet)", ylabel="concept score")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return "\n".join(rows)


def pyplot() -> Any:
    """matplotlib.pyplot without a window."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib: pip install 'cmlora[plots]'") from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def look(pictures: Sequence[Picture], out: Path, count: int = 32) -> Path:
    """A sheet of random pictures, each with its prompt and the concepts that the detector found, to check."""
    from PIL import Image

    from cmlora.sprites.measure import sheet

    order = np.random.default_rng(0).permutation(len(pictures))[:count]
    chosen = [pictures[i] for i in order]
    pixels = np.stack([np.asarray(Image.open(out / "pictures" / picture_name(p))) for p in chosen])
    captions = [f"{p.setting}, {p.prompt}" for p in chosen]
    found = [{name for name, sure in p.concepts.items() if sure > 0.5} for p in chosen]
    sheet(pixels, captions, found, out / "look.png")
    return out / "look.png"
