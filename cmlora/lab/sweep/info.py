"""ComposLoRA's INFO.json (arXiv 2402.16843): which LoRAs there are, their types and trigger words, and sets of them."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cmlora.errors import CMLoRAError

TYPES = ("character", "clothing", "style", "background", "object")
FORM = '{type: [{"id": ..., "name": ..., "trigger": [...]}, ...]}'
SHIPPED = "sprites"
"""In the place of a file: the LoRAs that come with the package."""


@dataclass(frozen=True)
class Lora:
    """One LoRA of INFO.json.

    Attributes:
        id: its file's stem and the adapter's name. type: one of TYPES.
        name: for people. triggers: what the prompt says of it.
    """

    id: str
    type: str
    name: str
    triggers: tuple[str, ...]


def read_info(path: str | Path) -> tuple[Lora, ...]:
    """The LoRAs of an INFO.json, in the file's order; "sprites": those that come with the package.

    Raises:
        CMLoRAError: no such file, or not of ComposLoRA's form.
    """
    file = Path(__file__).parent / "sprites.json" if str(path) == SHIPPED else Path(path)
    try:
        found = json.loads(file.read_text())
    except OSError:
        raise CMLoRAError(f"--loras must be a file or {SHIPPED!r}, got {path}: no such file") from None
    except ValueError as error:
        raise CMLoRAError(f"{path} is not JSON: {error}") from None
    return parse_info(found, str(path))


def parse_info(found: Any, where: str) -> tuple[Lora, ...]:
    """The same from JSON's values."""
    if not isinstance(found, Mapping) or not all(isinstance(entries, list) for entries in found.values()):
        raise CMLoRAError(f"{where} must have the form {FORM}")
    loras = []
    for kind, entries in found.items():
        if kind not in TYPES:
            raise CMLoRAError(f"{where}: type must be one of {', '.join(TYPES)}, got {kind!r}")
        loras += [_lora(kind, entry, f"{where}: {kind} {number}") for number, entry in enumerate(entries, 1)]
    ids = [lora.id for lora in loras]
    twice = sorted({one for one in ids if ids.count(one) > 1})
    if twice:
        raise CMLoRAError(f"{where}: id must name one LoRA, got {', '.join(twice)} more than once")
    return tuple(loras)


def _lora(kind: str, entry: Any, where: str) -> Lora:
    if not isinstance(entry, Mapping) or not {"id", "trigger"} <= set(entry):
        raise CMLoRAError(f'{where} must have "id" and "trigger", got {entry!r}')
    name, triggers = entry["id"], entry["trigger"]
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]+", name):
        raise CMLoRAError(f"{where}: id must be letters, digits, - and _, since it names files, got {name!r}")
    if not isinstance(triggers, list) or not all(isinstance(word, str) for word in triggers):
        raise CMLoRAError(f"{where}: trigger must be a list of texts, got {triggers!r}")
    return Lora(name, kind, str(entry.get("name", name)), tuple(triggers))


def info_of(loras: Sequence[Lora]) -> dict[str, list[dict[str, Any]]]:
    """INFO.json again."""
    found: dict[str, list[dict[str, Any]]] = {}
    for lora in loras:
        found.setdefault(lora.type, []).append({"id": lora.id, "name": lora.name, "trigger": list(lora.triggers)})
    return found


def find_sets(loras: Sequence[Lora], size: int) -> list[tuple[Lora, ...]]:
    """All sets of `size` >= 2 LoRAs: one character first, and at most one of each other type, in the file's order.

    Raises:
        CMLoRAError: there is no such set.
    """
    by_type: dict[str, list[Lora]] = {}
    for lora in loras:
        by_type.setdefault(lora.type, []).append(lora)
    characters = by_type.pop("character", [])
    found = (
        []
        if size < 2
        else [
            chosen
            for types in itertools.combinations(by_type.values(), size - 1)
            for chosen in itertools.product(characters, *types)
        ]
    )
    if not found:
        raise CMLoRAError(
            f"sizes must be 2 to {len(by_type) + 1} with {len(characters)} characters and {len(by_type)} other types, "
            f"got {size}"
        )
    return found
