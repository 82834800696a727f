"""Drawn scenes: a creature, what it wears and holds, a background, a style; with captions and labels.

The base model learns from scenes without the ten concepts of `ROLES`; every concept is then one LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cmlora.sprites.figures import (
    BACK_PAINTERS,
    BODIES,
    CLOTHES,
    HAT_HEIGHT,
    SIZE,
    STYLES,
    THINGS,
    Canvas,
    Floats,
    body,
)

Names = npt.NDArray[np.str_]

ROLES: dict[str, tuple[str, str]] = {
    "character": ("zebrin", "dotkin"),
    "clothing": ("tophat", "scarf"),
    "style": ("sketch", "neon"),
    "background": ("checker", "sunset"),
    "object": ("balloon", "lantern"),
}
"""The ten concepts that only LoRAs know, by ComposLoRA's role."""

CONCEPTS = tuple(name for names in ROLES.values() for name in names)
FIELD_OF_ROLE = {"character": "body", "clothing": "worn", "style": "style", "background": "back", "object": "held"}
UNSAID = {"character": "", "clothing": "none", "style": "flat", "background": "", "object": "none"}

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.20, 0.66, 0.24),
    "blue": (0.16, 0.36, 0.88),
    "yellow": (0.96, 0.84, 0.18),
    "purple": (0.56, 0.22, 0.74),
    "orange": (0.97, 0.52, 0.10),
}
SHAPES = ("round", "square", "triangular")
WORN = ("none", "cap", "crown")
HELD = ("none", "flower", "star", "sword")
BACKS = ("plain", "gradient")

LABELS = (
    *SHAPES,
    *COLOURS,
    *WORN[1:],
    *HELD[1:],
    *(f"{colour} background" for colour in COLOURS),
    "gradient",
    *CONCEPTS,
)
"""What the detector answers, one yes or no each."""

PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)


@dataclass(frozen=True)
class Scenes:
    """A batch of n scenes: six arrays of n names, and where the creature stands: x, y, radius in pixels, [n, 3]."""

    body: Names
    colour: Names
    worn: Names
    held: Names
    back: Names
    back_colour: Names
    style: Names
    place: Floats

    def __len__(self) -> int:
        return len(self.body)

    def __getitem__(self, index: Any) -> Scenes:
        return Scenes(**{name: values[index] for name, values in vars(self).items()})

    def with_concept(self, name: str) -> Scenes:
        """The same scenes, each with this concept in its role's place."""
        role = role_of(name)
        return replace(self, **{FIELD_OF_ROLE[role]: np.full(len(self), name)})


def role_of(concept: str) -> str:
    """The role of one of the ten concepts; ValueError for any other name."""
    for role, names in ROLES.items():
        if concept in names:
            return role
    raise ValueError(f"concept must be one of {', '.join(CONCEPTS)}, got {concept!r}")


def sample(n: int, seed: int, *, concepts: float = 0.0, held_back: bool | None = None) -> Scenes:
    """n random scenes.

    concepts is the chance, per role, of one of its two LoRA concepts. held_back=True draws only from the tenth of
    the base combinations that training never uses, False only from the others, None from all.
    """
    if held_back is not None:
        pool = sample(3 * n if not held_back else 16 * n + 200, seed, concepts=concepts)
        return pool[np.flatnonzero(_is_held_back(pool) == held_back)[:n]]
    rng = np.random.default_rng(seed)

    def pick(role: str, common: tuple[str, ...]) -> Names:
        rare = rng.random(n) < concepts
        return np.where(rare, rng.choice(ROLES[role], n), rng.choice(common, n))

    place = np.stack([rng.uniform(25, 31, n), rng.uniform(37, 42, n), rng.uniform(12, 15, n)], axis=1)
    colours = tuple(COLOURS)
    first = rng.integers(0, 6, n)
    second = (first + rng.integers(1, 6, n)) % 6  # a creature never has its background's colour
    return Scenes(
        body=pick("character", SHAPES),
        colour=np.take(colours, first),
        worn=pick("clothing", WORN),
        held=pick("object", HELD),
        back=pick("background", BACKS),
        back_colour=np.take(colours, second),
        style=pick("style", ("flat",)),
        place=place.astype(np.float32),
    )


