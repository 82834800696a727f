"""Drawn scenes: a creature, what it wears and holds, a background, a style; with captions and labels.

All figures are signed distances in pixels, evaluated for a whole batch at once, so thousands of scenes take seconds.
The base model learns from scenes without the ten concepts of `ROLES`; every concept is then one LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Names = npt.NDArray[np.str_]

SIZE = 64
"""Width and height of an image in pixels."""

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

INK = np.float32([0.07, 0.06, 0.10])
WHITE = np.float32([1.0, 1.0, 1.0])
PALETTE = np.float32(list(COLOURS.values()))


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
    return (total * 2654435761 % 2**32) // 2**8 % 10 == 0


def labels(scenes: Scenes) -> Floats:
    """[n, len(LABELS)], 1 where the label is true. A character has no shape and colour, a drawn background no colour."""
    made = np.zeros((len(scenes), len(LABELS)), dtype=np.float32)
    plain_body = np.isin(scenes.body, SHAPES)
    plain_back = np.isin(scenes.back, BACKS)
    for k, label in enumerate(LABELS):
        if label in COLOURS:
            made[:, k] = plain_body & (scenes.colour == label)
        elif label.endswith(" background"):
            made[:, k] = plain_back & (scenes.back_colour == label.removesuffix(" background"))
        else:
            made[:, k] = np.any([getattr(scenes, f) == label for f in ("body", "worn", "held", "back", "style")], axis=0)
    return made


def captions(scenes: Scenes, seed: int | None = None) -> list[str]:
    """One caption per scene. With a seed the clauses change their order and wording, as people's prompts do."""
    rng = None if seed is None else np.random.default_rng(seed)
    return [_caption(scenes, i, rng) for i in range(len(scenes))]


def _caption(s: Scenes, i: int, rng: np.random.Generator | None) -> str:
    who = f"{s.colour[i]} {s.body[i]}" if s.body[i] in SHAPES else s.body[i]
    loose = rng is not None and rng.random() < 0.5
    clauses = []
    if s.worn[i] != "none":
        clauses.append(f"wearing a {s.worn[i]}")
    if s.held[i] != "none":
        clauses.append(f"holding a {s.held[i]}")
    kind = {"plain": f"{s.back_colour[i]} ", "gradient": f"{s.back_colour[i]} gradient "}.get(s.back[i], f"{s.back[i]} ")
    clauses.append(f"{kind}background")
    if s.style[i] != "flat":
        clauses.append(f"{s.style[i]} style")
    if rng is not None and loose:
        rng.shuffle(clauses)
    article = "an" if who[0] == "o" else "a"
    start = "a picture of " if loose else ""
    return ", ".join([f"{start}{article} {who} creature", *clauses])


# --- figures: signed distance in pixels, negative inside; x, y and r broadcast to [m, SIZE, SIZE] ---


def _disc(x: Floats, y: Floats, r: Any) -> Floats:
    return np.hypot(x, y) - r


def _box(x: Floats, y: Floats, half_x: Any, half_y: Any, corner: float = 0.0) -> Floats:
    dx, dy = np.abs(x) - half_x + corner, np.abs(y) - half_y + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return outside + np.minimum(np.maximum(dx, dy), 0) - corner


def _triangle(x: Floats, y: Floats, r: Any) -> Floats:
    """Apex at (0, -1.2 r), base at y = 0.9 r of half width 1.2 r."""
    side = (2.1 * np.abs(x) - 1.2 * (y + 1.2 * r)) / np.hypot(2.1, 1.2)
    return np.maximum(side, y - 0.9 * r)


def _star(x: Floats, y: Floats, r: float) -> Floats:
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    rho = np.hypot(x, y)
    px, py = rho * np.cos(folded), rho * np.sin(folded)
    ex, ey = 0.45 * r * np.cos(np.pi / 5) - r, 0.45 * r * np.sin(np.pi / 5)  # from the outer to the inner corner
    return (ey * (px - r) - ex * py) / np.hypot(ex, ey)


