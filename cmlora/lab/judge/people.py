"""The same pairs for people: a folder with pictures side by side, sides drawn by lot, and a table to fill in."""

from __future__ import annotations

import csv
import hashlib
import html
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmlora.errors import CMLoRAError
from cmlora.lab.judge.question import CRITERIA, MEANING
from cmlora.lab.judge.run import Pair, elements_of

KEY, RATINGS, PAGE = "key.json", "ratings.csv", "index.html"
CHOICES = {"left": (1.0, 0.0), "tie": (0.0, 0.0), "right": (0.0, 1.0)}


def export_pairs(pairs: Sequence[Pair], folder: Path) -> list[Path]:
    """Write pictures, index.html, ratings.csv, and key.json, which says what is on which side: not for the raters.

    Raises:
        CMLoRAError: the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CMLoRAError(f"--export {folder}: must be empty, lest ratings be lost")
    folder.mkdir(parents=True, exist_ok=True)
    key, rows = {}, []
    for number, pair in enumerate(pairs, 1):
        turned = hashlib.sha256(" ".join(pair.key).encode()).digest()[0] % 2 == 1
        left, right = (pair.b, pair.a) if turned else (pair.a, pair.b)
        shutil.copyfile(left.path, folder / f"{number}_left.png")
        shutil.copyfile(right.path, folder / f"{number}_right.png")
        key[str(number)] = {"pair": list(pair.key), "turned": turned, "loras": list(pair.a.loras), "seed": pair.a.seed}
        wanted = ", ".join(map(html.escape, elements_of(pair.a)))
        rows.append(f"<h2>{number}</h2><p>{wanted}</p><img src={number}_left.png> <img src={number}_right.png>")
    explained = "".join(f"<li><b>{name}</b>: {meaning}" for name, meaning in MEANING.items())
    page = (
        "<!doctype html><meta charset=utf-8><title>Pairs</title>"
        "<style>img{width:42vw;image-rendering:pixelated}</style>"
        f"<p>Which picture is better, in each of four ways? Write left, right or tie into {RATINGS}."
        f"<ul>{explained}</ul>"
    )
    (folder / PAGE).write_text(page + "\n".join(rows))
    (folder / KEY).write_text(json.dumps(key, indent=1))
    with (folder / RATINGS).open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["pair", *CRITERIA])
        writer.writerows([number, *[""] * len(CRITERIA)] for number in key)
    return [folder / name for name in (PAGE, RATINGS, KEY)]


def import_ratings(ratings: Path, key: Path, rater: str) -> list[dict[str, Any]]:
    """Records as a judge's, from a filled-in ratings.csv; rows that are empty are left out.

    Raises:
        CMLoRAError: names the row with something else than left, right or tie.
    """
    known = json.loads(key.read_text())
    found = []
    for line, row in enumerate(csv.DictReader(io.StringIO(ratings.read_text())), 2):
        words = {name: (row.get(name) or "").strip().lower() for name in CRITERIA}
        if not any(words.values()):
            continue
        about = known.get((row.get("pair") or "").strip())
        if about is None or not set(words.values()) <= set(CHOICES):
            raise CMLoRAError(
                f"{ratings}, line {line}: must be a pair's number and left, right or tie for each, got {row}"
            )
        scores = {name: list(CHOICES[word][:: -1 if about["turned"] else 1]) for name, word in words.items()}
        record = {"judge": f"person {rater}", "pair": about["pair"], "order": "once", "scores": scores}
        found.append(record | {"loras": about["loras"], "seed": about["seed"]})
    return found
