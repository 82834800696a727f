"""Where in the image each adapter acts: masks, resized to every layer and laid out for the rows that run."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora.batch.rows import Rows

ALL, NONE = -1, -2
"""What a prediction has of the adapters of its slot, beside the number of a single one."""


class Placing:
    """Weights of the adapters that share a slot, per token or pixel, for the predictions of one step.

    Args:
        who: what every prediction has: ALL adapters, each where its mask lets it; a single one, everywhere; NONE.
        masks: [adapters, images, height, width] float32, of the latents' size; None: 1 everywhere.
        adapters: their number.
        device: of the rows.
        elsewhere: what all adapters of a prediction weigh where there are no places.
    """

    def __init__(
        self,
        who: tuple[int, ...],
        masks: Tensor | None,
        adapters: int,
        device: torch.device,
        elsewhere: float = 1.0,
    ) -> None:
        self.who, self.masks, self.adapters, self.elsewhere = who, masks, adapters, elsewhere
        table = torch.zeros(len(who), adapters, device=device)
        for prediction, only in enumerate(who):
            if only == ALL:
                table[prediction] = 1
            elif only != NONE:
                table[prediction, only] = 1
        self.table = table  # [predictions, adapters] where there are no places
        self._sized: dict[tuple[int, int], Tensor] = {}
        self._laid: dict[tuple[object, ...], Tensor | None] = {}

    def weights(
        self, rows: Rows, count: int, size: tuple[int, int] | None, tokens: int, around: tuple[int, int] = (0, 0)
    ) -> Tensor | None:
        """[count, adapters, tokens] float32 for a layer; None: all adapters act wholly.

        Args:
            rows: that run. count: rows of the layer's batch, predictions x images or all of them.
            size: height and width of the layer's output; None: the layer does not work on places.
            tokens: of the layer, height x width where it works on places, and `around` more.
            around: tokens before and behind the places.
        """
        positions = rows.positions or tuple(range(rows.predictions))
        mixed = self.masks is not None or (any(around) and self.elsewhere != 1)  # not the same for all tokens
        masked = size if mixed and any(self.who[p] == ALL for p in positions) else None
        wholly = self.elsewhere if size is None else 1.0
        key = (positions, count, masked, wholly, tokens, around)
        if key not in self._laid:
            self._laid[key] = self._lay_out(positions, count // rows.predictions, masked, wholly, tokens, around)
        return self._laid[key]

    def _lay_out(
        self,
        positions: tuple[int, ...],
        own: int,
        size: tuple[int, int] | None,
        wholly: float,
        tokens: int,
        around: tuple[int, int],
    ) -> Tensor | None:
        everyone = [self.who[p] == ALL for p in positions]
        if size is None and wholly == 1 and all(everyone):
            return None
        parts = []
        for p, all_of_them in zip(positions, everyone, strict=True):
            if all_of_them and size is not None:
                masks = self._resized(size)  # [images, adapters, tokens]
                masks = F.pad(masks, around, value=self.elsewhere) if any(around) else masks
                parts.append(masks if own == masks.shape[0] else masks.repeat(own // masks.shape[0], 1, 1))
            else:
                row = self.table[p, :, None] * wholly if all_of_them else self.table[p, :, None]
                parts.append(row.expand(own, -1, tokens if size is not None else 1))
        laid = parts[0] if len(parts) == 1 else torch.cat(parts)
        return laid.expand(-1, -1, tokens)

    def _resized(self, size: tuple[int, int]) -> Tensor:
        """[images, adapters, height x width]: the mean over what a place of the layer sees."""
        if self.masks is None:
            return self.table.new_ones(1, self.adapters, size[0] * size[1])
        if size not in self._sized:
            masks = self.masks.transpose(0, 1)
            masks = masks if tuple(masks.shape[-2:]) == size else F.adaptive_avg_pool2d(masks, size)
            self._sized[size] = masks.flatten(2)
        return self._sized[size]