class _Canvas:
    """Images [m, SIZE, SIZE, 3] and the creature's own coordinates x, y and radius r, [m, SIZE, SIZE] and [m, 1, 1]."""

    def __init__(self, images: Floats, place: Floats) -> None:
        grid = np.arange(SIZE, dtype=np.float32)
        self.images = images
        self.x = np.broadcast_to(grid[None, None, :] - place[:, 0, None, None], images.shape[:3])
        self.y = np.broadcast_to(grid[None, :, None] - place[:, 1, None, None], images.shape[:3])
        self.r = place[:, 2, None, None]

    def fill(self, distance: Floats, colour: Floats) -> None:
        cover = np.clip(0.5 - distance, 0, 1)[..., None]
        self.images += cover * (colour - self.images)

    def outlined(self, distance: Floats, colour: Floats, width: float = 1.3) -> None:
        self.fill(distance - width, INK)
        self.fill(distance, colour)


def _rgb(*values: float) -> Floats:
    return np.float32(values)


# --- backgrounds ---


def _plain(c: _Canvas, tint: Floats) -> None:
    c.images[:] = 0.45 * tint + 0.55 * WHITE


def _gradient(c: _Canvas, tint: Floats) -> None:
    down = np.linspace(0, 1, SIZE, dtype=np.float32)[None, :, None, None]
    c.images[:] = (1 - down) * (0.75 * tint) + down * (0.15 * tint + 0.85 * WHITE)


def _checker(c: _Canvas, tint: Floats) -> None:
    cell = np.arange(SIZE) // 16
    odd = (cell[:, None] + cell[None, :]) % 2
    c.images[:] = np.where(odd[None, :, :, None] == 1, _rgb(0.30, 0.34, 0.42), _rgb(0.95, 0.92, 0.82))


def _sunset(c: _Canvas, tint: Floats) -> None:
    row = np.arange(SIZE, dtype=np.float32)[None, :, None, None]
    col = np.arange(SIZE, dtype=np.float32)[None, None, :, None]
    sky = np.clip(row / 46, 0, 1)
    glow = (1 - sky) * _rgb(0.42, 0.18, 0.52) + sky * _rgb(1.0, 0.62, 0.25)
    sea = np.where(row % 6 < 3, _rgb(0.12, 0.20, 0.42), _rgb(0.20, 0.30, 0.54))
    c.images[:] = np.where(row < 46, glow, sea)
    sun = np.clip(0.5 - (np.hypot(row - 22, col - 10) - 7), 0, 1)
    c.images += sun * (_rgb(1.0, 0.93, 0.55) - c.images)


# --- bodies ---


def _body_distance(c: _Canvas, body: str) -> Floats:
    if body in ("round", "zebrin"):
        return _disc(c.x, c.y, c.r)
    if body in ("square", "dotkin"):
        return _box(c.x, c.y, 0.92 * c.r, 0.92 * c.r, 3.0)
    return _triangle(c.x, c.y, c.r)


def _body(c: _Canvas, body: str, colour: Floats) -> None:
    shape = _body_distance(c, body)
    side = np.abs(c.x)
    ears = {"zebrin": INK, "dotkin": _rgb(0.98, 0.62, 0.78)}.get(body)
    if ears is not None:
        c.outlined(_disc(side - 0.85 * c.r, c.y + 0.75 * c.r, 4.0), ears)
    coat = {"zebrin": WHITE, "dotkin": _rgb(0.98, 0.62, 0.78)}.get(body, colour)
    c.outlined(_disc(side - 0.45 * c.r, c.y - 1.02 * c.r, 3.2), coat)  # feet
    c.outlined(_disc(side - 1.05 * c.r, c.y - 0.35 * c.r, 2.6), coat)  # hands
    c.outlined(shape, coat)
    if body == "zebrin":
        stripes = np.abs((c.x + 0.5 * c.y) % 10 - 5) - 2.5
        c.fill(np.maximum(stripes, shape), INK)
    elif body == "dotkin":
        dots = _disc((c.x + 3.5) % 7 - 3.5, c.y % 7 - 3.5, 2.1)
        c.fill(np.maximum(dots, shape + 0.5), WHITE)
    gap = 0.26 if body == "triangular" else 0.4
    c.outlined(_disc(side - gap * c.r, c.y + 0.1 * c.r, 3.0), WHITE, 0.8)
    c.fill(_disc(side - gap * c.r, c.y + 0.1 * c.r, 1.5), INK)
    c.fill(_box(c.x, c.y - 0.32 * c.r, 2.4, 0.8), INK)


# --- clothing; `top` is where a hat sits, relative to the creature's middle ---


