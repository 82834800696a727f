"""What a model family must say, so that the engine can compose LoRAs on it.

A family is a folder beside this file: how its module is found in a pipeline and whether it is supported, what a call
passes to it, which step a call is (its clock), and one step of it as three parts: a head that all rows run, a deep part
whose result can be cached, and a tail. All else (methods, rows, caches, memory, graphs) is the engine's and the same
for every family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cmlora.batch.inputs import Held, Inputs
from cmlora.batch.rows import Rows, Shared, pick, whole
from cmlora.batch.running import Running
from cmlora.config import CMLoRAConfig
from cmlora.errors import ConfigError
from cmlora.lora.stacked import StackedProjection, stack_projections
from cmlora_kernels import scatter_rows
from cmlora_kernels.layout import dense_format


@dataclass(frozen=True)
class Call:
    """One call of the module, read.

    Attributes:
        inputs: its tensors.
        scale: factor on all adapters (`cross_attention_kwargs={"scale": ...}`).
        return_dict: how the caller wants the noise.
    """

    inputs: Inputs
    scale: float = 1.0
    return_dict: bool = True


@dataclass(frozen=True)
class Place:
    """Where a call stands in time.

    Attributes:
        schedule: [steps] timesteps of the whole schedule; its identity is the run's.
        index: of this call's timestep in it.
        halves: guidance halves, one behind the other, that this call's rows are certain to be made of, and that have
            the same latents; the last one is the conditional half. 1 where nothing is certain.
        whole: whether all halves of the step are certain to be in this call.
        conditional: of a half that is called for itself, whether it is the conditional one; None: that is not known.
    """

    schedule: Tensor
    index: int
    halves: int = 1
    whole: bool = False
    conditional: bool | None = None


class Conditions:
    """What a run computes once; a family with more than the conditions themselves to keep adds it."""

    bytes: int = 0
    times: Tensor | None = None  # what one step's part of a table of all steps is taken from

    def __init__(self, inputs: Inputs) -> None:
        self.held = Held(inputs)

    def hold(self, inputs: Inputs) -> bool:
        """Whether they are still those of `inputs`."""
        return self.held.still(inputs)

    def renew(self, inputs: Inputs, everyone: Rows, timesteps: Tensor) -> None:
        """Take over the conditions of another run, in the same memory; `timesteps` [steps] of the whole run."""

    def one_step(self) -> Conditions:
        """The same with room for what belongs to one step, as step 0."""
        return self

    def load_step(self, whole_run: Conditions, index: int) -> None:
        """For one of `one_step`: take over what belongs to a step of the run."""


class Part(Protocol):
    """Some rows on their way through the model in one step."""

    rows: Rows

    def head(self) -> tuple[Shared, Sequence[Shared]]:
        """What goes into the deep part, and what the tail needs beside the deep part's feature."""
        ...

    def deep(self, hidden: Shared, kept: Sequence[Shared]) -> Tensor:
        """The feature that can be cached, [rows, ...]; `hidden` and `kept` are those of `head`, of everyone's rows."""
        ...

    def tail(self, feature: Tensor, kept: Sequence[Shared]) -> Tensor:
        """[rows, ...] predictions from features [rows, ...], which must not be written, and what the head kept."""
        ...


I = TypeVar("I", bound=Inputs)  # noqa: E741
C = TypeVar("C", bound=Conditions)


