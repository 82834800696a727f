"""State of one denoising run, and which rows each of its steps needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cmlora.batch.rows import Rows
from cmlora.compose.plan import Step
from cmlora.engine.budget import Strategy
from cmlora.engine.footprint import RunShape
from cmlora.errors import RunError
from cmlora.models.unet.conditions import Conditions

# Pipelines that pass torch.cat([latents] * 2) to the UNet under guidance.
DOUBLING = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
)

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def halves_of(pipe: Any, sample: Tensor) -> int:
    """2 where the pipeline doubles its latents for guidance; looked at once, before a run's first step."""
    known = any(kind.__name__ in DOUBLING for kind in type(pipe).__mro__)
    if not known or sample.shape[0] % 2 or not getattr(pipe, "do_classifier_free_guidance", False):
        return 1
    return 2 if sample.is_meta or torch.equal(*sample.chunk(2)) else 1


@dataclass
class Run:
    """State of one denoising run; a new run starts with a new one."""

    plan: tuple[Step, ...]
    timesteps: Tensor  # held, so that another run's schedule cannot take its address
    first: int  # the run's first position in the schedule (img2img starts in the middle)
    halves: int  # of guidance that have the same latents
    images: int  # rows of the pipeline's own batch: guidance halves x images
    shape: torch.Size
    position: int = -1  # of the last call
    strategy: Strategy | None = None
    footprint: RunShape | None = None
    capturable: tuple[object, ...] | None = None  # what its captured steps rest on; () where it has none
    alike: tuple[Tensor, Tensor] | None = None  # whether the halves are: per element, and in all; written every step
    cache: Tensor | None = None
    conditions: Conditions | None = None
    rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)
    dominant: Tensor | None = None  # [images], where the device chose it
    weights: Tensor | None = None  # [predictions, images]
    record: list[Record] = field(default_factory=list)

    def shrink(self, sample: Tensor) -> None:
        """Guidance was switched off in mid-run (diffusers' cut-off callback): the conditional half goes on."""
        if sample.shape[1:] != self.shape[1:] or sample.shape[0] * 2 != self.images:
            raise RunError(
                f"the batch changed from {tuple(self.shape)} to {tuple(sample.shape)} in mid-run; only guidance that "
                "is switched off, which halves it, can be followed"
            )
        half = sample.shape[0]
        if self.cache is not None:
            self.cache = self.cache.view(-1, self.images, *self.cache.shape[1:])[:, half:].flatten(0, 1)
        self.dominant = None if self.dominant is None else self.dominant[half:]
        self.weights = None if self.weights is None else self.weights[:, half:]
        self.images, self.shape, self.halves = half, sample.shape, 1
        self.rows.clear()
        self.capturable = None

    def watch_halves(self, sample: Tensor) -> None:
        """Watch on the device that the halves stay alike, bit for bit (NaN equals NaN)."""
        if self.halves == 2:
            first, second = sample.view(BITS[sample.element_size()]).chunk(2)
            if self.alike is None:
                self.alike = (torch.empty_like(first, dtype=torch.bool), sample.new_empty((), dtype=torch.bool))
            same, all_same = self.alike
            torch.all(torch.eq(first, second, out=same), out=all_same)
            torch._assert_async(all_same, "the guidance halves of the batch parted in mid-run")

    def rows_of(self, step: Step, predictions: tuple[int, ...], device: torch.device) -> Rows:
        """Rows of some predictions, made once per run and kept."""
        known = tuple(step.slots[p] for p in predictions)
        key = (len(step.slots), *known, *predictions)
        if key not in self.rows:
            slots = torch.tensor(known, device=device).repeat_interleave(self.images)
            index = None
            if len(predictions) < len(step.slots):
                places = torch.tensor(predictions, device=device).repeat_interleave(self.images)
                index = places * self.images + torch.arange(self.images, device=device).repeat(len(predictions))
            self.rows[key] = Rows(slots, len(predictions), self.halves, self.images // self.halves, index, known)
        return self.rows[key]

    def deep_rows(self, step: Step, device: torch.device) -> Rows | None:
        """The rows that run the whole UNet in a step; None: none."""
        if not step.full_predictions:
            return None
        known = self.rows_of(step, step.refresh, device) if step.refresh else None
        if not step.refresh_dominant:
            return known
        assert self.dominant is not None
        slots = self.dominant
        index = slots * self.images + torch.arange(self.images, device=device)
        if known is not None:
            assert isinstance(known.index, Tensor)
            slots, index = torch.cat((slots, known.slots)), torch.cat((index, known.index))
        return Rows(slots, step.full_predictions, self.halves, self.images // self.halves, index)


@dataclass(frozen=True)
class Record:
    """What `summary` tells of a step; tensors are read only when it is asked."""

    step: Step
    rows: int  # of the pipeline's own batch
    halves: int  # of guidance that they are made of
    refreshed_all: bool
    dominant: Tensor | int | None
    gate: Tensor | None
    cache_bytes: int


def with_base(weights: Tensor, step: Step) -> Tensor:
    """Append the base prediction's row where there is one."""
    bases = len(step.slots) - weights.shape[0]
    if not bases:
        return weights
    return torch.cat((weights, weights.new_full((bases, weights.shape[1]), step.base_coefficient)))
