"""What a pipeline passes to its model in one call, and whether two calls were given the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cmlora.batch.identity import identity, version

Self = TypeVar("Self", bound="Inputs")


@dataclass
class Inputs:
    """A call's tensors; a family adds the fields of its own model.

    Attributes:
        sample: [own rows, ...] what is denoised; own rows are guidance halves x images.
        timestep: as the pipeline gave it.
        CONSTANT: names of the fields that stay the same over a run.
    """

    sample: Tensor
    timestep: Tensor

    CONSTANT: ClassVar[tuple[str, ...]] = ()

    def conditions(self) -> list[Tensor]:
        """The tensors that stay the same over a run."""
        return list(tensors_of(getattr(self, name) for name in self.CONSTANT))

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return list(tensors_of(getattr(self, f.name) for f in fields(self)))

    def signature(self) -> tuple[object, ...]:
        """Equal where all tensors are alike in shape, layout, dtype and device."""
        given = ((f.name, tensors_of([getattr(self, f.name)])) for f in fields(self))
        return tuple((name, tuple((t.shape, t.stride(), t.dtype, t.device) for t in found)) for name, found in given)

    def map(self: Self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with every tensor changed."""
        return type(self)(**{f.name: map_tensors(getattr(self, f.name), change) for f in fields(self)})

    def last(self: Self, rows: int) -> Self:
        """The same of the last `rows` of the pipeline's own rows; tensors that have no rows stay."""
        own = self.sample.shape[0]
        return self.map(lambda x: x[own - rows :] if x.ndim and x.shape[0] == own else x)

    def settings(self) -> object:
        """What stays the same over a run beside tensors; compared by value."""
        return None


class Held:
    """The conditions of a run, held so that no other tensor takes their place in memory."""

    def __init__(self, inputs: Inputs) -> None:
        self.tensors = inputs.conditions()
        self.identities = [identity(t) for t in self.tensors]
        self.values = [_unversioned(t) for t in self.tensors]
        self.settings = inputs.settings()

    def still(self, inputs: Inputs) -> bool:
        """Whether they are those of `inputs`, unchanged; new views of the same memory are."""
        given = inputs.conditions()
        return (
            inputs.settings() == self.settings
            and len(given) == len(self.tensors)
            and [identity(t) for t in given] == self.identities
            and all(_still(t, value) for t, value in zip(given, self.values, strict=True))
        )


def _unversioned(t: Tensor) -> Tensor | None:
    """What a tensor without a version is compared with: its values, on the CPU."""
    return t.clone() if version(t) is None and t.device.type == "cpu" else None


def _still(t: Tensor, value: Tensor | None) -> bool:
    """Whether a tensor in the same memory, where it has no version, holds the same values.

    On other devices that cannot be told without waiting for them, and counts as no.
    """
    return version(t) is not None if value is None else torch.equal(t, value)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it, alone or nested, changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, change) for v in value)
    return value


def tensors_of(values: Any) -> Iterator[Tensor]:
    """All tensors in `values`, nested ones too, in a fixed order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_of(value for _, value in sorted(value.items()))
        elif isinstance(value, list | tuple):
            yield from tensors_of(value)
