"""What a judge is asked about two pictures, and how its answer is read: JSON with four scores each, or it is none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

CRITERIA = ("integration", "consistency", "accuracy", "appeal")
"""CMLoRA's four (arXiv 2502.04923)."""

MEANING = {
    "integration": "do the elements form one scene, with natural overlaps, or are they pasted side by side?",
    "consistency": "do style, light, shadows and perspective agree over the whole picture?",
    "accuracy": "is every element there, with its features, and nothing wrong in its place?",
    "appeal": "colours, balance, sharpness; no deformities or artefacts",
}
FORM = json.dumps({f"image_{n}": dict.fromkeys(CRITERIA, 0) for n in (1, 2)})

Scores = dict[str, tuple[float, float]]
"""criterion -> score of the first and of the second picture, 0 to 10."""


class NonsenseError(ValueError):
    """An answer that is no judgement; says why."""


def question(elements: Sequence[str]) -> str:
    """The text that goes with two pictures.

    Args:
        elements: what each LoRA stands for.
    """
    lines = ["Two images were made from the same description. It asks for these elements in one image:", ""]
    lines += [f"{number}. {element}" for number, element in enumerate(elements, 1)]
    lines += ["", "Score both images, the first and the second one, from 0 (worst) to 10 (best) on four criteria:", ""]
    lines += [f"- {name}: {meaning}" for name, meaning in MEANING.items()]
    lines += [
        "",
        "Judge each image by itself and not by its place. Equal scores are allowed.",
        "Answer with JSON alone, numbers in the place of the zeros:",
        FORM,
    ]
    return "\n".join(lines)


def read_answer(text: str) -> Scores:
    """The scores of an answer; words around the JSON and a code fence do not matter.

    Raises:
        NonsenseError: no JSON, other keys, or a score that is no number from 0 to 10.
    """
    start, end = text.find("{"), text.rfind("}")
    try:
        found = json.loads(text[start : end + 1])
    except json.JSONDecodeError as error:
        raise NonsenseError(f"no JSON: {error.msg}") from None
    if not isinstance(found, dict) or set(found) != {"image_1", "image_2"}:
        raise NonsenseError('must have the keys "image_1" and "image_2"')
    for name, scores in found.items():
        if not isinstance(scores, dict) or set(scores) != set(CRITERIA):
            raise NonsenseError(f"{name} must have the keys {', '.join(CRITERIA)}")
    return {name: (_score(found, "image_1", name), _score(found, "image_2", name)) for name in CRITERIA}


def _score(found: dict[str, dict[str, Any]], image: str, name: str) -> float:
    value = found[image][name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10:
        raise NonsenseError(f"{image} {name} must be a number from 0 to 10, got {value!r}")
    return float(value)
