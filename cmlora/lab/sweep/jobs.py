"""The pictures of a sweep: which there are, and what each starts from."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cmlora.lab.sweep.info import Lora, find_sets
from cmlora.lab.sweep.settings import Interval, Style, Sweep

Kind = Literal["composed", "floor", "solo"]
FLOOR, SOLO = "no_lora", "solo"
"""Labels of what every sweep has: each set's prompt without its LoRAs, and each LoRA alone with its own prompt."""


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        kind: "composed", or what they are measured against: "floor" and "solo".
        method: the label. config: fields of CMLoRAConfig, without the interval.
    """

    kind: Kind
    method: str
    config: Mapping[str, Any]
    loras: tuple[Lora, ...]
    interval: Interval
    seed: int

    @property
    def ids(self) -> tuple[str, ...]:
        """Of the set, in the order of INFO.json."""
        return tuple(lora.id for lora in self.loras)

    @property
    def noise(self) -> int:
        """Seed of the latents: of set and seed alone, so that methods and intervals start from the same."""
        digest = hashlib.sha256(f"{' '.join(sorted(self.ids))} {self.seed}".encode()).digest()
        return int.from_bytes(digest[:6], "big")

    def prompt(self, style: Style) -> str:
        """The style's prefix and all triggers."""
        words = [word for lora in self.loras for word in lora.triggers]
        return ", ".join([style.prefix, *words] if style.prefix else words)


def choose_sets(sweep: Sweep) -> list[tuple[Lora, ...]]:
    """Those of all sizes in turn, so that an interrupted sweep has some of each."""
    rows = []
    for size in sweep.sizes:
        sets = find_sets(sweep.loras, size)
        if sweep.limit is not None:
            sets = [sets[i] for i in sorted(np.random.default_rng(size).permutation(len(sets))[: sweep.limit])]
        rows.append(sets)
    return [chosen for step in itertools.zip_longest(*rows) for chosen in step if chosen is not None]


def make_units(sweep: Sweep) -> list[list[Job]]:
    """All pictures, a list per set: what one process draws in one go. First each LoRA of the sets alone."""
    sets = choose_sets(sweep)
    used = [lora for lora in sweep.loras if any(lora in chosen for chosen in sets)]
    merge = {"method": "merge"}
    units = [[Job("solo", SOLO, merge, (lora,), 1, seed) for seed in sweep.seeds] for lora in used]
    return units + [_unit(sweep, chosen) for chosen in sets]


def _unit(sweep: Sweep, chosen: Sequence[Lora]) -> list[Job]:
    jobs = []
    for seed in sweep.seeds:
        jobs.append(Job("floor", FLOOR, {"method": FLOOR}, tuple(chosen), 1, seed))
        jobs += [
            Job("composed", label, config, tuple(chosen), interval, seed)
            for label, config in sweep.methods.items()
            for interval in sweep.intervals
            if (label, interval) != (FLOOR, 1)
        ]
    return jobs
