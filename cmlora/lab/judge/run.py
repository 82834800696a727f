"""Pairs of pictures before a judge: same set, noise and interval, two methods, in both orders; a line of JSON each."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmlora.errors import CMLoRAError
from cmlora.lab.judge.models import Judge, NoAnswerError
from cmlora.lab.judge.question import NonsenseError, question, read_answer
from cmlora.lab.score.pictures import Shot, labels_of
from cmlora.lab.score.run import read_lines
from cmlora.lab.sweep.folder import write_atomically

AGAIN = 3
"""How often a judge is asked again where it gave no judgement."""


@dataclass(frozen=True)
class Pair:
    """Two pictures of one set from one noise: methods a and b, as the caller named them."""

    a: Shot
    b: Shot

    @property
    def key(self) -> tuple[str, str]:
        """Of both files, with what was in them."""
        return f"{self.a.file} {self.a.sha256}", f"{self.b.file} {self.b.sha256}"


def split_methods(text: str) -> tuple[str, str]:
    """Two labels; a comma before "interval" belongs to the label.

    Raises:
        CMLoRAError: not two.
    """
    parts = [part.strip() for part in re.split(r",(?!\s*interval )", text)]
    if len(parts) != 2 or not all(parts):
        raise CMLoRAError(f"--methods must be two with a comma between them, got {text!r}")
    return parts[0], parts[1]


def file_name(label: str) -> str:
    """Of a label."""
    return re.sub(r"[^\w.-]+", "-", label)


def find_pairs(shots: Sequence[Shot], a: str, b: str) -> list[Pair]:
    """All pairs of two labels: "merge", or "merge, interval 2" where there are several intervals.

    A method's bare name stands for all of its intervals, each against the other's same one.

    Raises:
        CMLoRAError: the two share no set and noise.
    """
    labels = labels_of(shots)

    def of(label: str) -> dict[tuple[Any, ...], Shot]:
        return {
            (*shot.pairs_with, shot.interval if named != label else None): shot
            for shot, named in zip(shots, labels, strict=True)
            if label in (named, shot.method)
        }

    ones, others = of(a), of(b)
    pairs = [Pair(shot, others[key]) for key, shot in ones.items() if key in others]
    if not pairs or a == b:
        known = ", ".join(dict.fromkeys(labels))
        raise CMLoRAError(f"--methods must be two that share sets and noise, of {known}; got {a!r} and {b!r}")
    return pairs


def elements_of(shot: Shot) -> list[str]:
    """What the question lists: a line per LoRA."""
    return [", ".join(words) or name for name, words in shot.triggers.items()]


def judge(pairs: Sequence[Pair], who: Judge, path: Path, again: int = AGAIN, wait: float = 1.0) -> list[dict[str, Any]]:
    """Ask about every pair in both orders what is not yet in the JSONL file; what failed before is asked again.

    Args:
        path: of the file. again: how often more where the answer is no judgement. wait: seconds before the second
            time, twice as many before each later one.

    Returns:
        The records of these pairs and this judge: "scores" {criterion: [of a, of b]}, or "failed": why, each time.
    """
    known = {_key(record): record for record in read_lines(path)}
    write_atomically(path, "".join(f"{json.dumps(r)}\n" for r in known.values()).encode(), path.parent)
    found = []
    asked = [(pair, order) for pair in pairs for order in ("ab", "ba")]
    with path.open("a") as log:
        for pair, order in tqdm(asked, desc="judge", mininterval=2.0):
            record = known.get((who.name, *pair.key, order))
            if record is None or "scores" not in record:
                record = {"judge": who.name, "pair": list(pair.key), "order": order, **_about(pair)}
                record |= _ask(pair, order, who, again, wait)
                log.write(json.dumps(record) + "\n")
                log.flush()
            found.append(record)
    return found


def add_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write records of people to the file; a person's earlier word on a pair goes."""
    known = {_key(record): record for record in [*read_lines(path), *records]}
    write_atomically(path, "".join(f"{json.dumps(r)}\n" for r in known.values()).encode(), path.parent)


def _about(pair: Pair) -> dict[str, Any]:
    return {"loras": list(pair.a.loras), "seed": pair.a.seed}


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    return record["judge"], *record["pair"], record["order"]


def _ask(pair: Pair, order: str, who: Judge, again: int, wait: float) -> dict[str, Any]:
    first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
    text, failed = question(elements_of(pair.a)), []
    for attempt in range(again + 1):
        if attempt:
            time.sleep(wait * 2 ** (attempt - 1))
        try:
            scores = read_answer(who.ask(text, first, second))
        except (NonsenseError, NoAnswerError) as error:
            failed.append(str(error)[:200])
            continue
        turned = {name: list(both if order == "ab" else reversed(both)) for name, both in scores.items()}
        return {"scores": turned, "asked": attempt + 1}
    return {"failed": failed, "asked": again + 1}
