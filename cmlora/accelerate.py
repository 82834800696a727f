"""The front door: connects the rooms and holds the undo. No maths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cmlora.config import CMLoRAConfig
from cmlora.denoise import Denoiser
from cmlora.errors import CMLoRAError, UnsupportedModelError
from cmlora.summary import Summary, summarise
from cmlora.unet import check_supported

Pipe = TypeVar("Pipe")

_SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionControlNetInpaintPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusionXLControlNetImg2ImgPipeline",
    "StableDiffusionXLControlNetInpaintPipeline",
    "StableDiffusionXLAdapterPipeline",
)


def supported_pipelines() -> tuple[str, ...]:
    """Names of the diffusers pipelines that are known to work.

    Others with a UNet2DConditionModel of the same blocks, called once per step with the elements of their scheduler's
    timesteps, are accepted, too.
    """
    return _SUPPORTED


def accelerate(pipe: Pipe, config: CMLoRAConfig | None = None, **overrides: Any) -> Pipe:
    """Compose the pipeline's LoRAs as one batch from its next call on; the call itself stays the user's own.

    Args:
        pipe: a diffusers pipeline with a UNet2DConditionModel and LoRAs loaded.
        config: how to compose; None: the defaults.
        **overrides: single fields of CMLoRAConfig, e.g. method="composite".

    Returns:
        `pipe`. A second call replaces the first.

    Raises:
        ConfigError: a field out of its range.
        AdapterError: adapters that are missing, fused, disabled or of an unsupported kind.
        UnsupportedModelError: a pipeline or UNet that cannot be run.
        Whichever it is, the pipeline is left as it was.
    """
    built = CMLoRAConfig.build(config, overrides)
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no unet; cmlora composes LoRAs on UNet2DConditionModel pipelines: "
            + ", ".join(_SUPPORTED)
        )
    check_supported(unet)
    denoiser = Denoiser(pipe, built)
    restore(pipe)
    _Hook(denoiser).install()
    return pipe


def restore(pipe: Pipe) -> Pipe:
    """Take everything back: the pipeline is as it was before `accelerate`. Does nothing where there is nothing."""
    hook = _find(pipe)
    if hook is not None:
        hook.uninstall()
    return pipe


@contextmanager
def accelerated(pipe: Pipe, config: CMLoRAConfig | None = None, **overrides: Any) -> Iterator[Pipe]:
    """`accelerate` for the length of a with block; what was there before comes back behind it."""
    previous = _find(pipe)
    accelerate(pipe, config, **overrides)
    try:
        yield pipe
    finally:
        restore(pipe)
        if previous is not None:
            previous.install()


def summary(pipe: Any) -> Summary:
    """What the last run of an accelerated pipeline did; prints as a table.

    Raises:
        CMLoRAError: the pipeline is not accelerated.
    """
    hook = _find(pipe)
    if hook is None:
        raise CMLoRAError("the pipeline is not accelerated; call cmlora.accelerate(pipe) first")
    return summarise(hook.denoiser)


class _Hook:
    """Our forward in the place of the UNet's, and what stood there."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.state = denoiser.unet.__dict__
        # An offload hook of accelerate keeps the forward that it wraps in _old_forward: ours goes there, where the
        # weights have been moved already. Set up after ours, such a hook moves ours there by itself.
        slot = "_old_forward" if "_old_forward" in self.state else "forward"
        self.slot = slot
        self.was_set = slot in self.state
        self.original = getattr(denoiser.unet, slot)
        self.forward = denoiser.make_forward(self.original)
        self.forward.cmlora = self  # type: ignore[attr-defined]  # how it is found again, with nothing global

    def install(self) -> None:
        self.denoiser.open()
        self.state[self.slot] = self.forward

    def uninstall(self) -> None:
        self.denoiser.close()
        if self.state.get("_old_forward") is self.forward:
            self.state["_old_forward"] = self.original
        if self.state.get("forward") is self.forward:
            if self.was_set:
                self.state["forward"] = self.original
            else:
                del self.state["forward"]


def _find(pipe: Any) -> _Hook | None:
    """The hook on the pipeline's UNet, if it is in force."""
    state = getattr(getattr(pipe, "unet", None), "__dict__", {})
    for slot in ("forward", "_old_forward"):
        hook = getattr(state.get(slot), "cmlora", None)
        # what wraps our forward may carry its attributes: only ours itself counts
        if isinstance(hook, _Hook) and state[slot] is hook.forward:
            return hook
    return None
