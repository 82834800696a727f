"""Scores every picture of a folder by every metric asked for: a line of JSON each, and none is done twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmlora.errors import CMLoRAError
from cmlora.lab.score.metrics import METRICS
from cmlora.lab.score.pictures import Shot
from cmlora.lab.sweep.folder import write_atomically

Scores = dict[str, dict[str, Any]]
"""file -> {"values": {name: number}, "loras": {id: number}}; a picture without a score is not in it."""


def parse_metric(text: str) -> tuple[str, str]:
    """NAME[=MODEL].

    Raises:
        CMLoRAError: no metric of this name.
    """
    name, _, model = text.partition("=")
    if name not in METRICS:
        raise CMLoRAError(f"--metric must be one of {', '.join(METRICS)}, got {name!r}")
    return name, model


def score(shots: Sequence[Shot], folder: Path, metrics: Mapping[str, str]) -> dict[str, Scores]:
    """Score what is not yet in folder/{metric}.jsonl.

    Args:
        metrics: name -> model ("": the usual one). A picture that changed since, or another model, is scored again.

    Returns:
        By metric, of all pictures given.
    """
    return {name: _one(shots, folder, name, model) for name, model in metrics.items()}


def _one(shots: Sequence[Shot], folder: Path, name: str, model: str) -> Scores:
    path = folder / f"{name}.jsonl"
    known = {_key(record): record for record in read_lines(path)}
    found: Scores = {}
    todo = []
    for shot in shots:
        record = known.get((shot.file, shot.sha256, model))
        if record is None:
            todo.append(shot)
        elif record["values"]:
            found[shot.file] = record
    if not todo:
        return found
    metric = METRICS[name](model, shots)  # before the file is touched: it may lack a package
    write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in known.values()).encode(), folder)
    with path.open("a") as log, tqdm(total=len(todo), desc=name, mininterval=2.0) as bar:
        for first in range(0, len(todo), metric.batch):
            batch = todo[first : first + metric.batch]
            for shot, marks in zip(batch, metric.score(batch), strict=True):
                told = {"values": {}, "loras": {}} if marks is None else asdict(marks)
                record = {"file": shot.file, "sha256": shot.sha256, "model": model, **told}
                log.write(json.dumps(record) + "\n")
                if marks is not None:
                    found[shot.file] = record
            log.flush()
            bar.update(len(batch))
    return found


def _key(record: Mapping[str, Any]) -> tuple[str, str, str]:
    return record["file"], record["sha256"], record["model"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a line that was cut off is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        record = _parse(line)
        if record is not None:
            found.append(record)
    return found


def _parse(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except json.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None
