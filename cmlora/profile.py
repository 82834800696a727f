"""Each LoRA alone on a pipeline: how much high frequency it draws, how its cached feature changes, high or low.

    profile = profile_loras(pipe, ["character", "background"], prompt="kamado nezuko, bamboolight", steps=25)
    print(profile)
    cmlora.accelerate(pipe, high=profile.high, low=profile.low)

The measure is CMLoRA's (arXiv 2502.04923): mean amplitude beyond a share of the largest radius.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cmlora.batch.inputs import Inputs
from cmlora.config import CMLoRAConfig
from cmlora.engine.denoiser import Denoiser
from cmlora.engine.hook import installed
from cmlora.engine.run import Lane, Run
from cmlora.errors import ConfigError, RunError
from cmlora.lora.bank import choose_adapters
from cmlora.models import find_family
from cmlora_kernels import radial_profile
from cmlora_kernels.radial import number_of_bins
from cmlora_kernels.spectrum_finish import first_high_bin

Signal = Literal["feature", "latents"]
AUTO_STEPS, AUTO_SEED = 8, 0


@dataclass(frozen=True, eq=False)
class Spectra:
    """Radial amplitude spectra of one signal over the steps; all tensors are float32 on the CPU.

    Attributes:
        profiles: [steps, bins] mean amplitude per bin of the radius, largest bin 1 (`cmlora_kernels.radial_profile`).
        intensity: [steps] mean of a profile beyond `online_cutoff` x largest radius.
    """

    profiles: Tensor
    intensity: Tensor

    @property
    def change(self) -> Tensor:
        """[steps - 1] of the intensity, from each step to the next."""
        return self.intensity.diff()

    @property
    def mean(self) -> float:
        """The intensity's mean over the steps."""
        return float(self.intensity.mean())


@dataclass(frozen=True, eq=False)
class LoraProfile:
    """One LoRA alone.

    Attributes:
        latents: of the channels' mean of what goes into the UNet in each step: what the online gate looks at.
        feature: of the deep feature that the cache holds, mean over its channels' profiles.
        similarity: [steps, steps] cosine of the features of two steps.
        image: [height, width, channels] in 0..1, the first of the batch; None where none was decoded.

        All are means over the rows of the pipeline's batch (guidance halves x images).
    """

    latents: Spectra
    feature: Spectra
    similarity: Tensor
    image: Tensor | None


@dataclass(frozen=True, eq=False)
class Profile:
    """Several LoRAs, each drawn alone; `str()` is a table.

    Attributes:
        loras: by name, in the given order.
        by: the signal whose mean intensity decides.
        online_cutoff: where high frequencies begin.
        high, low: the half with the larger mean intensity (the larger half of an odd number) and the rest, each in
            the given order: what high="auto" uses.
    """

    loras: Mapping[str, LoraProfile]
    by: Signal
    online_cutoff: float
    high: tuple[str, ...]
    low: tuple[str, ...]

    def spectra(self, name: str, signal: Signal) -> Spectra:
        """Of one LoRA and one of the two signals."""
        lora = self.loras[name]
        return lora.feature if signal == "feature" else lora.latents

    def __str__(self) -> str:
        lines = [f"high-frequency intensity beyond {self.online_cutoff:g} x the largest radius, mean over the steps"]
        lines.append(f"{'feature':>8} {'latents':>8}  half  LoRA (the {self.by} decides)")
        for name in sorted(self.loras, key=lambda name: -self.spectra(name, self.by).mean):
            lora, half = self.loras[name], "high" if name in self.high else "low"
            lines.append(f"{lora.feature.mean:>8.4f} {lora.latents.mean:>8.4f}  {half:<4}  {name}")
        return "\n".join([*lines, f"order: {', '.join((*self.high, *self.low))}"])

    def as_dict(self, every: int = 1) -> dict[str, Any]:
        """All numbers, for JSON; radial spectra of every so many steps."""
        return {
            "by": self.by,
            "online_cutoff": self.online_cutoff,
            "high": list(self.high),
            "low": list(self.low),
            "loras": {name: _lora_dict(lora, every) for name, lora in self.loras.items()},
        }


