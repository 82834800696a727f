"""Prompts of adapters' own, laid into the pipeline's rows: the same for every family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cmlora.batch.rows import Rows
from cmlora.errors import ConfigError


def own_rows(key: str, own: Tensor, prompt: Mapping[str, Tensor], images: int) -> Tensor:
    """The pipeline's rows with an adapter's prompt in the last `images` of them, the conditional half."""
    given = prompt.get(key)
    if given is None:
        raise ConfigError(f"prompts must be pairs of embeddings and pooled ones for this model: there are no {key}")
    if given.shape[1:] != own.shape[1:] or given.shape[0] not in (1, images):
        raise ConfigError(
            f"prompts must be {key} [1 or {images}, {', '.join(map(str, own.shape[1:]))}] as the pipeline's own are, "
            f"got {tuple(given.shape)}"
        )
    given = given.to(own).expand(images, *given.shape[1:])
    return torch.cat([own[: own.shape[0] - images], given])


def by_prediction(own: Tensor, given: Sequence[Tensor | None], everyone: Rows) -> Tensor:
    """[all rows, ...]: what was given for a prediction, else the pipeline's own."""
    chosen = (given[p] for p in everyone.positions or range(everyone.predictions))
    return torch.cat([own if prompt is None else prompt for prompt in chosen])
