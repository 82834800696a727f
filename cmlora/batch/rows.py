"""Rows of a step's batch, and tensors that are still the same for some of them.

A batch is predictions x guidance halves x images, in this order. Before the first LoRA layer all predictions of an
image compute the same, and before the first cross-attention so do both guidance halves where they start from the same
latents. A `Shared` tensor has rows only for what differs already.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmlora_kernels.layout import dense_format


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch, or some of them in whole groups of the pipeline's own rows.

    Attributes:
        slots: [predictions * halves * images] adapter of every row; -1 is the base model.
        predictions, halves, images: what the rows are made of; halves is 1 where they are not known to start alike.
        index: their places in the whole batch, a slice where they are neighbours; None: all of it, in order.
        known: the slot of every prediction where the host knows it.
        positions: which predictions of the step these are, where the host knows it; (): all, or unknown.
    """

    slots: Tensor
    predictions: int
    halves: int
    images: int
    index: Tensor | slice | None = None
    known: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    by_count: dict[int, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        grid = self.slots.view(self.predictions, self.halves, self.images)
        by_count = {grid.shape[0] * grid.shape[2]: grid[:, 0].reshape(-1), grid.numel(): self.slots}
        object.__setattr__(self, "by_count", by_count)

    @property
    def own(self) -> int:
        """Rows of the pipeline's own batch."""
        return self.halves * self.images

    def split(self, predictions: int | None) -> tuple[Rows, ...]:
        """In parts of at most so many predictions; None: one part."""
        if predictions is None or self.predictions <= predictions:
            return (self,)
        parts = []
        for first in range(0, self.predictions, predictions):
            last = min(first + predictions, self.predictions)
            place = slice(first * self.own, last * self.own)
            index = self.index[place] if isinstance(self.index, Tensor) else place
            slots, known = self.slots[place], self.known[first:last]
            positions = self.positions[first:last] or tuple(range(first, last))
            parts.append(Rows(slots, last - first, self.halves, self.images, index, known, positions))
        return tuple(parts)


def pick(x: Tensor, index: Tensor | slice | None) -> Tensor:
    """The rows of x that `Rows.index` names; a view where they are neighbours."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x[index]
    return _from_memory(_in_memory(x).index_select(0, index), x)


def _in_memory(x: Tensor) -> Tensor:
    """x with its dimensions in the order of memory: a copy of it by rows then keeps its format."""
    return x.movedim(-3, -1) if x.ndim == 4 and dense_format(x) is torch.channels_last else x


def _from_memory(y: Tensor, x: Tensor) -> Tensor:
    """The way back, x being what went in; rows that were only repeated are written out."""
    return y.contiguous().movedim(-1, -3) if x.ndim == 4 and dense_format(x) is torch.channels_last else y


@dataclass(frozen=True)
class Shared:
    """A tensor with rows per image, and per prediction and per guidance half where these differ.

    Attributes:
        value: [(predictions) * (halves) * images, ...].
        by_prediction, by_half: whether it has rows of their own for them.
    """

    value: Tensor
    by_prediction: bool
    by_half: bool


def grid(x: Shared, rows: Rows) -> Tensor:
    """[predictions or 1, halves or 1, images, ...]; a view."""
    p = rows.predictions if x.by_prediction else 1
    q = rows.halves if x.by_half else 1
    return x.value.view(p, q, rows.images, *x.value.shape[1:])


def lift(x: Shared, rows: Rows, *, by_prediction: bool = False, by_half: bool = False) -> Shared:
    """Give `x` rows of its own for every prediction, every half, where asked for."""
    p, q = x.by_prediction or by_prediction, x.by_half or by_half
    if (p and not x.by_prediction and rows.predictions > 1) or (q and not x.by_half and rows.halves > 1):
        one = Shared(_in_memory(x.value), x.by_prediction, x.by_half)
        shape = (rows.predictions if p else 1, rows.halves if q else 1, rows.images, *one.value.shape[1:])
        many = grid(one, rows).expand(shape).reshape(-1, *one.value.shape[1:])
        return Shared(_from_memory(many, x.value), p, q)
    return Shared(x.value, p, q)


def whole(x: Shared, rows: Rows) -> Tensor:
    """`x` with all its rows."""
    return lift(x, rows, by_prediction=True, by_half=True).value


def add(x: Shared, y: Shared, rows: Rows) -> Shared:
    """The sum, with rows for what differs in either."""
    p, q = x.by_prediction or y.by_prediction, x.by_half or y.by_half
    if x.value.shape[0] == y.value.shape[0]:
        return Shared(x.value + y.value, p, q)
    return Shared((grid(x, rows) + grid(y, rows)).flatten(0, 2), p, q)


def concat(x: Tensor, y: Shared, rows: Rows) -> Tensor:
    """x [all rows, channels, ...] and y over channels, y's rows repeated in passing."""
    if x.shape[0] == y.value.shape[0]:
        return torch.cat([x, y.value], 1)
    channels = 5 if dense_format(x, y.value) is torch.channels_last else 3
    if channels == 5:
        x, y = _in_memory(x), Shared(_in_memory(y.value), y.by_prediction, y.by_half)
    left = x.view(rows.predictions, rows.halves, rows.images, *x.shape[1:])
    right = grid(y, rows).expand(*left.shape[:3], *y.value.shape[1:])
    joined = torch.cat([left, right], channels).flatten(0, 2)
    return joined.movedim(-1, -3) if channels == 5 else joined
