"""What `cmlora quality` compares: presets, and settings as they are typed on the command line.

A setting is a name and fields of CMLoRAConfig. Ways of composing that are not this library's have fields of their own:

- weights: factor on every LoRA, as people lower theirs when they load several;
- peft: combination_type of PEFT's `add_weighted_adapter`; one adapter of them all, drawn by the plain pipeline;
- alone: every LoRA in a picture of its own, with the same prompt and noise: the ceiling of what a LoRA can show.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from cmlora.config import CMLoRAConfig

Config = dict[str, Any]

OTHERS = ("weights", "peft", "alone")
"""Fields that are not CMLoRAConfig's."""

FLOOR: Config = {"method": "no_lora", "cache_interval": 1}
CEILING: Config = {"method": "merge", "alone": True}

MERGES: dict[str, Config] = {
    "merge": {"method": "merge"},
    "merge at 0.8": {"method": "merge", "weights": 0.8},
    "merge at 0.6": {"method": "merge", "weights": 0.6},
    **{f"PEFT {kind}": {"peft": kind} for kind in ("cat", "ties_svd", "dare_linear")},
}

METHODS: dict[str, Config] = {
    "no LoRA": FLOOR,
    "each alone": CEILING,
    **MERGES,
    "switch": {"method": "switch"},
    "composite, mean": {"method": "composite", "combine": "mean"},
    "composite, deviation": {"method": "composite", "combine": "deviation"},
    "composite, local": {"method": "composite", "combine": "local"},
    "cmlora, mean": {"method": "cmlora", "combine": "mean"},
    "cmlora, local": {"method": "cmlora", "combine": "local"},
    "routed": {"method": "routed"},
}
"""Each method between the floor and the ceiling, beside merges as people run them."""

PARTITIONS: dict[str, Config] = {
    f"cmlora {partition}, {combine}": {"method": "cmlora", "partition": partition, "combine": combine}
    for partition in ("offline", "online", "async")
    for combine in ("mean", "deviation", "local")
}

FRONTIER: dict[str, Config] = {
    **{f"merge, interval {k}": {"method": "merge", "cache_interval": k} for k in (1, 2, 3, 5)},
    **{f"routed, interval {k}": {"method": "routed", "cache_interval": k} for k in (1, 2, 3, 5)},
    "mean, interval 2": {"combine": "mean", "cache_interval": 2},
    **{
        f"local, interval {k}, branch {branch[0]}.{branch[1]}": {"cache_interval": k, "cache_branch": branch}
        for k in (1, 2, 3, 5)
        for branch in ((0, 0), (0, 1), (1, 0))
        if k != 1 or branch == (0, 1)
    },
}
"""Quality against cost. "mean, interval 2" is the published code's default; without a cache there is no branch."""

SEARCH: dict[str, Config] = {
    "defaults": {},
    "features stay": {"cache_follow": False},
    "max_cache_age 4": {"max_cache_age": 4},
    "dominant_weight 1": {"dominant_weight": 1.0},
    "dominant_decay 0": {"dominant_decay": 0.0},
    "late_stage low": {"late_stage": "low"},
    "online_gate 0": {"online_gate": 0.0},
    "online_gate 0.6": {"online_gate": 0.6},
    "offline": {"partition": "offline"},
    "async": {"partition": "async"},
}
"""One field at a time away from the defaults."""

MASKS: dict[str, Config] = {
    "merge": {"method": "merge"},
    **{f"routed, temperature {tau}": {"method": "routed", "mask_temperature": tau} for tau in (0.3, 0.6, 1.0)},
    **{f"routed, {k} mask steps": {"method": "routed", "mask_steps": k} for k in (1, 4)},
    **{
        f"local, temperature {tau}": {"method": "composite", "combine": "local", "mask_temperature": tau}
        for tau in (0.25, 0.5, 1.0)
    },
}
"""What the masks' defaults are chosen from."""

PRESETS = {"methods": METHODS, "partitions": PARTITIONS, "frontier": FRONTIER, "search": SEARCH, "masks": MASKS}


def parse_setting(text: str) -> tuple[str, Config]:
    """NAME:field=value,... as a name and fields; a value is a Python literal, else a string.

    Raises:
        ValueError: names the text.
        ConfigError: a field or value that CMLoRAConfig refuses.
    """
    name, _, fields = text.partition(":")
    pairs = [pair.partition("=") for pair in re.split(r",(?![^(]*\))", fields) if pair]
    if not name or not all(equals for _, equals, _ in pairs):
        raise ValueError(f"a setting must read NAME:field=value,..., got {text!r}")
    config = {key: _literal(value) for key, _, value in pairs}
    CMLoRAConfig.build(None, own_fields(config))
    return name, config


def own_fields(config: Config) -> Config:
    """Those of CMLoRAConfig."""
    return {key: value for key, value in config.items() if key not in OTHERS}


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
