"""The front door: connects the rooms and holds the undo. No maths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cmlora.config import CMLoRAConfig
from cmlora.engine.denoiser import Denoiser
from cmlora.engine.hook import find, install, installed, remove
from cmlora.errors import CMLoRAError
from cmlora.models import FAMILIES, find_family
from cmlora.profile import settle
from cmlora.summary import Summary, summarise

Pipe = TypeVar("Pipe")


def supported_pipelines() -> tuple[str, ...]:
    """Names of the diffusers pipelines that are known to work.

    Others with a model of the same families are accepted, too, and so are loops of one's own that pass the elements of
    the pipeline's scheduler.timesteps.
    """
    return tuple(name for family in FAMILIES for name in family.pipelines)


def accelerate(pipe: Pipe, config: CMLoRAConfig | None = None, **overrides: Any) -> Pipe:
    """Compose the pipeline's LoRAs as one batch from its next call on; the call itself stays the user's own.

    Args:
        pipe: a diffusers pipeline with a UNet2DConditionModel or a transformer of a known family, and LoRAs loaded.
        config: how to compose; None: the defaults.
        **overrides: single fields of CMLoRAConfig, e.g. method="composite". high="auto" draws each LoRA alone here,
            a few steps with an empty prompt (`cmlora.profile.settle`).

    Returns:
        `pipe`. A second call replaces the first.

    Raises:
        ConfigError: a field out of its range.
        AdapterError: adapters that are missing, fused, disabled or of an unsupported kind.
        UnsupportedModelError: a pipeline or model that cannot be run.
        Whichever it is, the pipeline is left as it was.
    """
    install(pipe, _make_denoiser(pipe, config, overrides))
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Take everything back: the pipeline is as it was before `accelerate`. Does nothing where there is nothing."""
    remove(pipe)
    return pipe


@contextmanager
def accelerated(pipe: Pipe, config: CMLoRAConfig | None = None, **overrides: Any) -> Iterator[Pipe]:
    """`accelerate` for the length of a with block; what was there before comes back behind it."""
    with installed(pipe, _make_denoiser(pipe, config, overrides)):
        yield pipe


def summary(pipe: Any) -> Summary:
    """What the last run of an accelerated pipeline did; prints as a table.

    Raises:
        CMLoRAError: the pipeline is not accelerated.
    """
    hook = find(pipe)
    if hook is None:
        raise CMLoRAError("the pipeline is not accelerated; call cmlora.accelerate(pipe) first")
    return summarise(hook.denoiser)


def _make_denoiser(pipe: Any, config: CMLoRAConfig | None, overrides: dict[str, Any]) -> Denoiser:
    built = CMLoRAConfig.build(config, overrides)
    find_family(pipe)  # what cannot be run is refused before anything is drawn to settle it
    profiled = built.high == "auto" and built.method == "cmlora"  # other methods know no high and low
    return Denoiser(pipe, settle(pipe, built) if profiled else built, profiled=profiled)
