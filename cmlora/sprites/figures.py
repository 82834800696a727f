"""What scenes are drawn of: figures as signed distances in pixels, for a whole batch at once, negative inside.

x, y and r broadcast to [m, SIZE, SIZE]; images are float32 [m, SIZE, SIZE, 3] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]

SIZE = 64
"""Width and height of an image in pixels."""


def _rgb(*values: float) -> Floats:
    return np.array(values, dtype=np.float32)


INK = _rgb(0.07, 0.06, 0.10)
WHITE = _rgb(1.0, 1.0, 1.0)


def _disc(x: Floats, y: Floats, r: Any) -> Floats:
    return np.asarray(np.hypot(x, y) - r)


def _box(x: Floats, y: Floats, half_x: Any, half_y: Any, corner: float = 0.0) -> Floats:
    dx, dy = np.abs(x) - half_x + corner, np.abs(y) - half_y + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
    return np.asarray(outside + np.minimum(np.maximum(dx, dy), 0) - corner)


def _triangle(x: Floats, y: Floats, r: Any) -> Floats:
    """Apex at (0, -1.2 r), base at y = 0.9 r of half width 1.2 r."""
    side = (2.1 * np.abs(x) - 1.2 * (y + 1.2 * r)) / np.hypot(2.1, 1.2)
    return np.asarray(np.maximum(side, y - 0.9 * r))


def _star(x: Floats, y: Floats, r: float) -> Floats:
    angle = np.arctan2(x, -y)
    folded = np.abs((angle + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    rho = np.hypot(x, y)
    px, py = rho * np.cos(folded), rho * np.sin(folded)
    ex, ey = 0.45 * r * np.cos(np.pi / 5) - r, 0.45 * r * np.sin(np.pi / 5)  # from the outer to the inner corner
    return np.asarray((ey * (px - r) - ex * py) / np.hypot(ex, ey))


class Canvas:
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


# --- backgrounds ---


def _plain(c: Canvas, tint: Floats) -> None:
    c.images[:] = 0.45 * tint + 0.55 * WHITE


def _gradient(c: Canvas, tint: Floats) -> None:
    down = np.linspace(0, 1, SIZE, dtype=np.float32)[None, :, None, None]
    c.images[:] = (1 - down) * (0.75 * tint) + down * (0.15 * tint + 0.85 * WHITE)


def _checker(c: Canvas, tint: Floats) -> None:
    cell = np.arange(SIZE) // 16
    odd = (cell[:, None] + cell[None, :]) % 2
    c.images[:] = np.where(odd[None, :, :, None] == 1, _rgb(0.30, 0.34, 0.42), _rgb(0.95, 0.92, 0.82))


def _sunset(c: Canvas, tint: Floats) -> None:
    row = np.arange(SIZE, dtype=np.float32)[None, :, None, None]
    col = np.arange(SIZE, dtype=np.float32)[None, None, :, None]
    sky = np.clip(row / 46, 0, 1)
    glow = (1 - sky) * _rgb(0.42, 0.18, 0.52) + sky * _rgb(1.0, 0.62, 0.25)
    sea = np.where(row % 6 < 3, _rgb(0.12, 0.20, 0.42), _rgb(0.20, 0.30, 0.54))
    c.images[:] = np.where(row < 46, glow, sea)
    sun = np.clip(0.5 - (np.hypot(row - 22, col - 10) - 7), 0, 1)
    c.images += sun * (_rgb(1.0, 0.93, 0.55) - c.images)


# --- bodies ---


BODIES = ("round", "square", "triangular", "zebrin", "dotkin")
HAT_HEIGHT = (0.78, 0.84, 0.62, 0.78, 0.84)
"""Where a hat sits on each body, in radii above the middle."""


def _body_distance(c: Canvas, name: str) -> Floats:
    if name in ("round", "zebrin"):
        return _disc(c.x, c.y, c.r)
    if name in ("square", "dotkin"):
        return _box(c.x, c.y, 0.92 * c.r, 0.92 * c.r, 3.0)
    return _triangle(c.x, c.y, c.r)


def body(c: Canvas, name: str, colour: Floats) -> None:
    """The creature itself; colour [m, 1, 1, 3] is for the plain bodies."""
    shape = _body_distance(c, name)
    side = np.abs(c.x)
    ears = {"zebrin": INK, "dotkin": _rgb(0.98, 0.62, 0.78)}.get(name)
    if ears is not None:
        c.outlined(_disc(side - 0.85 * c.r, c.y + 0.75 * c.r, 4.0), ears)
    coat = {"zebrin": WHITE, "dotkin": _rgb(0.98, 0.62, 0.78)}.get(name, colour)
    c.outlined(_disc(side - 0.45 * c.r, c.y - 1.02 * c.r, 3.2), coat)  # feet
    c.outlined(_disc(side - 1.05 * c.r, c.y - 0.35 * c.r, 2.6), coat)  # hands
    c.outlined(shape, coat)
    if name == "zebrin":
        stripes = np.abs((c.x + 0.5 * c.y) % 10 - 5) - 2.5
        c.fill(np.maximum(stripes, shape), INK)
    elif name == "dotkin":
        dots = _disc((c.x + 5) % 10 - 5, (c.y + 2) % 10 - 5, 3.2)
        c.fill(np.maximum(dots, shape + 0.5), WHITE)
    gap = 0.26 if name == "triangular" else 0.4
    c.outlined(_disc(side - gap * c.r, c.y + 0.1 * c.r, 3.0), WHITE, 0.8)
    c.fill(_disc(side - gap * c.r, c.y + 0.1 * c.r, 1.5), INK)
    c.fill(_box(c.x, c.y - 0.32 * c.r, 2.4, 0.8), INK)


# --- clothing; `top` is where a hat sits, relative to the creature's middle ---


def _cap(c: Canvas, top: Floats) -> None:
    y = c.y - top
    teal = _rgb(0.05, 0.55, 0.55)
    c.outlined(np.maximum(_disc(c.x, y, 0.68 * c.r), y), teal)
    c.outlined(_box(c.x + 0.62 * c.r, y, 0.55 * c.r, 1.2, 1.0), teal)


def _crown(c: Canvas, top: Floats) -> None:
    y = c.y - top
    spikes = 4.0 + 4.5 * np.abs((c.x / (0.46 * c.r)) % 2 - 1)
    c.outlined(np.maximum(np.abs(c.x) - 0.69 * c.r, np.maximum(y - 1, -(y + spikes) * 0.7)), _rgb(1.0, 0.80, 0.10))
    c.fill(_disc(c.x, y + 2, 1.5), _rgb(0.85, 0.1, 0.2))


def _tophat(c: Canvas, top: Floats) -> None:
    y = c.y - top
    dark = _rgb(0.16, 0.14, 0.20)
    c.outlined(_box(c.x, y + 7, 0.52 * c.r, 7.5), dark, 0.8)
    c.fill(_box(c.x, y + 3.5, 0.52 * c.r, 1.6), _rgb(0.9, 0.15, 0.2))
    c.outlined(_box(c.x, y, 0.95 * c.r, 1.5, 1.0), dark, 0.8)


def _scarf(c: Canvas, top: Floats) -> None:
    y = c.y - 0.68 * c.r
    cloth = _rgb(0.90, 0.12, 0.55)
    c.outlined(_box(c.x + 0.55 * c.r, y - 5, 2.8, 6.0, 1.0), cloth, 1.0)
    c.outlined(_box(c.x, y, 0.95 * c.r, 2.9, 2.0), cloth, 1.0)
    c.fill(np.maximum(_box(c.x, y, 0.9 * c.r, 2.4), np.abs(c.x % 6 - 3) - 1.1), WHITE)


# --- things held, at the creature's right hand: u, v are coordinates round it ---


def _flower(c: Canvas, u: Floats, v: Floats) -> None:
    c.outlined(_box(u, v - 2, 0.9, 8), _rgb(0.15, 0.55, 0.2), 0.7)
    angle = np.arctan2(v + 8, u)
    c.outlined(np.hypot(u, v + 8) - 4.6 - 1.5 * np.cos(5 * angle), _rgb(1.0, 0.55, 0.75))
    c.fill(_disc(u, v + 8, 2.1), _rgb(1.0, 0.85, 0.2))


def _star_held(c: Canvas, u: Floats, v: Floats) -> None:
    c.outlined(_star(u, v + 3, 8.0), _rgb(1.0, 0.88, 0.15))


def _sword(c: Canvas, u: Floats, v: Floats) -> None:
    c.outlined(np.maximum(_box(u, v + 9, 1.9, 11), np.abs(u) - (v + 21)), _rgb(0.82, 0.86, 0.90), 1.0)
    c.outlined(_box(u, v - 2, 5, 1.2), _rgb(0.55, 0.35, 0.12), 0.8)
    c.outlined(_box(u, v - 6, 1.2, 3), _rgb(0.55, 0.35, 0.12), 0.8)


def _balloon(c: Canvas, u: Floats, v: Floats) -> None:
    c.fill(_box(u, v + 4, 0.6, 10), INK)
    c.outlined(np.hypot(u / 0.85, v + 17) - 8.0, _rgb(0.98, 0.20, 0.62))
    c.fill(np.hypot((u + 2.5) / 0.8, v + 20) - 1.8, WHITE)


def _lantern(c: Canvas, u: Floats, v: Floats) -> None:
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
    return np.asarray(np.clip(np.sqrt((dx**2 + dy**2).sum(-1, keepdims=True)), 0, 1))


def _sketch(images: Floats) -> Floats:
    """A coloured drawing: dark contours, and paper left blank round it with the ends of the strokes."""
    row, col = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
    border = np.minimum(np.minimum(row, SIZE - 1 - row), np.minimum(col, SIZE - 1 - col))
    strokes = np.abs((row + col) % 12 - 6)
    cover = 0.9 * np.clip(border - 0.6 * strokes - 1.5, 0, 1)[None, :, :, None]
    paper = _rgb(0.98, 0.96, 0.90)
    drawn = paper + cover * (images - paper)
    return np.asarray(np.clip(drawn - 0.3 * _edges(drawn), 0, 1))


def _neon(images: Floats) -> Floats:
    """Lights in the dark: the picture dimmed, its contours bright in the picture's own hue."""
    edge = _edges(images)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    near = np.max([padded[:, i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)], axis=0)
    hue = near / np.maximum(near.max(-1, keepdims=True), 0.2)
    return np.asarray(np.clip(0.30 * images * _rgb(0.8, 0.7, 1.2) + 0.85 * edge * hue**2, 0, 1))


BACK_PAINTERS: dict[str, Callable[[Canvas, Floats], None]] = {
    "plain": _plain, "gradient": _gradient, "checker": _checker, "sunset": _sunset,
}  # fmt: skip
CLOTHES: dict[str, Callable[[Canvas, Floats], None]] = {
    "cap": _cap, "crown": _crown, "tophat": _tophat, "scarf": _scarf,
}  # fmt: skip
THINGS: dict[str, Callable[[Canvas, Floats, Floats], None]] = {
    "flower": _flower, "star": _star_held, "sword": _sword, "balloon": _balloon, "lantern": _lantern,
}  # fmt: skip
STYLES: dict[str, Callable[[Floats], Floats]] = {"sketch": _sketch, "neon": _neon}