def profile_loras(
    pipe: Any,
    names: Sequence[str] | None = None,
    *,
    config: CMLoRAConfig | None = None,
    by: Signal = "feature",
    steps: int = 20,
    seed: int = 0,
    images: bool = True,
    **call: Any,
) -> Profile:
    """Draw with each LoRA alone, from the same latents, and measure; the pipeline is left as it was.

    Args:
        pipe: a diffusers pipeline that `accelerate` takes, accelerated or not.
        names: adapters; None: those that `accelerate` would compose. Weights are the pipeline's own.
        config: for its online_cutoff, cache_branch, adapters and backend.
        by: the signal that decides what is high. The latents' spectrum is measured against the brightness of the
            whole image, which the prompt decides more than the LoRA (csrc_docs/profile.md).
        steps: num_inference_steps of the calls. seed: of their generator.
        images: whether to decode an image per LoRA.
        **call: the pipeline's own arguments: prompt, guidance_scale, image, ...

    Raises:
        ConfigError, AdapterError, UnsupportedModelError: as `accelerate`.
        RunError: latents or features that are not finite.
    """
    if by not in get_args(Signal):
        raise ConfigError(f"by must be one of 'feature', 'latents', got {by!r}")
    _, module = find_family(pipe)
    config = config or CMLoRAConfig()
    chosen = config.adapters if names is None else tuple(names)
    loras = {}
    for name in choose_adapters(module, chosen, several=True):
        alone = replace(config, method="merge", adapters=[name], cache_interval=1, high=(), low=())
        with _own_scheduler(pipe, name), installed(pipe, watched := _Watched(pipe, alone)):
            generator = torch.Generator().manual_seed(seed)
            kind = "np" if images else "latent"
            drawn = pipe(num_inference_steps=steps, generator=generator, output_type=kind, **call).images
        image = torch.as_tensor(drawn[0]).float().cpu() if images else None
        loras[name] = watched.result(name, image)
    means = {name: (lora.feature if by == "feature" else lora.latents).mean for name, lora in loras.items()}
    high, low = split(means)
    return Profile(loras, by, config.online_cutoff, high, low)


