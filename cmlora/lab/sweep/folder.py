"""A sweep's folder: where pictures lie, which are whole, and its manifest.

    DIR/sweep.json                                                 what is the same for all pictures
    DIR/output_{style}/{N}_elements/{method}_{ids}_....png         pictures, in the published codes' layout
    DIR/records/{N}_elements/....json                              a record per picture, written behind it
    DIR/manifest.jsonl                                             all records

Every file is written beside its place and moved there, so that whoever is killed leaves whole files only; a picture
whose bytes are not those of its record is drawn again. Processes share nothing but the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmlora.errors import CMLoRAError
from cmlora.lab.sweep.info import Lora
from cmlora.lab.sweep.jobs import FLOOR, SOLO, Job
from cmlora.lab.sweep.settings import Layout

MANIFEST, RECORDS, TEMPORARY, ABOUT = "manifest.jsonl", "records", ".tmp", "sweep.json"
TAIL = r"(?:_(?P<interval>\d+|nonuniform|quadratic))?(?:_s(?P<seed>\d+))?"


def picture_path(job: Job, layout: Layout, style: str) -> Path:
    """Relative to the folder. own: {method}_{ids}_{interval}_s{seed}.png; cmlora: without the seed; composition:
    without seed and interval."""
    tail = {"own": f"_{job.interval}_s{job.seed}", "cmlora": f"_{job.interval}", "composition": ""}[layout]
    name = f"{job.method}_{'_'.join(job.ids)}{tail}.png"
    return Path(f"output_{style}") / f"{len(job.ids)}_elements" / name


def parse_name(stem: str, sets: Mapping[str, tuple[Lora, ...]]) -> tuple[str, tuple[Lora, ...], str, int] | None:
    """Method, set, interval ("1" where there is none) and seed of a picture's name in any of the layouts.

    Args:
        stem: of the file. sets: by their ids joined with _. CMLoRA writes "naive{ids}" for the base model.
    """
    ids = "|".join(sorted(map(re.escape, sets), key=len, reverse=True))
    found = re.fullmatch(rf"(?:naive_?|(?P<method>[\w.-]+?)_)(?P<ids>{ids}){TAIL}", stem)
    if found is None:
        return None
    method = found["method"] or "naive"
    method = FLOOR if method == "naive" else method
    return method, sets[found["ids"]], found["interval"] or "1", int(found["seed"] or 0)


def write_atomically(path: Path, content: bytes, folder: Path, again: int = 3) -> None:
    """Beside its place, then moved there: whoever reads the path finds the old file or the new one, whole."""
    temporary = folder / TEMPORARY
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = temporary / uuid.uuid4().hex
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except FileNotFoundError:  # another process, with nothing left to draw, has tidied up (`write_manifest`)
        if not again:
            raise
        write_atomically(path, content, folder, again - 1)


def digest(content: bytes) -> str:
    """sha256."""
    return hashlib.sha256(content).hexdigest()


class Folder:
    """A sweep's pictures and records on disk."""

    def __init__(self, path: Path, layout: Layout, style: str) -> None:
        self.path, self.layout, self.style = path, layout, style

    def picture(self, job: Job) -> Path:
        """Relative to the folder."""
        return picture_path(job, self.layout, self.style)

    def _record(self, job: Job) -> Path:
        picture = self.picture(job)
        return self.path / RECORDS / picture.parent.name / f"{picture.stem}.json"

    def find(self, job: Job, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The record of a picture that is there, whole; None: it is to be drawn.

        Args:
            identity: what the record must say of the picture.

        Raises:
            CMLoRAError: the picture was drawn with another setting.
        """
        record, picture = _read(self._record(job)), self.path / self.picture(job)
        if record is None or not picture.is_file() or digest(picture.read_bytes()) != record["sha256"]:
            return None
        for name, value in identity.items():
            if record.get(name) != value:
                raise CMLoRAError(
                    f"{self.picture(job)} was drawn with {name} {record.get(name)!r}, now it is {value!r}: "
                    "take another folder, or remove the picture"
                )
        return record

    def add(self, job: Job, png: bytes, record: Mapping[str, Any]) -> None:
        """The picture, then its record: a record without its picture cannot be."""
        write_atomically(self.path / self.picture(job), png, self.path)
        text = json.dumps({"file": self.picture(job).as_posix(), "sha256": digest(png), **record})
        write_atomically(self._record(job), text.encode(), self.path)

    def write_manifest(self, jobs: Iterable[Job]) -> int:
        """All records in the order of the jobs, then those of earlier sweeps; returns how many jobs have none."""
        own = [self._record(job) for job in jobs]
        lines: list[str] = []
        missing = 0
        for path in [*own, *sorted(set((self.path / RECORDS).glob("*/*.json")) - set(own))]:
            record = _read(path)
            missing += record is None
            lines += [] if record is None else [json.dumps(record)]
        write_atomically(self.path / MANIFEST, "".join(f"{line}\n" for line in lines).encode(), self.path)
        if not missing:
            shutil.rmtree(self.path / TEMPORARY, ignore_errors=True)
        return missing

    def settle(self, about: Mapping[str, Any], loras: Mapping[str, str]) -> None:
        """Write or check sweep.json: what must be the same for all pictures of the folder.

        Args:
            loras: id -> sha256 of the file.

        Raises:
            CMLoRAError: the folder holds a sweep with another setting or another file of a LoRA.
        """
        path = self.path / ABOUT
        known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        earlier = known.get("files", {})
        for name, value in known.items() if known else ():
            if name in about and name != "info" and about[name] != value:
                raise CMLoRAError(f"{self.path} holds a sweep with {name} {value!r}, now {about[name]!r}: take another")
        other = [name for name, sha in loras.items() if earlier.get(name, sha) != sha]
        if other:
            raise CMLoRAError(f"{self.path} holds pictures of other files of {', '.join(other)}: take another folder")
        text = json.dumps({**about, "files": {**earlier, **loras}}, indent=1)
        write_atomically(path, text.encode(), self.path)


def _read(path: Path) -> dict[str, Any] | None:
    """A record; None where there is none, or one that somebody else cut off."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "sha256" in found else None


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The records of a sweep's pictures: the manifest's, and those that a killed run had no time to enter there."""
    path = folder / MANIFEST
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {record["file"] for record in found}
    later = (_read(record) for record in sorted((folder / RECORDS).glob("*/*.json")))
    return found + [record for record in later if record is not None and record["file"] not in known]


def read_published(folder: Path, sets: Sequence[tuple[Lora, ...]]) -> list[dict[str, Any]]:
    """Records of the pictures of others, from their names alone: output_{style}/{N}_elements/..., or below.

    Raises:
        CMLoRAError: no picture's name is one of the sets.
    """
    by_name = {"_".join(lora.id for lora in chosen): chosen for chosen in sets}
    found, strange = [], []
    for path in sorted(folder.rglob("*.png")):
        named = parse_name(path.stem, by_name)
        if named is None:
            strange.append(path.name)
            continue
        method, chosen, interval, seed = named
        found.append(
            {
                "file": path.relative_to(folder).as_posix(),
                "sha256": digest(path.read_bytes()),
                "kind": "solo" if method == SOLO else "floor" if method == FLOOR and interval == "1" else "composed",
                "method": method,
                "loras": [lora.id for lora in chosen],
                "interval": int(interval) if interval.isdigit() else interval,
                "seed": seed,
            }
        )
    if not found:
        example = f", such as {strange[0]}" if strange else ""
        raise CMLoRAError(f"{folder} has no picture named METHOD_IDS[_INTERVAL].png of INFO.json's ids{example}")
    return found
