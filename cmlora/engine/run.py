"""State of one denoising run, and which rows each of its steps needs."""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass, field
from types import CodeType

import torch
from torch import Tensor

from cmlora.batch.inputs import Held, Inputs
from cmlora.batch.rows import Rows
from cmlora.compose.places import Combiner, Routing
from cmlora.compose.plan import Step
from cmlora.engine.budget import Strategy
from cmlora.engine.footprint import RunShape
from cmlora.errors import RunError
from cmlora.models.family import Conditions, Place


@dataclass
class Lane:
    """What a run keeps for one call per step: all guidance halves in one batch, or a half that is called for itself.

    Attributes:
        own: rows of the pipeline's own batch, halves x images.
        halves: of guidance that they are certain to be made of.
        shape: of the sample. conditional: as `Place.conditional`.
        apart: whether a prediction's rows must run together and nothing else with them.
        sample: of the last call, held so that the next half can be told from another step.
        position: of the last call in the schedule.
        cache: [rows, ...] cached features; conditions: what is computed once; held: the inputs that it is made of.
        rows: of the steps so far, by what they are made of.
        dominant: [own], where the device chose it; weights: [predictions, own].
        combiner, routing: how predictions become one; masks. slots: of the last step's predictions, in the cache.
        probe: the lane of the predictions that masks are made from, once there are any.
        footprint: of its memory. capturable: what its captured steps rest on; () where it has none.
        record: of its steps, for the summary.
    """

    own: int
    halves: int
    shape: torch.Size
    sample: Tensor
    apart: bool = False
    conditional: bool | None = None
    position: int = -1
    cache: Tensor | None = None
    conditions: Conditions | None = None
    held: Held | None = None
    rows: dict[tuple[int, ...], Rows] = field(default_factory=dict)
    dominant: Tensor | None = None
    weights: Tensor | None = None
    combiner: Combiner | None = None
    routing: Routing | None = None
    probe: Lane | None = None
    slots: tuple[int, ...] = ()
    footprint: RunShape | None = None
    capturable: tuple[object, ...] | None = None
    record: list[Record] = field(default_factory=list)

    @property
    def halves_alike(self) -> int:
        """Halves that may run once while they are alike; 1 where code of the user's must see all rows."""
        return 1 if self.apart else self.halves

    def fit(self, sample: Tensor, halves: int) -> None:
        """Take a step's sample: guidance may have been switched off in mid-run (diffusers' cut-off callback)."""
        if sample.shape != self.shape:
            self._shrink(sample)
        elif halves != self.halves:
            self.rows.clear()  # somebody else calls now, of whose halves nothing is certain, or no longer
            self.halves, self.capturable, self.combiner, self.probe = halves, None, None, None

    def _shrink(self, sample: Tensor) -> None:
        """The conditional half goes on alone."""
        if self.halves != 2 or sample.shape[1:] != self.shape[1:] or sample.shape[0] * 2 != self.own:
            raise _changed(self.shape, sample.shape)
        half = sample.shape[0]
        if self.cache is not None:
            self.cache = self.cache.view(-1, self.own, *self.cache.shape[1:])[:, half:].flatten(0, 1)
        self.dominant = None if self.dominant is None else self.dominant[half:]
        self.weights = None if self.weights is None else self.weights[:, half:]
        self.own, self.shape, self.halves = half, sample.shape, 1
        if self.routing is not None and self.routing.masks is not None:
            self.routing.strength = None  # of as many images as before; guidance ends late, masks are made early
        self.rows.clear()
        self.capturable = self.combiner = None
        if self.probe is not None and self.probe.own != half:
            self.probe = None

    def probing(self, inputs: Inputs) -> tuple[Lane, Inputs]:
        """The lane of the probes and their inputs: masks come from the conditional half, so only its rows run.

        Where code of the user's must see all rows, or nothing is certain of them, all run.
        """
        rows = self.own // self.halves_alike
        inputs = inputs if rows == self.own else inputs.last(rows)
        if self.probe is None:
            halves = self.halves if rows == self.own else 1
            self.probe = Lane(rows, halves, inputs.sample.shape, inputs.sample, self.apart, self.conditional)
            self.probe.routing, self.probe.capturable = self.routing, ()  # so few steps are not worth a capture
        return self.probe, inputs

    def forget(self) -> None:
        """Adapters were changed in mid-run: what was computed with the old ones once and for all is made anew."""
        self.conditions = None
        if self.probe is not None:
            self.probe.conditions = None

    def rows_of(self, step: Step, predictions: tuple[int, ...], device: torch.device) -> Rows:
        """Rows of some predictions, made once per run and kept."""
        known = tuple(step.slots[p] for p in predictions)
        key = (len(step.slots), *known, *predictions)
        if key not in self.rows:
            slots = torch.tensor(known, device=device).repeat_interleave(self.own)
            index = None
            if len(predictions) < len(step.slots):
                places = torch.tensor(predictions, device=device).repeat_interleave(self.own)
                index = places * self.own + torch.arange(self.own, device=device).repeat(len(predictions))
            halves = self.halves_alike
            images = self.own // halves
            self.rows[key] = Rows(slots, len(predictions), halves, images, index, known, predictions)
        return self.rows[key]

    def carry_cache(self, step: Step) -> None:
        """Of the cached features those of this step's predictions; none where one of them has no feature yet."""
        if self.cache is not None and self.slots != step.slots:
            if self.slots[: len(step.slots)] == step.slots:
                self.cache = self.cache[: len(step.slots) * self.own].clone()  # to let go of the others
            else:
                self.cache = None
        self.slots = step.slots

    def deep_rows(self, step: Step, device: torch.device) -> Rows | None:
        """The rows that run the whole model in a step; None: none."""
        if not step.full_predictions:
            return None
        known = self.rows_of(step, step.refresh, device) if step.refresh else None
        if not step.refresh_dominant:
            return known
        assert self.dominant is not None
        slots = self.dominant
        index = slots * self.own + torch.arange(self.own, device=device)
        if known is not None:
            assert isinstance(known.index, Tensor)
            slots, index = torch.cat((slots, known.slots)), torch.cat((index, known.index))
        halves = self.halves_alike
        return Rows(slots, step.full_predictions, halves, self.own // halves, index)


@dataclass
class Run:
    """One denoising run: a schedule, a plan, and a lane for every call that a step consists of.

    Attributes:
        plan: its steps.
        schedule: held, so that another run's schedule cannot take its address.
        first: the run's first position in the schedule (img2img starts in the middle).
        position: of the last call.
        thread: that it belongs to. caller: code of who called, to see whether it is still at it.
        strategy: what it spends memory on.
        foreign: code of the user's in the model that may look at other rows of its batch.
    """

    plan: tuple[Step, ...]
    schedule: Tensor
    first: int
    caller: CodeType | None
    foreign: list[str]
    position: int = -1
    thread: int = field(default_factory=threading.get_ident)
    lanes: list[Lane] = field(default_factory=list)
    strategy: Strategy | None = None

    @property
    def timesteps(self) -> Tensor:
        """[steps] of the plan."""
        return self.schedule[self.first : self.first + len(self.plan)]

    def is_continued_by(self, place: Place) -> bool:
        """Whether a call at `place` is a later step, or another guidance half of the last one."""
        later = place.index > self.position or (place.index == self.position and len(self.plan) > 1)
        return self.schedule is place.schedule and later

    def is_under_way_elsewhere(self) -> bool:
        """Whether another thread is between two steps of it right now."""
        if self.thread == threading.get_ident() or self.position - self.first + 1 >= len(self.plan):
            return False
        frame = sys._current_frames().get(self.thread)
        while frame is not None and frame.f_code is not self.caller:
            frame = frame.f_back
        return frame is not None

    def lane_of(self, inputs: Inputs, place: Place, whole: bool) -> Lane:
        """The lane of a call, a new one for a guidance half that was not called before.

        A half is known by its conditions: by where they lie in memory, else by their values. `whole`: the caller is
        known to pass all halves together, so that other conditions are the run's own, changed in mid-run.
        """
        if place.index > self.position and self.lanes:
            self.lanes = [lane for lane in self.lanes if lane.position == self.position]  # halves no longer called
        self.position = place.index
        waiting = [lane for lane in self.lanes if lane.position < place.index]
        if whole and waiting:
            return waiting[0]
        for same in (_same_memory, _same_values):
            for lane in self.lanes:
                if lane.held is not None and same(lane.held, inputs):
                    if lane in waiting:
                        return lane
                    raise RunError(
                        "the model was called twice for one timestep with the same conditions; cmlora takes one call "
                        "per step, or one per guidance half (a sampler that evaluates a step twice cannot be followed)"
                    )
        named = [lane for lane in waiting if lane.conditional is not None and lane.conditional == place.conditional]
        if len(named) == 1:
            return named[0]  # its prompt was changed in mid-run
        if self.lanes and self.lanes[0].shape != inputs.sample.shape:
            raise _changed(self.lanes[0].shape, inputs.sample.shape)
        self._must_be_a_half(inputs)
        lane = Lane(inputs.sample.shape[0], place.halves, inputs.sample.shape, inputs.sample, bool(self.foreign))
        lane.conditional = place.conditional
        if self.lanes and self.lanes[0].own == lane.own:  # what was decided holds for all halves
            lane.dominant, lane.weights = self.lanes[0].dominant, self.lanes[0].weights
        self.lanes.append(lane)
        return lane

    def _must_be_a_half(self, inputs: Inputs) -> None:
        for lane in self.lanes:
            if lane.position == self.position and not _equal(lane.sample, inputs.sample):
                raise RunError(
                    "the model was called twice for one timestep, with different latents: these are no guidance "
                    "halves. cmlora takes one call per step, or one per guidance half (self-attention guidance, and "
                    "samplers that evaluate a step twice, cannot be followed)"
                )


def _changed(before: torch.Size, now: torch.Size) -> RunError:
    return RunError(
        f"the batch changed from {tuple(before)} to {tuple(now)} in mid-run; only guidance that diffusers' pipelines "
        "switch off, which halves it, can be followed"
    )


def _same_memory(held: Held, inputs: Inputs) -> bool:
    return held.still(inputs)


def _same_values(held: Held, inputs: Inputs) -> bool:
    """Whether they are equal; only asked for tensors that were made anew, since it reads them."""
    given = inputs.conditions()
    return (
        held.settings == inputs.settings()
        and len(held.tensors) == len(given)
        and all(_equal(a, b) for a, b in zip(held.tensors, given, strict=True))
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))


@dataclass(frozen=True)
class Record:
    """What `summary` tells of a step; tensors are read only when it is asked."""

    index: int  # of the step in the run
    step: Step
    own: int  # rows of the pipeline's own batch
    halves: int  # of guidance that they are made of
    refreshed_all: bool
    dominant: Tensor | int | None
    gate: Tensor | None
    cache_bytes: int
    probe: Record | None = None  # of the predictions that its masks were made from


def with_bases(weights: Tensor, step: Step) -> Tensor:
    """Append the base predictions' rows where there are any; weights [adapters, own]."""
    count = len(step.slots) - step.adapters
    if not count:
        return weights
    if count == 1:
        return torch.cat((weights, weights.new_full((1, weights.shape[1]), step.base_coefficient)))
    rows = weights.new_zeros(count, weights.shape[1])
    rows[-1] = 1  # the one on the pipeline's own prompt; each loses what its adapters are compared with
    for adapter, base in enumerate(step.bases):
        rows[base - step.adapters] -= weights[adapter]
    return torch.cat((weights, rows))
