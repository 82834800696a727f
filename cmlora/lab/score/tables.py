"""Scores as tables: means with bootstrap intervals over sets, paired differences, and wins with ties as ties.

A set of LoRAs is the unit: pictures of several seeds of one set are averaged first, since they are not independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cmlora.lab.markdown import header, row
from cmlora.lab.report import mean_with_interval
from cmlora.lab.score.pictures import Shot, labels_of
from cmlora.lab.score.run import Scores
from cmlora.lab.sweep.jobs import SOLO

Set = tuple[str, ...]
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Column:
    """One number of a metric, by label and set: the mean over the set's seeds, and each seed's own.

    Attributes:
        sets: label -> set -> mean. single: label -> (set, seed) -> value.
    """

    name: str
    sets: dict[str, dict[Set, float]]
    single: dict[str, dict[tuple[Set, int], float]]

    @property
    def labels(self) -> list[str]:
        """In the order of the pictures, floor and ceiling included."""
        return list(self.sets)


def columns(shots: Sequence[Shot], metric: str, scores: Scores) -> list[Column]:
    """A column per number of the metric. The row "solo" is the ceiling: of a set, the mean over its LoRAs' own."""
    names = list(dict.fromkeys(name for record in scores.values() for name in record["values"]))
    return [_column(shots, f"{metric} {name}", name, scores) for name in names]


def _column(shots: Sequence[Shot], title: str, name: str, scores: Scores) -> Column:
    single: dict[str, dict[tuple[Set, int], float]] = {}
    solo: dict[str, list[float]] = {}
    for shot, label in zip(shots, labels_of(shots), strict=True):
        if shot.file not in scores:
            continue
        value = float(scores[shot.file]["values"][name])
        if shot.kind == "solo":
            solo.setdefault(shot.loras[0], []).append(value)
        else:
            single.setdefault(label, {})[shot.pairs_with] = value
    sets = {label: _by_set(values) for label, values in single.items()}
    everything = list(dict.fromkeys(loras for values in sets.values() for loras in values))
    ceiling = {
        loras: float(np.mean([np.mean(solo[one]) for one in loras]))
        for loras in everything
        if all(one in solo for one in loras)
    }
    return Column(title, sets | ({SOLO: ceiling} if ceiling else {}), single)


def _by_set(values: Mapping[tuple[Set, int], float]) -> dict[Set, float]:
    found: dict[Set, list[float]] = {}
    for (loras, _), value in values.items():
        found.setdefault(loras, []).append(value)
    return {loras: float(np.mean(several)) for loras, several in found.items()}


@dataclass(frozen=True)
class Versus:
    """One label against another, on the pictures that both have.

    Attributes:
        difference: mean over sets of the difference, and its 95 % bootstrap interval over sets.
        wins, ties, losses: shares of the pictures.
    """

    difference: Interval
    wins: float
    ties: float
    losses: float


def versus(column: Column, label: str, reference: str, tie: float = 0.0) -> Versus | None:
    """Paired: same set, same seed, same noise. None where they share no picture.

    Args:
        tie: a difference of at most so much is a tie.
    """
    one, other = column.single.get(label, {}), column.single.get(reference, {})
    apart = {pair: one[pair] - other[pair] for pair in one if pair in other}
    if not apart:
        return None
    wins = float(np.mean([value > tie for value in apart.values()]))
    losses = float(np.mean([value < -tie for value in apart.values()]))
    return Versus(mean_with_interval(list(_by_set(apart).values())), wins, 1 - wins - losses, losses)


def table(column: Column) -> str:
    """Markdown: a row per label; the mean of every size and of all of them, with 95 % intervals over sets."""
    sizes = sorted({len(loras) for values in column.sets.values() for loras in values})
    lines = list(header(column.name, "sets", *(f"{size} LoRAs" for size in sizes), "all sizes"))
    for label in column.labels:
        values = column.sets[label]
        cells = [_shown([value for loras, value in values.items() if len(loras) == size]) for size in sizes]
        lines.append(row(label, len(values), *cells, _shown(list(values.values()))))
    return "\n".join(lines)


def versus_table(column: Column, reference: str, tie: float = 0.0) -> str:
    """Markdown: every label against the reference, paired."""
    head = (f"{column.name}, against {reference}", "difference", "wins", "ties", "losses")
    lines = list(header(*head))
    for label in column.labels:
        found = None if label == reference else versus(column, label, reference, tie)
        if found is not None:
            mean, low, high = found.difference
            shares = (f"{share:.0%}" for share in (found.wins, found.ties, found.losses))
            lines.append(row(label, f"{mean:+.3f} ({low:+.3f} to {high:+.3f})", *shares))
    return "\n".join(lines)


def _shown(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, low, high = mean_with_interval(values)
    return f"{mean:.3f} ({low:.3f}-{high:.3f})"
