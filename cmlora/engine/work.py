"""What one step computes, once all is decided: predictions of some rows, combined. Run eagerly, or captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cmlora.batch.inputs import Inputs
from cmlora.batch.placing import Placing
from cmlora.batch.rows import Rows
from cmlora.compose.places import Combiner
from cmlora.models.family import Batched, Conditions


@dataclass(frozen=True)
class Work:
    """One step.

    Attributes:
        everyone, deep: all rows; those that run the deep part, None: none.
        follow: for each adapter's prediction the base model's whose cached feature it follows; (): none does.
        combine: how the predictions become one; None: they are handed out as they are.
        who: what of its slot's adapters a prediction has, where they have masks.
        elsewhere: what they weigh where there are no places.
    """

    everyone: Rows
    deep: Rows | None
    follow: tuple[int, ...]
    combine: Combiner | None
    who: tuple[int, ...]
    elsewhere: float

    def run(
        self,
        batched: Batched[Any, Any],
        inputs: Inputs,
        cache: Tensor | None,
        conditions: Conditions,
        step: int,
        at_once: int,
        weights: Tensor | None,
        placing: Placing | None,
    ) -> tuple[Tensor, Tensor]:
        """The noise, and the cache; arguments as of `Batched.run`, weights [predictions, own], placing of `who`."""
        with batched.running.placed(placing):
            noise, cache = batched.run(inputs, self.everyone, self.deep, cache, conditions, step, at_once, self.follow)
        if self.combine is None:
            return noise, cache
        assert weights is not None
        if not self.combine.takes_images:
            return self.combine(noise, weights), cache
        return batched.as_noise(self.combine(batched.as_image(noise, inputs), weights)), cache
