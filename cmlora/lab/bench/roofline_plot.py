"""The plot of `benchmarks/roofline.py`: predicted ms per step over the LoRAs, and what they are made of, per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from cmlora.lab.bench.roofline import Prediction

# Okabe and Ito's colours, which most colour-blind readers tell apart
LINES = {
    "plain": ("#999999", "--", "plain pipeline, no LoRA"),
    "PEFT merge": ("#56B4E9", "-.", "PEFT merge, one pass"),
    "loop": ("#D55E00", "-", "PEFT loop"),
    "loop, set_adapters free": ("#D55E00", ":", "PEFT loop, set_adapters free"),
    "cmlora": ("#0072B2", "-", "cmlora"),
    "cmlora, mean": ("#0072B2", "-.", "cmlora, mean"),
    "routed": ("#009E73", "-", "routed"),
    "merge": ("#CC79A7", "-", "merge"),
}
PARTS = {
    "compute_ms": ("#0072B2", "arithmetic"),
    "memory_ms": ("#009E73", "memory"),
    "small_ms": ("#F0E442", "small kernels (least time)"),
    "waiting_ms": ("#CC79A7", "device waits for host"),
}
BAR = 0.4


def plot(title: str, found: Sequence[Prediction], path: Path) -> None:
    """Write a PNG: a column of two panels per GPU."""
    gpus = list(dict.fromkeys(p.gpu for p in found))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.4 * len(gpus), 8.5), layout="constrained")
        figure.suptitle(title)
        rows = (
            ("predicted ms per step (log)", _lines),
            ("predicted ms per step\nleft bar PEFT loop, right bar cmlora", _bars),
        )
        parts: Any = figure.subfigures(2, 1)
        for part, (label, draw) in zip(parts, rows, strict=True):
            axes = part.subplots(1, len(gpus), squeeze=False)[0]
            for gpu, panel in zip(gpus, axes, strict=True):
                draw(panel, [p for p in found if p.gpu == gpu])
                panel.set_title(f"{gpu} (predicted)")
                panel.set_xlabel("LoRAs")
            axes[0].set_ylabel(label)
            part.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=110)


def _lines(axes: Any, here: Sequence[Prediction]) -> None:
    for method, (color, style, label) in LINES.items():
        points = [(p.adapters, p.step_ms) for p in here if p.method == method]
        if points:
            axes.plot(*zip(*points, strict=True), style, color=color, label=label, marker="o", markersize=3)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def _bars(axes: Any, here: Sequence[Prediction]) -> None:
    for method, side in (("loop", -1), ("cmlora", 1)):
        chosen = [p for p in here if p.method == method]
        bottom = [0.0] * len(chosen)
        for part, (color, label) in PARTS.items():
            heights = [getattr(p, part) for p in chosen]
            places = [p.adapters + side * BAR / 2 for p in chosen]
            axes.bar(places, heights, 0.9 * BAR, bottom, color=color, label=label if side < 0 else None)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.grid(alpha=0.3, axis="y")
