"""What is running right now, as the LoRA layers of a model need to know it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from cmlora.batch.placing import Placing
from cmlora.batch.rows import Rows
from cmlora.errors import RunError

Around = tuple[tuple[int, int], ...]
"""(before, behind): how many tokens of a sequence are no places of the image."""


class Running:
    """The rows of the batch that is running; none outside a step.

    One object is shared by all layers of a model, so that a change of rows is one assignment.
    """

    def __init__(self) -> None:
        self.rows: Rows | None = None
        self.owner: object = None  # the bank whose forwards are in force
        self.placing: Placing | None = None  # where the adapters of a slot act; None: everywhere
        self.size: tuple[int, int] | None = None  # height and width that the running tokens are places of
        self.around: Around = ()  # tokens before and behind the places, of sequences that have more than those

    @contextmanager
    def these(self, rows: Rows) -> Iterator[None]:
        """`rows` run for the length of a with block."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    @contextmanager
    def placed(self, placing: Placing | None) -> Iterator[None]:
        """The adapters of a slot act where `placing` says, for the length of a with block."""
        before, self.placing = self.placing, placing
        try:
            yield
        finally:
            self.placing = before

    @contextmanager
    def at(self, size: tuple[int, int] | None, around: Around = ()) -> Iterator[None]:
        """Tokens are places of an image of this size, for the length of a with block; None: they are no places.

        A layer on the places alone is told by their number; so is one on a sequence of text and image, `around` being
        what such sequences have before and behind the places: those tokens take all adapters whole.
        """
        before, self.size, self.around = (self.size, self.around), size, around
        try:
            yield
        finally:
            self.size, self.around = before

    def weights(self, count: int, tokens: int, *, placeless: bool) -> Tensor | None:
        """[count, adapters, tokens] of a linear layer's adapters; None: all act everywhere."""
        if self.placing is None:
            return None
        assert self.rows is not None
        size, around = self.size, None
        if size is not None and not placeless:
            more = tokens - size[0] * size[1]
            around = next((a for a in ((0, 0), *self.around) if sum(a) == more), None)
        if around is None:
            return self.placing.weights(self.rows, count, None, tokens)
        return self.placing.weights(self.rows, count, size, tokens, around)

    def pixel_weights(self, count: int, size: tuple[int, int]) -> Tensor | None:
        """[count, adapters, height x width] of a convolution's adapters, `size` being its output's."""
        if self.placing is None:
            return None
        assert self.rows is not None
        return self.placing.weights(self.rows, count, size, size[0] * size[1])

    def slots(self, count: int) -> Tensor:
        """The slots of a batch of `count` rows: predictions x images, or with both guidance halves."""
        assert self.rows is not None
        by_count = self.rows.by_count
        if count not in by_count:
            raise RunError(
                f"a LoRA layer got a batch of {count} where the step has {max(by_count)} rows: an attention "
                "processor that splits the batch cannot be combined with cmlora"
            )
        return by_count[count]
