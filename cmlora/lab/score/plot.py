"""A column of scores as a plot; needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cmlora.errors import CMLoRAError
from cmlora.lab.report import mean_with_interval
from cmlora.lab.score.tables import Column

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError as error:
    raise CMLoRAError("plots need matplotlib: pip install 'cmlora[plots]'") from error


def plot_columns(found: Sequence[Column], path: Path) -> None:
    """Every number over the number of LoRAs, a line per label with 95 % intervals over sets; floor and ceiling grey."""
    figure = Figure(figsize=(4.6 * len(found) + 1.8, 4.2), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, column in zip(axes, found, strict=True):
        sizes = sorted({len(loras) for values in column.sets.values() for loras in values})
        for i, label in enumerate(column.labels):
            bound = label in ("no_lora", "solo")
            groups = [[v for loras, v in column.sets[label].items() if len(loras) == size] for size in sizes]
            shown = [(size, *mean_with_interval(group)) for size, group in zip(sizes, groups, strict=True) if group]
            x, mean, low, high = (np.array(part) for part in zip(*shown, strict=True))
            axis.errorbar(
                x + 0.04 * (i - len(column.labels) / 2),
                mean,
                np.stack([mean - low, high - mean]),
                marker="o",
                capsize=2,
                linestyle=":" if bound else "-",
                color="grey" if bound else colormaps["tab10"](i % 10),
                label=label,
            )
            if bound:
                axis.annotate(
                    label, (x[-1], mean[-1]), fontsize=7, color="grey", xytext=(6, 4), textcoords="offset points"
                )
        axis.set(title=column.name, xlabel="LoRAs in one picture")
        axis.set_xticks(sizes)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