def _is_held_back(scenes: Scenes) -> npt.NDArray[np.bool_]:
    """One in ten combinations of attributes, the same ones in every run."""
    total = np.zeros(len(scenes), dtype=np.int64)
    fields = ((scenes.body, SHAPES), (scenes.colour, tuple(COLOURS)), (scenes.worn, WORN), (scenes.held, HELD),
              (scenes.back, BACKS), (scenes.back_colour, tuple(COLOURS)))  # fmt: skip
    for values, names in fields:
        index = (values[:, None] == np.array(names)).argmax(1)
        total = total * 7 + index
    return np.asarray((total * 2654435761 % 2**32) // 2**8 % 10 == 0)


def labels(scenes: Scenes) -> Floats:
    """[n, len(LABELS)], 1 where the label is true. A character has no shape or colour, a LoRA background no colour."""
    made = np.zeros((len(scenes), len(LABELS)), dtype=np.float32)
    plain_body = np.isin(scenes.body, SHAPES)
    plain_back = np.isin(scenes.back, BACKS)
    for k, label in enumerate(LABELS):
        if label in COLOURS:
            made[:, k] = plain_body & (scenes.colour == label)
        elif label.endswith(" background"):
            made[:, k] = plain_back & (scenes.back_colour == label.removesuffix(" background"))
        else:
            fields = (scenes.body, scenes.worn, scenes.held, scenes.back, scenes.style)
            made[:, k] = np.any([field == label for field in fields], axis=0)
    return made


def captions(scenes: Scenes, seed: int | None = None, *, without: str | None = None) -> list[str]:
    """One caption per scene. With a seed the clauses change their order and wording, as people's prompts do.

    without: a role of which nothing is said, as in a prompt that lacks a LoRA's trigger word.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    if without is not None:
        scenes = replace(scenes, **{FIELD_OF_ROLE[without]: np.full(len(scenes), UNSAID[without])})
    return [_caption(scenes, i, rng) for i in range(len(scenes))]


def _caption(s: Scenes, i: int, rng: np.random.Generator | None) -> str:
    who = f"{s.colour[i]} {s.body[i]}" if s.body[i] in SHAPES else s.body[i]
    loose = rng is not None and rng.random() < 0.5
    clauses = []
    if s.worn[i] != "none":
        clauses.append(f"wearing a {s.worn[i]}")
    if s.held[i] != "none":
        clauses.append(f"holding a {s.held[i]}")
    kind = {"plain": s.back_colour[i], "gradient": f"{s.back_colour[i]} gradient"}.get(s.back[i], s.back[i])
    clauses += [f"{kind} background"] if kind else []
    if s.style[i] != "flat":
        clauses.append(f"{s.style[i]} style")
    if rng is not None and loose:
        rng.shuffle(clauses)
    article = "an" if who.startswith("o") else "a"
    start = "a picture of " if loose else ""
    return ", ".join([f"{start}{article} {who} creature".replace("  ", " "), *clauses])


def render(scenes: Scenes, chunk: int = 256) -> npt.NDArray[np.uint8]:
    """The pictures, uint8 [n, SIZE, SIZE, 3]."""
    parts = [_render(scenes[i : i + chunk]) for i in range(0, len(scenes), chunk)]
    return np.concatenate(parts) if parts else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def _render(s: Scenes) -> npt.NDArray[np.uint8]:
    images = np.zeros((len(s), SIZE, SIZE, 3), dtype=np.float32)
    names = np.array(list(COLOURS))
    tint = PALETTE[(s.back_colour[:, None] == names).argmax(1)][:, None, None, :]
    coat = PALETTE[(s.colour[:, None] == names).argmax(1)][:, None, None, :]
    hats = np.array(HAT_HEIGHT)[(s.body[:, None] == np.array(BODIES)).argmax(1)][:, None, None]

    def on_rows_with(field: Names, name: str, paint: Callable[[Canvas, npt.NDArray[np.intp]], None]) -> None:
        rows = np.flatnonzero(field == name)
        if len(rows):
            canvas = Canvas(images[rows], s.place[rows])
            paint(canvas, rows)
            images[rows] = canvas.images

    # mypy types no lambda with a default: each one keeps its own painter
    for name, back in BACK_PAINTERS.items():
        on_rows_with(s.back, name, lambda c, rows, f=back: f(c, tint[rows]))  # type: ignore[misc]
    for name in BODIES:
        on_rows_with(s.body, name, lambda c, rows, b=name: body(c, b, coat[rows]))  # type: ignore[misc]
    for name, cloth in CLOTHES.items():
        on_rows_with(s.worn, name, lambda c, rows, f=cloth: f(c, -hats[rows] * c.r))  # type: ignore[misc]
    for name, thing in THINGS.items():
        on_rows_with(s.held, name, lambda c, rows, f=thing: f(c, c.x - c.r - 8, c.y - 0.35 * c.r))  # type: ignore[misc]
    for name, style in STYLES.items():
        rows = np.flatnonzero(s.style == name)
        if len(rows):
            images[rows] = style(images[rows])
    return (images * 255 + 0.5).astype(np.uint8)
