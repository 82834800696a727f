"""A sweep from the command line's words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast, get_args

from cmlora import sprites
from cmlora.config import CacheSchedule, CMLoRAConfig, Method
from cmlora.errors import CMLoRAError
from cmlora.lab.settings import parse_setting
from cmlora.lab.sweep.info import SHIPPED, read_info
from cmlora.lab.sweep.jobs import SOLO
from cmlora.lab.sweep.settings import METHODS, PRESETS, Drawing, Interval, Layout, Preset, Style, Sweep

PLAIN = Preset(Drawing(), METHODS, (1,), 0, "own")
SPRITES = Preset(Drawing(steps=20, guidance=4.0), METHODS, (1,), 0, "own")


def make_sweep(
    *,
    loras: str,
    lora_dir: Path | None,
    model: str | None,
    preset: str | None,
    style: str,
    methods: str | None,
    settings: Sequence[str],
    intervals: str | None,
    sizes: str,
    seeds: str | None,
    limit: int | None,
    layout: str | None,
    drawing: Mapping[str, Any],
) -> Sweep:
    """What was not given (None) is the preset's; without a preset that of the model's own.

    Raises:
        CMLoRAError: names the option.
    """
    shipped = loras == SHIPPED and model is None
    base = _preset(preset, SPRITES if shipped else PLAIN)
    if not shipped and (model is None or (lora_dir is None and loras != SHIPPED)):
        raise CMLoRAError("--loras INFO.json needs --model and --lora-dir")
    names = methods.split(",") if methods else [] if settings else list(base.methods)
    given = {name: value for name, value in drawing.items() if value is not None}
    if layout is not None and layout not in get_args(Layout):
        raise CMLoRAError(f"--layout must be one of {', '.join(get_args(Layout))}, got {layout!r}")
    return Sweep(
        model=model or sprites.model_path(),
        lora_dir=str(lora_dir or Path(sprites.lora_path(sprites.CONCEPTS[0])).parent),
        loras=read_info(loras),
        sizes=_numbers("--sizes", sizes),
        limit=limit,
        style=Style.read(style),
        drawing=Drawing(**{**vars(base.drawing), **given}),
        methods=_methods(names, settings),
        intervals=base.intervals if intervals is None else tuple(_interval(text) for text in intervals.split(",")),
        seeds=(base.seed,) if seeds is None else _numbers("--seeds", seeds),
        layout=cast(Layout, layout or base.layout),
    )


def _preset(name: str | None, without: Preset) -> Preset:
    if name is not None and name not in PRESETS:
        raise CMLoRAError(f"--preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return without if name is None else PRESETS[name]


def _methods(names: Sequence[str], settings: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name not in get_args(Method):
            raise CMLoRAError(f"--methods must be of {', '.join(get_args(Method))}, got {name!r}")
        found[name] = {"method": name}
    for text in settings:
        label, config = parse_setting(text)
        if not re.fullmatch(r"[\w.-]+", label) or label in (*found, *get_args(Method), SOLO, "naive"):
            raise CMLoRAError(f"--setting {text}: NAME must be new and of letters, digits, -, _ and ., got {label!r}")
        if "cache_interval" in config:
            raise CMLoRAError(f"--setting {text}: the interval is that of --intervals")
        found[label] = config
    for config in found.values():
        CMLoRAConfig.build(None, config)
    return found


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise CMLoRAError(f"{option} must be whole numbers with commas between them, got {text!r}") from None
    if len(set(found)) < len(found) or min(found) < 0:
        raise CMLoRAError(f"{option} must be different numbers >= 0, got {text!r}")
    return found


def _interval(text: str) -> Interval:
    if text.isdigit() and int(text) > 0:
        return int(text)
    if text not in get_args(CacheSchedule):
        raise CMLoRAError(f"--intervals must be of 1, 2, ..., {', '.join(get_args(CacheSchedule))}, got {text!r}")
    return text