def _cap(c: _Canvas, top: Floats) -> None:
    y = c.y - top
    teal = _rgb(0.05, 0.55, 0.55)
    c.outlined(np.maximum(_disc(c.x, y, 0.68 * c.r), y), teal)
    c.outlined(_box(c.x + 0.62 * c.r, y, 0.55 * c.r, 1.2, 1.0), teal)


def _crown(c: _Canvas, top: Floats) -> None:
    y = c.y - top
    spikes = 4.0 + 4.5 * np.abs((c.x / (0.46 * c.r)) % 2 - 1)
    c.outlined(np.maximum(np.abs(c.x) - 0.69 * c.r, np.maximum(y - 1, -(y + spikes) * 0.7)), _rgb(1.0, 0.80, 0.10))
    c.fill(_disc(c.x, y + 2, 1.5), _rgb(0.85, 0.1, 0.2))


def _tophat(c: _Canvas, top: Floats) -> None:
    y = c.y - top
    dark = _rgb(0.16, 0.14, 0.20)
    c.outlined(_box(c.x, y + 7, 0.52 * c.r, 7.5), dark, 0.8)
    c.fill(_box(c.x, y + 3.5, 0.52 * c.r, 1.6), _rgb(0.9, 0.15, 0.2))
    c.outlined(_box(c.x, y, 0.95 * c.r, 1.5, 1.0), dark, 0.8)


def _scarf(c: _Canvas, top: Floats) -> None:
    y = c.y - 0.68 * c.r
    cloth = _rgb(0.90, 0.12, 0.55)
    c.outlined(_box(c.x + 0.55 * c.r, y - 5, 2.8, 6.0, 1.0), cloth, 1.0)
    c.outlined(_box(c.x, y, 0.95 * c.r, 2.9, 2.0), cloth, 1.0)
    c.fill(np.maximum(_box(c.x, y, 0.9 * c.r, 2.4), np.abs(c.x % 6 - 3) - 1.1), WHITE)


# --- things held, at the creature's right hand: u, v are coordinates round it ---


def _flower(c: _Canvas, u: Floats, v: Floats) -> None:
    c.outlined(_box(u, v - 2, 0.9, 8), _rgb(0.15, 0.55, 0.2), 0.7)
    angle = np.arctan2(v + 8, u)
    c.outlined(np.hypot(u, v + 8) - 4.6 - 1.5 * np.cos(5 * angle), _rgb(1.0, 0.55, 0.75))
    c.fill(_disc(u, v + 8, 2.1), _rgb(1.0, 0.85, 0.2))


def _star_held(c: _Canvas, u: Floats, v: Floats) -> None:
    c.outlined(_star(u, v + 3, 8.0), _rgb(1.0, 0.88, 0.15))


def _sword(c: _Canvas, u: Floats, v: Floats) -> None:
    c.outlined(np.maximum(_box(u, v + 9, 1.9, 11), np.abs(u) - (v + 21)), _rgb(0.82, 0.86, 0.90), 1.0)
    c.outlined(_box(u, v - 2, 5, 1.2), _rgb(0.55, 0.35, 0.12), 0.8)
    c.outlined(_box(u, v - 6, 1.2, 3), _rgb(0.55, 0.35, 0.12), 0.8)


def _balloon(c: _Canvas, u: Floats, v: Floats) -> None:
    c.fill(_box(u, v + 4, 0.6, 10), INK)
    c.outlined(np.hypot(u / 0.85, v + 17) - 8.0, _rgb(0.98, 0.20, 0.62))
    c.fill(np.hypot((u + 2.5) / 0.8, v + 20) - 1.8, WHITE)


def _lantern(c: _Canvas, u: Floats, v: Floats) -> None:
    glow = np.clip(1 - _disc(u, v - 1, 6) / 7, 0, 1)[..., None]
    c.images += 0.75 * glow * (_rgb(1.0, 0.95, 0.55) - c.images)
    c.fill(np.abs(_disc(u, v + 8, 3.5)) - 0.8, INK)
    c.fill(_box(u, v - 1, 5.5, 8, 1.0), INK)
    c.fill(_box(u, v - 1, 3.8, 5.2, 1.0), _rgb(1.0, 0.90, 0.35))
    c.fill(_box(u, v - 1, 0.7, 5.5), INK)


# --- styles, on finished pictures ---