class Batched(ABC, Generic[I, C]):
    """Steps of one module on batches of predictions x the pipeline's own rows.

    Args:
        module: the pipeline's model; its modules are called, never changed.
        config: for the cache branch and the kernels' backend.
        running: where the LoRA layers read which rows run.
    """

    def __init__(self, module: Any, config: CMLoRAConfig, running: Running) -> None:
        self.module = module
        self.running = running
        self.backend: Any = config.backend
        self.stacked: Mapping[nn.Module, StackedProjection] = {}
        self.keep_prompt = True

    @abstractmethod
    def begin(self, inputs: I, timesteps: Tensor) -> C:
        """What a run of these inputs computes once; `timesteps` [steps] are those of the whole run."""

    @abstractmethod
    def part(self, inputs: I, conditions: C, rows: Rows, everyone: Rows, step: int) -> Part:
        """Some rows of a step; `step` is the position in the run."""

    @abstractmethod
    def latents(self, inputs: I) -> Tensor:
        """[own rows, channels, height, width] what is denoised, for the spectrum; channels of the noise alone."""

    def as_image(self, noise: Tensor, inputs: I) -> Tensor:
        """Predictions as [rows, channels, height, width], for masks."""
        return noise

    def as_noise(self, image: Tensor) -> Tensor:
        """The way back of `as_image`."""
        return image

    def feature_map(self, cache: Tensor, inputs: I) -> Tensor:
        """Cached features as [rows, channels, height, width], for their spectrum."""
        return cache

    def stack(self) -> dict[nn.Module, StackedProjection]:
        """q, k and v of one x as one launch each, with copies of their weights; {}: they are not worth the memory."""
        return stack_projections(self.module, self.running, self.backend)

    def placeless(self) -> set[nn.Module]:
        """Layers whose tokens are never places of the image: what makes the prompt's keys and values."""
        return set()

    def predictable(self) -> bool:
        """Whether the module can be run on tensors without data: no code of the user's is in it."""
        return True

    def baked(self) -> tuple[object, ...] | None:
        """All that a captured step rests on beside inputs and parameters; None: it cannot be captured."""
        return None

    def prepare(self, inputs: I, everyone: Rows, conditions: C | None, timesteps: Tensor) -> C:
        """The conditions of the step before while they hold, else new ones."""
        if conditions is not None and conditions.hold(inputs):
            return conditions
        with self.running.these(everyone):
            return self.begin(inputs, timesteps)

    def run(
        self,
        inputs: I,
        everyone: Rows,
        deep: Rows | None,
        cache: Tensor | None,
        conditions: C,
        step: int,
        at_once: int | None = None,
        follow: tuple[int, ...] = (),
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            inputs: of the pipeline's own rows.
            everyone: all rows, prediction-major.
            deep: the rows that run the deep part; None: none, the cache serves all.
            cache: [rows, ...] cached features, refreshed in place; None in a run's first step.
            conditions: of `prepare`.
            step: position in the run.
            at_once: at most so many predictions run together; None: all of them.
            follow: for each adapter's prediction the base model's that its cached feature moves with, while it is not
                refreshed itself; the base models are the last predictions and are refreshed. (): none moves.

        Returns:
            Predictions [rows, ...], and the cache.
        """
        parts = [self.part(inputs, conditions, rows, everyone, step) for rows in everyone.split(at_once)]
        heads = [self._head(part) for part in parts]
        if deep is not None:
            hidden, above = _joined(parts, [hidden for hidden, _ in heads]), heads[0][1]
            moving = bool(follow) and cache is not None
            later = []  # what waits until the base models' features, the last, are known
            for rows in deep.split(at_once):
                part = self.part(inputs, conditions, rows, everyone, step)
                feature = self._deep(part, _those_of(hidden, rows, everyone), above)
                if moving:
                    later.append((rows, feature))
                else:
                    cache = self._store(feature, rows, everyone, cache)
            if later and cache is not None:
                _follow_bases(cache, [feature for _, feature in later], follow, everyone)
            for rows, feature in later:
                cache = self._store(feature, rows, everyone, cache)
            del hidden, above
        assert cache is not None  # the first step of a run is full
        noises = []
        for part in parts:
            kept = heads.pop(0)[1]  # let go of as soon as it is used
            with self.running.these(part.rows):
                noises.append(part.tail(pick(cache, part.rows.index), kept))
        return noises[0] if len(noises) == 1 else torch.cat(noises), cache

    def _head(self, part: Part) -> tuple[Shared, Sequence[Shared]]:
        with self.running.these(part.rows):
            return part.head()

    def _deep(self, part: Part, hidden: Shared, kept: Sequence[Shared]) -> Tensor:
        with self.running.these(part.rows):
            return part.deep(hidden, kept)

    def _store(self, feature: Tensor, rows: Rows, everyone: Rows, cache: Tensor | None) -> Tensor:
        """The cache with the feature of some rows in it."""
        if rows.index is None:
            return feature
        if cache is None:
            shape = (everyone.slots.shape[0], *feature.shape[1:])
            layout = dense_format(feature)
            cache = torch.empty(shape, dtype=feature.dtype, device=feature.device, memory_format=layout)
        if isinstance(rows.index, slice):
            cache[rows.index] = feature
        else:
            scatter_rows(cache, feature, rows.index, backend=self.backend)
        return cache


def _follow_bases(cache: Tensor, features: Sequence[Tensor], follow: tuple[int, ...], everyone: Rows) -> None:
    """Move all cached features [predictions * own rows, ...] as their base models' move, the last of `features`."""
    own, count = everyone.own, everyone.predictions - len(follow)
    if count == 1:
        base = features[-1][-own:]
        cache.view(-1, own, *base.shape[1:]).add_(base - cache[-own:])
        return
    bases = torch.cat(list(features))[-count * own :]
    moved = (bases - cache[-count * own :]).view(count, own, *cache.shape[1:])
    for adapter, to in enumerate(follow):
        cache[adapter * own : (adapter + 1) * own] += moved[to - len(follow)]


def _joined(parts: Sequence[Part], xs: Sequence[Shared]) -> Shared:
    """A tensor that parts have rows of, as one of everyone; where it is shared by all predictions, one part's."""
    if len(parts) == 1 or not xs[0].by_prediction:
        return xs[0]
    return Shared(torch.cat([whole(x, part.rows) for part, x in zip(parts, xs, strict=True)]), True, True)


def _those_of(x: Shared, rows: Rows, everyone: Rows) -> Shared:
    """Of everyone's x what belongs to some rows."""
    if rows.index is None or not x.by_prediction:
        return x
    return Shared(pick(whole(x, everyone), rows.index), True, True)


class Family(ABC):
    """A model family. Everything here is about the kind of model, not about one accelerated module.

    Attributes:
        pipelines: names of the diffusers pipelines that are known to work.
        attribute: where such a pipeline keeps the module.
    """

    pipelines: ClassVar[tuple[str, ...]]
    attribute: ClassVar[str]

    @abstractmethod
    def owns(self, module: nn.Module) -> bool:
        """Whether a module is one of this family, supported or not."""

    @abstractmethod
    def check(self, module: Any) -> None:
        """Raise UnsupportedModelError, naming what is in the way, unless this module can be run as it is now."""

    def prompt(self, pipe: Any, name: str, given: Any) -> dict[str, Tensor]:
        """An adapter's own prompt as the model takes it, [1 or images, ...] by name; text is encoded as it stands."""
        raise ConfigError(f"prompts: the model family of {type(self).__name__} takes none")

    def spread_prompts(
        self, inputs: Any, prompts: Sequence[dict[str, Tensor] | None], images: int
    ) -> tuple[dict[str, Tensor] | None, ...]:
        """For the field `prompts` of the family's inputs: of every prediction's prompt, None the pipeline's, all rows,
        the prompt being in the last `images` of them."""
        raise NotImplementedError

    @abstractmethod
    def read(self, arguments: Mapping[str, Any]) -> Call:
        """A call's arguments, by the names of the module's forward."""

    @abstractmethod
    def place(self, pipe: Any, scheduler: Any, call: Call) -> Place:
        """The clock: where a call stands, without reading a tensor.

        Args:
            pipe: the accelerated pipeline; None once it is gone.
            scheduler: its scheduler.
            call: the call.

        Raises:
            RunError: it cannot be told; says what to pass.
        """

    def steps(self, pipe: Any, schedule: Tensor, first: int) -> int:
        """Calls of a run that begins at `first`."""
        return schedule.shape[0] - first

    @abstractmethod
    def batched(self, module: Any, config: CMLoRAConfig, running: Running) -> Batched[Any, Any]:
        """The way to run its steps; raises ConfigError for a cache branch that the module does not have."""

    @abstractmethod
    def result(self, noise: Tensor, call: Call) -> Any:
        """What the module's forward would return."""
