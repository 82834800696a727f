"""What `cmlora quality` compares: presets, and settings as they are typed on the command line.

A setting is a name and fields of CMLoRAConfig. Ways of composing that are not this library's have fields of their own:

- weights: factor on every LoRA, as people lower theirs when they load several; or a factor by role, 1 if not named;
- peft: combination_type of PEFT's `add_weighted_adapter`; one adapter of them all, drawn by the plain pipeline;
- alone: every LoRA in a picture of its own, with the same prompt and noise: the ceiling of what a LoRA can show;
- swap: one of `cmlora.sprites.TROUBLE`, which stands in for the LoRA of its concept. Only combinations with the
  concepts of all that any setting swaps are drawn, so that the settings stay comparable.

`shared` names roles here: which LoRA has the role differs from combination to combination.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from cmlora import sprites
from cmlora.config import CMLoRAConfig

Config = dict[str, Any]

OTHERS = ("weights", "peft", "alone", "swap")
"""Fields that are not CMLoRAConfig's."""

FLOOR: Config = {"method": "no_lora", "cache_interval": 1}
CEILING: Config = {"method": "merge", "alone": True}

MERGE: Config = {"method": "merge"}
LOCAL: Config = {"method": "composite", "combine": "local"}
ROUTED: Config = {"method": "routed"}
HALF_TEXT: Config = {"method": "routed", "mask_text": 0.5}


def _lowered(name: str, config: Config, *weights: float) -> dict[str, Config]:
    """A setting at whole weights and as people lower theirs."""
    return {name: config, **{f"{name} at {weight}": {**config, "weights": weight} for weight in weights}}


BEST = "routed, half text at 0.6"
"""Chosen on the half to choose on, among `TEXT`."""
COMPARED = (BEST, "routed", "composite, local")
"""Settings whose differences from all others are printed."""

METHODS: dict[str, Config] = {
    "no LoRA": FLOOR,
    "each alone": CEILING,
    **_lowered("merge", MERGE, 0.8, 0.6),
    "composite, deviation": {"method": "composite", "combine": "deviation"},
    "composite, local": LOCAL,
    **_lowered("routed", ROUTED, 0.6),
    BEST: {**HALF_TEXT, "weights": 0.6},
}
"""What competes, between the floor and the ceiling."""

PUBLISHED: dict[str, Config] = {
    "each alone": CEILING,
    **_lowered("merge", MERGE, 0.6),
    **{f"PEFT {kind}": {"peft": kind} for kind in ("cat", "ties_svd", "dare_linear")},
    "switch": {"method": "switch"},
    "composite, mean": {"method": "composite", "combine": "mean"},
    "cmlora, mean": {"method": "cmlora", "combine": "mean"},
    "cmlora, local": {"method": "cmlora", "combine": "local"},
    "composite, local": LOCAL,
    BEST: {**HALF_TEXT, "weights": 0.6},
}
"""What others publish, and the defaults, beside the best."""

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
    BEST: {**HALF_TEXT, "weights": 0.6},
    **{f"temperature {tau}": {**HALF_TEXT, "weights": 0.6, "mask_temperature": tau} for tau in (0.3, 1.0)},
    **{f"{k} mask steps": {**HALF_TEXT, "weights": 0.6, "mask_steps": k} for k in (1, 4)},
    "composite, local": LOCAL,
    **{f"local, temperature {tau}": {**LOCAL, "mask_temperature": tau} for tau in (0.5, 1.0)},
}
"""The masks' other fields, away from the defaults."""

TEXT: dict[str, Config] = {
    "merge at 0.6": {**MERGE, "weights": 0.6},
    "local at 0.8": {**LOCAL, "weights": 0.8},
    **{
        f"routed at {weight}, text {text}, temperature {tau}": {
            **ROUTED,
            "mask_text": text,
            "weights": weight,
            "mask_temperature": tau,
        }
        for text in (0.25, 0.5)
        for weight in (0.8, 0.6)
        for tau in (0.6, 0.3)
    },
    "routed at 0.8, text 0.5, style shared": {**HALF_TEXT, "weights": 0.8, "shared": ["style"]},
}
"""What `mask_text` and the weights beside it are chosen from."""

STYLES: dict[str, Config] = {
    BEST: {**HALF_TEXT, "weights": 0.6},
    **{
        f"style {style}, background {background}": {
            **HALF_TEXT,
            "weights": {**dict.fromkeys(sprites.ROLES, 0.6), "style": style, "background": background},
        }
        for style, background in ((0.4, 0.8), (0.8, 0.8))
    },
    **{
        f"style {style}, shared": {
            **HALF_TEXT,
            "shared": ["style"],
            "weights": {**dict.fromkeys(sprites.ROLES, 0.6), "style": style},
        }
        for style in (0.4, 0.6)
    },
    "composite, local": LOCAL,
}
"""Ways for a style to stand beside a background: both want the same places."""

TROUBLE: dict[str, Config] = {
    f"{name}{', ' + swap if swap else ''}": {**config, **({"swap": swap} if swap else {})}
    for name, config in (
        ("each alone", CEILING),
        ("merge", MERGE),
        ("merge at 0.6", {**MERGE, "weights": 0.6}),
        ("composite, local", LOCAL),
        ("routed, half text at 0.6", {**HALF_TEXT, "weights": 0.6}),
    )
    for swap in ("", *sprites.TROUBLE)
}
"""What one LoRA that makes trouble does to the others of a picture."""

PRESETS = {
    "methods": METHODS,
    "published": PUBLISHED,
    "partitions": PARTITIONS,
    "frontier": FRONTIER,
    "search": SEARCH,
    "masks": MASKS,
    "text": TEXT,
    "styles": STYLES,
    "trouble": TROUBLE,
}


def parse_setting(text: str) -> tuple[str, Config]:
    """NAME:field=value,... as a name and fields; a value is a Python literal, else a string.

    Raises:
        ValueError: names the text.
        ConfigError: a field or value that CMLoRAConfig refuses.
    """
    name, _, fields = text.partition(":")
    pairs = [pair.partition("=") for pair in re.split(r",(?![^({]*[)}])", fields) if pair]
    if not name or not all(equals for _, equals, _ in pairs):
        raise ValueError(f"a setting must read NAME:field=value,..., got {text!r}")
    config = {key: _literal(value) for key, _, value in pairs}
    CMLoRAConfig.build(None, own_fields(config))
    weights = config.get("weights")
    if isinstance(weights, dict) and not weights.keys() <= sprites.ROLES.keys():
        raise ValueError(f"weights must be of the roles {', '.join(sprites.ROLES)}, got {', '.join(map(str, weights))}")
    if config.get("swap", "rank64") not in sprites.TROUBLE:
        raise ValueError(f"swap must be one of {', '.join(sprites.TROUBLE)}, got {config['swap']!r}")
    return name, config


def own_fields(config: Config) -> Config:
    """Those of CMLoRAConfig."""
    return {key: value for key, value in config.items() if key not in OTHERS}


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return value
