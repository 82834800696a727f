"""The pictures of a folder, a sweep's or one in a published layout, and what is known of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from cmlora.errors import CMLoRAError
from cmlora.lab.sweep.folder import MANIFEST, RECORDS, digest, read_manifest, read_published
from cmlora.lab.sweep.info import find_sets, read_info
from cmlora.lab.sweep.settings import Style


@dataclass(frozen=True)
class Shot:
    """One picture of a folder.

    Attributes:
        path: of its file; file: the same, relative to the folder. sha256: of its bytes.
        kind: composed, floor or solo. method: the label. interval: of the cache.
        loras: ids of the set. triggers: id -> trigger words. prompt: the whole. seed: which picture of the set.
    """

    path: Path
    file: str
    sha256: str
    kind: str
    method: str
    interval: int | str
    loras: tuple[str, ...]
    triggers: Mapping[str, tuple[str, ...]]
    prompt: str
    seed: int

    @property
    def pairs_with(self) -> tuple[tuple[str, ...], int]:
        """Pictures with the same start from the same noise: set and seed."""
        return self.loras, self.seed

    def open(self) -> Image.Image:
        """The picture, RGB."""
        return Image.open(self.path).convert("RGB")


def read_shots(folder: Path, info: str | None = None, style: str = "none") -> list[Shot]:
    """All pictures of a sweep's folder that are whole, or of a folder in a published layout.

    Args:
        info: INFO.json; needed where there is no manifest. style: of the prompts, there.

    Raises:
        CMLoRAError: no manifest and no INFO.json, or no pictures.
    """
    if (folder / MANIFEST).exists() or (folder / RECORDS).is_dir():
        records = read_manifest(folder)
        records = [record for record in records if _whole(folder / record["file"], record["sha256"])]
    else:
        if info is None:
            raise CMLoRAError(f"{folder} has no {MANIFEST}: name the INFO.json of its pictures with --loras")
        records = _published(folder, info, Style.read(style))
    if not records:
        raise CMLoRAError(f"{folder} has no pictures")
    return [_shot(folder, record) for record in records]


def _whole(path: Path, sha256: str) -> bool:
    return path.is_file() and digest(path.read_bytes()) == sha256


def _published(folder: Path, info: str, style: Style) -> list[dict[str, Any]]:
    loras = read_info(info)
    others = len({lora.type for lora in loras} - {"character"})
    sets = [chosen for size in range(2, others + 2) for chosen in find_sets(loras, size)]
    by_id = {lora.id: lora for lora in loras}
    records = read_published(folder, [*sets, *((lora,) for lora in loras)])
    for record in records:
        words = {name: list(by_id[name].triggers) for name in record["loras"]}
        record["triggers"] = words
        every = [word for own in words.values() for word in own]
        record["prompt"] = ", ".join([style.prefix, *every] if style.prefix else every)
    return records


def _shot(folder: Path, record: Mapping[str, Any]) -> Shot:
    return Shot(
        path=folder / record["file"],
        file=record["file"],
        sha256=record["sha256"],
        kind=record["kind"],
        method=record["method"],
        interval=record["interval"],
        loras=tuple(record["loras"]),
        triggers={name: tuple(words) for name, words in record["triggers"].items()},
        prompt=record["prompt"],
        seed=record["seed"],
    )


def labels_of(shots: Sequence[Shot]) -> list[str]:
    """Of each picture the method; with its interval where the methods have several."""
    several = len({str(shot.interval) for shot in shots if shot.kind == "composed"}) > 1
    return [
        f"{shot.method}, interval {shot.interval}" if several and shot.kind == "composed" else shot.method
        for shot in shots
    ]