def split(intensity: Mapping[str, float]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The larger half of the values (of an odd number one more) and the rest, each in the given order."""
    ranked = sorted(intensity, key=lambda name: -intensity[name])
    high = ranked[: math.ceil(len(ranked) / 2)]
    return tuple(n for n in intensity if n in high), tuple(n for n in intensity if n not in high)


def settle(pipe: Any, config: CMLoRAConfig) -> CMLoRAConfig:
    """high="auto" as names: a profile of 8 steps, seed 0, an empty prompt and no guidance, at the pipeline's own size.

    Nothing of it is kept: `accelerate` profiles each time. To profile once, or with a prompt, give `accelerate` the
    `high` and `low` of `profile_loras`.

    Raises:
        ConfigError: the pipeline cannot draw from an empty prompt alone.
    """
    lacks = ""
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        lacks = "also needs an image"
    elif getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
        lacks = "has no tokenizer or text encoder"
    if lacks:
        raise ConfigError(
            f"high='auto' draws with an empty prompt, but this {type(pipe).__name__} {lacks}; profile it with its own "
            "arguments, p = cmlora.profile.profile_loras(pipe, ...), and accelerate with high=p.high, low=p.low"
        )
    profile = profile_loras(
        pipe, config=config, steps=AUTO_STEPS, seed=AUTO_SEED, images=False, prompt="", guidance_scale=1.0
    )
    return replace(config, high=profile.high, low=profile.low)


def high_frequency_difference(a: Tensor, b: Tensor, online_cutoff: float = 0.2) -> Tensor:
    """Where two images differ in their high frequencies.

    Args:
        a, b: [height, width, channels].
        online_cutoff: high is what lies in the radial bins beyond this share of the largest radius.

    Returns:
        [height, width] mean over channels of |high-pass of a - high-pass of b|.

    Raises:
        ValueError: images of another rank or of different sizes.
    """
    if a.ndim != 3 or a.shape != b.shape:
        raise ValueError(
            f"a and b must be [height, width, channels] of one size, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    height, width = a.shape[:2]
    y, x = torch.fft.fftfreq(height, 1 / height), torch.fft.fftfreq(width, 1 / width)
    radius = (y[:, None] ** 2 + x**2).sqrt()
    high = radius >= first_high_bin(number_of_bins(height, width), online_cutoff)  # a bin is floor(radius)
    spectrum = torch.fft.fft2(a.double() - b.double(), dim=(0, 1)) * high[:, :, None].to(a.device)
    difference: Tensor = torch.fft.ifft2(spectrum, dim=(0, 1)).real.abs().mean(2).float()
    return difference


class _Watched(Denoiser):
    """Keeps what goes into the UNet and into the cache in every step."""

    def __init__(self, pipe: Any, config: CMLoRAConfig) -> None:
        super().__init__(pipe, config)
        self.latents: list[Tensor] = []  # profiles [rows, bins], as the next
        self.feature: list[Tensor] = []
        self.cached: list[Tensor] = []  # [rows, values] in the pipeline's own precision, where it runs

    def _step(self, run: Run, lane: Lane, inputs: Inputs) -> Tensor:
        noise = super()._step(run, lane, inputs)
        assert lane.cache is not None  # refreshed in every step, never written again
        self.latents.append(radial_profile(self.batched.latents(inputs), True, self.config.backend))
        self.feature.append(radial_profile(self.batched.feature_map(lane.cache, inputs), False, self.config.backend))
        self.cached.append(lane.cache.flatten(1))
        return noise

    def result(self, name: str, image: Tensor | None) -> LoraProfile:
        latents, feature = (self._spectra(profiles) for profiles in (self.latents, self.feature))
        if not (latents.profiles.isfinite().all() and feature.profiles.isfinite().all()):
            raise RunError(f"latents or features of LoRA {name!r} alone are not finite (NaN or infinite); no profile")
        return LoraProfile(latents, feature, _similarity(self.cached).cpu(), image)

    def _spectra(self, profiles: list[Tensor]) -> Spectra:
        mean = torch.stack([profile.mean(0) for profile in profiles]).cpu()
        return Spectra(mean, mean[:, first_high_bin(mean.shape[1], self.config.online_cutoff) :].mean(1))


def _similarity(cached: Sequence[Tensor]) -> Tensor:
    """[steps, steps] cosine of rows [rows, values], mean over the rows; two steps at a time, for the memory's sake."""
    table = torch.ones(len(cached), len(cached), device=cached[0].device)
    for i, one in enumerate(cached):
        for j, other in enumerate(cached[:i]):
            table[i, j] = table[j, i] = torch.cosine_similarity(one.float(), other.float()).mean()
    return table


@contextmanager
def _own_scheduler(pipe: Any, name: str) -> Iterator[None]:
    """A copy of the pipeline's scheduler for the length of a with block, and progress under the LoRA's name."""
    before = {"scheduler": pipe.scheduler, "_progress_bar_config": getattr(pipe, "_progress_bar_config", {})}
    # past the pipeline's own __setattr__, which would enter the copy in its config
    pipe.__dict__["scheduler"] = copy.deepcopy(pipe.scheduler)
    pipe.set_progress_bar_config(**{"desc": f"{name} alone", **before["_progress_bar_config"]})
    try:
        yield
    finally:
        pipe.__dict__.update(before)


def _lora_dict(lora: LoraProfile, every: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for signal, spectra in (("feature", lora.feature), ("latents", lora.latents)):
        told[signal] = {
            "mean": spectra.mean,
            "intensity": spectra.intensity.tolist(),
            "change": spectra.change.tolist(),
            "profiles": {str(step): spectra.profiles[step].tolist() for step in range(0, len(spectra.profiles), every)},
        }
    return told | {"similarity": lora.similarity.tolist()}
