"""Says which attributes and concepts are in a picture: a small convolutional network with one yes or no per label.

It learns from renders, from renders that went through the VAE with latents a little off, and from blends of pictures,
where a concept that is only partly there counts as absent: a composition that dilutes its concepts must not pass.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from cmlora.sprites import WEIGHTS, draw
from cmlora.sprites.figures import SIZE

ABSENT, PRESENT = 0.6, 0.8
"""In a blend a label with at most the first share is false, with at least the second true, between them unasked."""


class Detector(nn.Module):
    """Pictures [n, 3, 64, 64] in -1..1 to logits [n, len(LABELS)]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, 128)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            stride = 2 if before == 3 else 1
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            layers += [] if before == 3 else [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(2 * widths[-1], len(draw.LABELS))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """What the head sees, [n, 256]."""
        maps = self.features(x)  # [n, 128, 4, 4]
        return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.embed(x))
        return logits


def load_detector(path: str | Path | None = None) -> Detector:
    """The trained detector; path is a safetensors file, by default the package's own."""
    detector = Detector()
    detector.load_state_dict(load_file(path or WEIGHTS / "detector.safetensors"))
    return detector.eval().requires_grad_(False)


@torch.no_grad()
def probabilities(detector: Detector, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """How sure the detector is of each label. pictures: uint8 [n, 64, 64, 3]; returns float32 [n, len(LABELS)] in 0..1.

    Raises ValueError for pictures of another shape or type.
    """
    made = [detector(part).sigmoid() for part in _parts(pictures)] or [torch.zeros(0, len(draw.LABELS))]
    return np.asarray(torch.cat(made))


@torch.no_grad()
def embeddings(detector: Detector, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What the detector's last layer sees of pictures, uint8 [n, 64, 64, 3]: float32 [n, 256]. Raises ValueError."""
    return np.asarray(torch.cat([detector.embed(part) for part in _parts(pictures)]))


def _parts(pictures: npt.NDArray[np.uint8]) -> tuple[torch.Tensor, ...]:
    """In parts of 128, float32 [n, 3, 64, 64] in -1..1."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3):
        expected = f"uint8 [n, {SIZE}, {SIZE}, 3]"
        raise ValueError(f"pictures must be {expected}, got {pictures.dtype} {list(pictures.shape)}")
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.split(x, 128) if len(x) else ()


def detect(detector: Detector, pictures: npt.NDArray[np.uint8]) -> list[set[str]]:
    """The labels found in each picture, uint8 [n, 64, 64, 3]."""
    return [{label for label, p in zip(draw.LABELS, row, strict=True) if p > 0.5}
            for row in probabilities(detector, pictures)]  # fmt: skip


def partner(scenes: draw.Scenes, seed: int, concepts: float) -> draw.Scenes:
    """The same creatures in the same places with about half of the attributes of other scenes."""
    rng = np.random.default_rng(seed)
    other = draw.sample(len(scenes), seed, concepts=concepts)
    mixed = {name: np.where(rng.random(len(scenes)) < 0.5, getattr(other, name), values)
             for name, values in vars(scenes).items() if name != "place"}  # fmt: skip
    return draw.Scenes(place=scenes.place, **mixed)


def blend_targets(first: torch.Tensor, second: torch.Tensor, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets and which of them count, both [n, labels], of pictures that are `share` [n] first, the rest second."""
    strength = share[:, None] * first + (1 - share[:, None]) * second
    return (strength >= PRESENT).float(), ((strength <= ABSENT) | (strength >= PRESENT)).float()


def blotches(z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Latents that are a little off, as those that a model samples are, coarse and fine. z: [n, 4, 16, 16]."""
    n = len(z)
    strength = 0.6 * torch.rand(n, 1, 1, 1, generator=generator)
    fine = torch.randn(z.shape, generator=generator)
    coarse = F.interpolate(torch.randn(n, z.shape[1], 8, 8, generator=generator), size=z.shape[2:], mode="bilinear")
    return z + 0.7 * strength * (fine + coarse)


def jitter(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, a little blur, another contrast and tint, as generated pictures have them. x: [n, 3, 64, 64]."""
    n = len(x)
    blur = torch.rand(n, 1, 1, 1, generator=generator) * 0.5
    x = x + blur * (F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x)
    contrast = 1 + 0.16 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    shift = 0.3 * (torch.rand(n, 3, 1, 1, generator=generator) - 0.5)
    noise = 0.06 * torch.rand(n, 1, 1, 1, generator=generator) * torch.randn(x.shape, generator=generator)
    coarse = F.interpolate(torch.randn(n, 3, 4, 4, generator=generator), size=x.shape[2:], mode="bilinear")
    tint = 0.1 * torch.rand(n, 1, 1, 1, generator=generator) * coarse
    return (x * contrast + shift + noise + tint).clamp(-1, 1)
