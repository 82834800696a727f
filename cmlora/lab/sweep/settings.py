"""What a sweep is: the settings of the two published codes, style prefixes, and all that defines the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cmlora.errors import CMLoRAError
from cmlora.lab.sweep.info import Lora

Layout = Literal["own", "composition", "cmlora"]
Interval = int | str
METHODS = ("merge", "switch", "composite", "cmlora", "routed")


@dataclass(frozen=True)
class Drawing:
    """How every picture of a sweep is drawn.

    Attributes:
        steps: denoising steps. guidance: scale of classifier-free guidance. scale: of every LoRA.
        height, width: pixels; None: the model's.
        scheduler: "dpmsolver++", or "model": the one that the model comes with.
    """

    steps: int = 25
    guidance: float = 7.5
    scale: float = 1.0
    height: int | None = None
    width: int | None = None
    scheduler: str = "model"

    def __post_init__(self) -> None:
        if self.scheduler not in ("model", "dpmsolver++"):
            raise CMLoRAError(f"scheduler must be model or dpmsolver++, got {self.scheduler!r}")


@dataclass(frozen=True)
class Preset:
    """Settings of a published code."""

    drawing: Drawing
    methods: tuple[str, ...]
    intervals: tuple[Interval, ...]
    seed: int
    layout: Layout


PRESETS: dict[str, Preset] = {
    "composition-anime": Preset(
        Drawing(200, 10.0, 0.8, 512, 512, "dpmsolver++"), METHODS[:3], (1,), 111, "composition"
    ),
    "composition-reality": Preset(
        Drawing(100, 7.0, 0.8, 1024, 768, "dpmsolver++"), METHODS[:3], (1,), 111, "composition"
    ),
    "cmlora": Preset(Drawing(220, 8.5, 1.0, 512, 512, "dpmsolver++"), METHODS[:4], (1, 2, 3, 5), 222, "cmlora"),
}
"""Multi-LoRA-Composition's two (arXiv 2402.16843), and CMLoRA's (arXiv 2502.04923)."""


@dataclass(frozen=True)
class Style:
    """What every prompt begins with, and what is not to be drawn."""

    name: str
    prefix: str = ""
    negative: str = ""

    @classmethod
    def read(cls, text: str) -> Style:
        """ "none", the name of a shipped one, or a JSON file {"prefix": ..., "negative": ...}.

        Raises:
            CMLoRAError: no such style, or a file of another form.
        """
        if text == "none":
            return cls("none")
        shipped = Path(__file__).parent / "styles"
        file = shipped / f"{text}.json" if (shipped / f"{text}.json").is_file() else Path(text)
        if not file.is_file():
            known = ", ".join(sorted(path.stem for path in shipped.glob("*.json")))
            raise CMLoRAError(f"--style must be none, {known} or a JSON file, got {text!r}")
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise CMLoRAError(f"--style {text} is not JSON: {error}") from None
        if not isinstance(found, Mapping) or not set(found) <= {"prefix", "negative"}:
            raise CMLoRAError(f'--style {text} must be {{"prefix": "...", "negative": "..."}}')
        return cls(file.stem, str(found.get("prefix", "")), str(found.get("negative", "")))


@dataclass(frozen=True)
class Sweep:
    """All that defines a sweep; two equal ones draw the same pictures.

    Attributes:
        model: folder or hub id of a diffusers pipeline. lora_dir: folder of ID.safetensors.
        loras: of INFO.json. sizes: numbers of LoRAs in a set. limit: at most so many sets of a size, of a fixed
            shuffle; None: all.
        style: prefix and negative prompt. drawing: how.
        methods: label in file names -> fields of CMLoRAConfig.
        intervals: of the cache, for every method. seeds: pictures per set, method and interval.
        layout: how files are named (`folder.py`).
    """

    model: str
    lora_dir: str
    loras: tuple[Lora, ...]
    sizes: tuple[int, ...] = (2, 3, 4, 5)
    limit: int | None = None
    style: Style = Style("none")
    drawing: Drawing = Drawing()
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {m: {"method": m} for m in METHODS})
    intervals: tuple[Interval, ...] = (1,)
    seeds: tuple[int, ...] = (0,)
    layout: Layout = "own"

    def __post_init__(self) -> None:
        if self.layout != "own" and len(self.seeds) > 1:
            raise CMLoRAError(f"layout {self.layout!r} has no seed in its names: give one seed, or layout 'own'")
        if self.layout == "composition" and len(self.intervals) > 1:
            raise CMLoRAError("layout 'composition' has no interval in its names: give one interval, or another layout")