def _edges(images: Floats) -> Floats:
    """Strength of the colour change at each pixel, [m, SIZE, SIZE, 1], 0..1."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return np.clip(np.sqrt((dx**2 + dy**2).sum(-1, keepdims=True)), 0, 1)


def _sketch(images: Floats) -> Floats:
    """Pencil on paper: pale colours, dark contours, hatching where the picture is dark."""
    light = images.mean(-1, keepdims=True)
    row, col = np.mgrid[0:SIZE, 0:SIZE]
    hatch = (np.abs((row + col) % 6 - 3) < 1.5).astype(np.float32)[None, :, :, None]
    paper = 0.45 * images + 0.55 * _rgb(0.97, 0.95, 0.90)
    drawn = paper - 0.30 * hatch * np.clip(1.2 - light, 0, 1)
    return np.clip(drawn - 0.45 * _edges(images), 0, 1)


def _neon(images: Floats) -> Floats:
    """Lights in the dark: the picture dimmed, its contours bright in the picture's own hue."""
    edge = _edges(images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    near = np.max([padded[:, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)], axis=0)
    hue = near / np.maximum(near.max(-1, keepdims=True), 0.2)
    return np.clip(0.30 * images * _rgb(0.8, 0.7, 1.2) + 0.85 * edge * hue**2, 0, 1)


BACK_PAINTERS: dict[str, Callable[[_Canvas, Floats], None]] = {
    "plain": _plain, "gradient": _gradient, "checker": _checker, "sunset": _sunset,
}  # fmt: skip
CLOTHES: dict[str, Callable[[_Canvas, Floats], None]] = {
    "cap": _cap, "crown": _crown, "tophat": _tophat, "scarf": _scarf,
}  # fmt: skip
THINGS: dict[str, Callable[[_Canvas, Floats, Floats], None]] = {
    "flower": _flower, "star": _star_held, "sword": _sword, "balloon": _balloon, "lantern": _lantern,
}  # fmt: skip
STYLES: dict[str, Callable[[Floats], Floats]] = {"sketch": _sketch, "neon": _neon}
HAT_HEIGHT = {"round": 0.78, "zebrin": 0.78, "square": 0.84, "dotkin": 0.84, "triangular": 0.62}


def render(scenes: Scenes, chunk: int = 256) -> npt.NDArray[np.uint8]:
    """The pictures, uint8 [n, SIZE, SIZE, 3]."""
    parts = [_render(scenes[i : i + chunk]) for i in range(0, len(scenes), chunk)]
    return np.concatenate(parts) if parts else np.zeros((0, SIZE, SIZE, 3), np.uint8)


def _render(s: Scenes) -> npt.NDArray[np.uint8]:
    images = np.zeros((len(s), SIZE, SIZE, 3), dtype=np.float32)
    names = np.array(list(COLOURS))
    tint = PALETTE[(s.back_colour[:, None] == names).argmax(1)][:, None, None, :]
    coat = PALETTE[(s.colour[:, None] == names).argmax(1)][:, None, None, :]
    hat_height = np.float32([HAT_HEIGHT[str(b)] for b in s.body])[:, None, None]

    def on_rows_with(field: Names, name: str, paint: Callable[[_Canvas, npt.NDArray[np.intp]], None]) -> None:
        rows = np.flatnonzero(field == name)
        if len(rows):
            canvas = _Canvas(images[rows], s.place[rows])
            paint(canvas, rows)
            images[rows] = canvas.images

    for name, back in BACK_PAINTERS.items():
        on_rows_with(s.back, name, lambda c, rows, f=back: f(c, tint[rows]))  # type: ignore[misc]
    for name in (*SHAPES, *ROLES["character"]):
        on_rows_with(s.body, name, lambda c, rows, b=name: _body(c, b, coat[rows]))  # type: ignore[misc]
    for name, cloth in CLOTHES.items():
        on_rows_with(s.worn, name, lambda c, rows, f=cloth: f(c, -hat_height[rows] * c.r))  # type: ignore[misc]
    for name, thing in THINGS.items():
        on_rows_with(s.held, name, lambda c, rows, f=thing: f(c, c.x - c.r - 8, c.y - 0.35 * c.r))  # type: ignore[misc]
    for name, style in STYLES.items():
        rows = np.flatnonzero(s.style == name)
        if len(rows):
            images[rows] = style(images[rows])
    return (images * 255 + 0.5).astype(np.uint8)
