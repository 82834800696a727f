"""Which adapter acts where: masks from the predictions themselves, or the user's own (csrc_docs/places.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora.batch.placing import Placing
from cmlora.compose.plan import Step
from cmlora.config import CMLoRAConfig
from cmlora.errors import ConfigError
from cmlora_kernels import combine_local, combine_noise, combine_regions, place_masks, place_strength


class Combiner:
    """N predictions of a step into one, for one kind of step.

    Args:
        config: the rule.
        step: of its kind; all of a run's steps but those of `routed` are of one.
        own: rows of a prediction. halves: of guidance that they are made of; masks come from the last one, all rows
            where there is one.
        names: adapters, in order. size: of the latents. device: of the predictions.
    """

    def __init__(
        self,
        config: CMLoRAConfig,
        step: Step,
        own: int,
        halves: int,
        names: Sequence[str],
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.config, self.step = config, step
        regions = None if config.regions is None else region_masks(config.regions, names, size, device)
        self.drawn = torch.tensor([name in (config.regions or {}) for name in names], device=device)
        self.images = own // halves
        self.first = own - self.images
        self.regions = None if regions is None else regions.expand(-1, self.images, -1, -1)
        self.masks: Tensor | None = None  # [adapters, images, height, width] of the last step
        self.masks_given: Tensor | None = None  # of the conditional half, where this one was called for itself
        self.adapters = torch.arange(step.adapters, device=device)
        self.bases = torch.tensor(step.bases, dtype=torch.int64, device=device)

    @property
    def takes_images(self) -> bool:
        """Whether predictions must be [rows, channels, height, width]: there are masks."""
        return self.config.combine == "local" or self.regions is not None

    def __call__(self, noise: Tensor, weights: Tensor) -> Tensor:
        """noise [predictions * own, ...] and weights [predictions, own] -> [own, ...]."""
        config, backend = self.config, self.config.backend
        if not self.takes_images:
            return combine_noise(noise, weights, backend=backend)
        weights = weights[: self.step.adapters]
        if config.combine == "mean":
            assert self.regions is not None
            self.masks = self.regions
            return combine_regions(noise, self.regions, weights, backend=backend)
        self.masks = self._masks(noise)
        base = len(self.step.slots) - 1
        return combine_local(noise, self.masks, weights, self.adapters, self.bases, base, backend=backend)

    def _masks(self, noise: Tensor) -> Tensor:
        if self.masks_given is not None:
            return self.masks_given
        if self.config.combine == "deviation":
            assert self.regions is not None
            return self.regions
        config, backend = self.config, self.config.backend
        strength = place_strength(noise, self.adapters, self.bases, self.first, self.images, backend=backend)
        masks = place_masks(strength, config.temperature, config.mask_blur, own=False, backend=backend)
        if self.regions is None:
            return masks
        return torch.where(self.drawn[:, None, None, None], self.regions, masks)  # one without a region keeps its mask


class Routing:
    """The masks of a routed run, found in its first steps."""

    KEEP = 0.7
    """Share of the strengths of the steps before."""

    def __init__(self, config: CMLoRAConfig, adapters: int, regions: Tensor | None) -> None:
        self.config, self.adapters = config, adapters
        self.strength: Tensor | None = None
        self.masks = regions  # [adapters, images, height, width]
        self._placing: Placing | None = None

    def placing(self, who: tuple[int, ...], device: torch.device) -> Placing:
        """Where the adapters of these predictions act; the same as long as the masks are."""
        if self._placing is None or self._placing.who != who or self._placing.masks is not self.masks:
            self._placing = Placing(who, self.masks, self.adapters, device, self.config.mask_text)
        return self._placing

    def measure(self, noise: Tensor, own: int, halves: int) -> None:
        """Masks for the next step, from noise [predictions * own, ...]: each adapter alone, then the base model."""
        images, n = own // halves, self.adapters
        alone = torch.arange(n, device=noise.device)
        base = torch.full_like(alone, n)
        backend = self.config.backend
        before, first = self.strength, own - images
        self.strength = place_strength(noise, alone, base, first, images, before, self.KEEP, backend=backend)
        self.masks = place_masks(self.strength, self.config.temperature, self.config.mask_blur, backend=backend)


def read_regions(config: CMLoRAConfig) -> CMLoRAConfig:
    """The same with its regions as tensors [height, width] float32 on the CPU: once, not at every run.

    Raises:
        ConfigError: a mask of another shape or range.
    """
    if config.regions is None:
        return config
    return replace(config, regions={name: _mask(name, given) for name, given in config.regions.items()})


def region_masks(
    regions: Mapping[str, Tensor], names: Sequence[str], size: tuple[int, int], device: torch.device
) -> Tensor:
    """[adapters, 1, height, width] float32 of the user's masks; 1 for an adapter without one.

    Args:
        regions: of `read_regions`, by adapter.
        names: adapters, in order. size: of the latents.
    """
    whole = torch.ones(1, *size)
    drawn = [F.adaptive_avg_pool2d(regions[name][None], size) if name in regions else whole for name in names]
    return torch.stack(drawn).to(device)


def _mask(name: str, given: Any) -> Tensor:
    """[height, width] float32 on the CPU, of a tensor or array [.., height, width] or a picture (integers: 0..255)."""
    if hasattr(given, "convert"):  # a picture
        given = given.convert("L")
    mask = given.detach().cpu() if isinstance(given, Tensor) else torch.as_tensor(np.array(given))
    if mask.dtype == torch.uint8:
        mask = mask / 255
    mask = mask.float()
    while mask.ndim > 2 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2 or 0 in mask.shape:
        raise ConfigError(f"regions[{name!r}] must be [height, width], got {tuple(mask.shape)}")
    if not (mask.isfinite().all() and mask.min() >= 0 and mask.max() <= 1):
        raise ConfigError(f"regions[{name!r}] must lie in 0..1, got {mask.min():g} to {mask.max():g}")
    return mask
