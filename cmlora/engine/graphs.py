"""Captured steps: one CUDA graph per kind of step, replayed on buffers that keep their place from run to run."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmlora.batch.inputs import Held, Inputs
from cmlora.batch.placing import Placing
from cmlora.batch.rows import Rows
from cmlora.engine.work import Work
from cmlora.models.family import Batched, Conditions

Capture = Callable[[Callable[[], None]], Callable[[], None]]


class CudaCapture:
    """Records functions as CUDA graphs in one pool of memory, without running them.

    What is made inside one graph lies where another one's lies: they are replayed one after the other, and what a step
    leaves is copied out of the pool within its graph. So the pool is as large as one step, not as all kinds together.
    """

    def __init__(self) -> None:
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self._pool: Any = None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """What comes back replays `work` on the same memory."""
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # one without graphs is given back, and is no pool any more
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._graphs.add(graph)
        return graph.replay


def forgiving(capture: Capture) -> Capture:
    """A capture that gives up at its first failure: from then on steps run eagerly, and one warning says why."""
    failed = False

    def captured(work: Callable[[], None]) -> Callable[[], None]:
        nonlocal failed
        if failed:
            return work
        try:
            return capture(work)
        except RuntimeError as error:
            failed = True
            said = f"steps run eagerly, they cannot be captured as CUDA graphs: {error}"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
            return work

    return captured


class Captured:
    """The steps of runs of one shape, captured at their second occurrence; the first runs as it is and warms up.

    A captured step reads and writes nothing but buffers that stay: the inputs, the time embedding of one step, the
    prompt's keys and values, the refreshed rows' adapters and places, weights, cached features, and the noise. What a
    step gets is copied into them, and the noise is handed out as a copy: schedulers keep what they are given.

    Args:
        batched: the model.
        inputs: of a step, in shape.
        at_once: predictions that run together.
        capture: makes a replay of a function of no arguments, without running it.
    """

    def __init__(self, batched: Batched[Any, Any], inputs: Inputs, at_once: int, capture: Capture) -> None:
        self.batched = batched
        self.at_once = at_once
        self.capture = capture
        device = inputs.sample.device
        self.inputs = inputs.map(lambda x: x.to(device, copy=True))
        self.cache: Tensor | None = None
        self.noise: Tensor | None = None
        self.masks: Tensor | None = None
        self.conditions: Conditions | None = None
        self.held: Held | None = None
        self._kinds: dict[tuple[object, ...], _Kind] = {}

    def begin(self, inputs: Inputs, everyone: Rows, timesteps: Tensor) -> Conditions:
        """Take over a run's conditions and schedule [steps], in the memory of the last ones."""
        self.held = Held(inputs)
        self._load(inputs)
        if self.conditions is None:
            self.conditions = self.batched.prepare(self.inputs, everyone, None, timesteps)
            self.one_step = self.conditions.one_step()
        else:
            self.conditions.renew(self.inputs, everyone, timesteps)
        return self.conditions

    def holds(self, conditions: Conditions | None, inputs: Inputs) -> bool:
        """Whether `begin` was called for this run and its conditions are still those of `inputs`."""
        return (
            conditions is not None
            and conditions is self.conditions
            and self.held is not None
            and self.held.still(inputs)
        )

    def step(
        self,
        inputs: Inputs,
        index: int,
        work: Work,
        cache: Tensor | None,
        weights: Tensor | None,
        masks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """One step, as `Work.run`.

        Args:
            inputs: of the pipeline's own rows.
            index: position in the run.
            work: what it computes.
            cache: the cached features; None where everyone runs the deep part.
            weights: [predictions, own]. masks: [adapters, images, height, width] of adapters that share a slot.
        """
        assert self.conditions is not None
        self._load(inputs)
        self.one_step.load_step(self.conditions, index)
        if cache is not None and cache is not self.cache:  # of a run that began eagerly or in another shape
            self.cache = cache.clone() if self.cache is None else self.cache.copy_(cache)
        if masks is not None:
            self.masks = masks.clone() if self.masks is None else self.masks.copy_(masks)
        deep = work.deep
        refreshed = 0 if deep is None else deep.predictions
        key = (work.everyone.known, refreshed, cache is None, work.follow, masks is None)
        if key not in self._kinds:
            given = None if weights is None else weights.clone()
            self._kinds[key] = _Kind(self, replace(work, deep=_buffers(deep)), given)
        kind = self._kinds[key]
        kind.load(deep, weights)
        kind.run()
        if work.combine is not None and kind.step.combine is not None:
            work.combine.masks = kind.step.combine.masks  # of the run that is going on
        assert self.cache is not None
        assert self.noise is not None
        return self.noise.clone(), self.cache

    def _load(self, inputs: Inputs) -> None:
        for mine, given in zip(self.inputs.tensors(), inputs.tensors(), strict=True):
            mine.copy_(given)


@dataclass
class _Kind:
    """One kind of step: a function of buffers alone."""

    owner: Captured
    step: Work  # its refreshed rows' slots and places in memory of their own
    weights: Tensor | None
    replay: Callable[[], None] | None = None
    warm: bool = False

    def load(self, deep: Rows | None, weights: Tensor | None) -> None:
        mine = self.step.deep
        if mine is not None and deep is not None and isinstance(mine.index, Tensor):
            assert isinstance(deep.index, Tensor)
            mine.slots.copy_(deep.slots)
            mine.index.copy_(deep.index)
        if self.weights is not None and weights is not None:
            self.weights.copy_(weights)

    def run(self) -> None:
        if not self.warm:
            self.warm = True
            self.work()
            return
        if self.replay is None:
            self.replay = self.owner.capture(self.work)
        self.replay()

    def work(self) -> None:
        owner, step = self.owner, self.step
        before = None if step.deep is not None and step.deep.index is None else owner.cache
        placing = None
        if step.who and owner.masks is not None:
            placing = Placing(step.who, owner.masks, owner.masks.shape[0], owner.masks.device, step.elsewhere)
        noise, cache = step.run(
            owner.batched, owner.inputs, before, owner.one_step, 0, owner.at_once, self.weights, placing
        )
        owner.cache = _keep(owner.cache, cache)
        owner.noise = _keep(owner.noise, noise)


def _keep(buffer: Tensor | None, value: Tensor) -> Tensor:
    """`value` in the buffer; the first one becomes the buffer."""
    if buffer is None or buffer is value:
        return value
    return buffer.copy_(value)


def _buffers(deep: Rows | None) -> Rows | None:
    """Rows of the same number, slots and places in memory of their own; all rows stay what they are."""
    if deep is None or not isinstance(deep.index, Tensor):
        return deep
    return Rows(deep.slots.clone(), deep.predictions, deep.halves, deep.images, deep.index.clone())
