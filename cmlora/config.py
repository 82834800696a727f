"""What the user chooses, validated field by field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from cmlora.errors import ConfigError

Method = Literal["no_lora", "merge", "switch", "composite", "cmlora", "routed"]
Partition = Literal["offline", "online", "async"]
Combine = Literal["mean", "deviation", "local"]
LateStage = Literal["shift", "low"]
Backend = Literal["auto", "torch", "triton"]
CacheSchedule = Literal["nonuniform", "quadratic"]
Recipe = tuple[tuple[str, float], ...]
"""What one slot of the batch stands for: adapters that act together, each with a weight; () is the base model."""


@dataclass(frozen=True, kw_only=True)
class CMLoRAConfig:
    """How several LoRAs share one image. The method is CMLoRA's (arXiv 2502.04923); the default of `combine`
    follows from measurements (csrc_docs/quality.md); combine="mean" is the paper's.

    Attributes:
        method: "no_lora": the base model. "merge": all adapters summed. "switch": one at a time, in turn.
            "composite": one prediction per adapter, all equal (arXiv 2402.16843). "cmlora": the same with a dominant
            adapter that rotates, and a feature cache per adapter. "routed": all adapters in one prediction, each where
            its own prediction differs most from the base model's, as the first `mask_steps` steps find it.
        partition: what moves `cmlora` from its early to its late stage. "offline": a fixed share of the steps.
            "online": the spectrum of the latents, per image. "async": as offline, and dominance moves on its own
            clock instead of with the refreshes.
        adapters: names, in order; None: the active ones (`pipe.set_adapters`). Where only the one loaded last is
            active, as `pipe.load_lora_weights` leaves it, methods that compose several take all that are loaded.
        high, low: which adapters carry high or low frequencies; what is named in neither goes by ComposLoRA's role in
            its name (background: low, all else: high). high="auto": as a profile says that `accelerate` makes, see
            `cmlora.profile.settle`; only for cmlora.
        cache_interval: deep features are refreshed every so many steps; 1: no cache; "nonuniform": every 2nd, 3rd,
            2nd step in the first 3/8, the middle half, the last 1/8; "quadratic": dense around `quadratic_center`.
        cache_branch: (layer, block) of the skip connection where the deep part begins, as in DeepCache; None: the
            input of the last up block. Of a transformer: how many blocks at its beginning and at its end run in every
            step; None: an eighth and a sixteenth of them.
        max_cache_age: no cached feature is older than so many steps; None: no bound.
        cache_follow: with "deviation" and "local" the base model is refreshed more often than an adapter; in between,
            the adapter's cached feature moves as the base model's does: h_i + h_base(now) - h_base(then). False: it
            stays.
        switch_step: steps between two adapters of `switch`. switch_stages: it rotates over the high adapters in the
            early stage and over the low ones in the late stage (`offline_boundary`); False: over all of them.
        combine: "mean": mean_i w_i eps_i. "deviation": eps_base + sum_i w_i (eps_i - eps_base) with weights of mean
            one; one more row runs the base model (compositional guidance, Liu et al. 2022). "local": the same, each
            deviation times the adapter's mask, which comes from the step's own predictions (csrc_docs/places.md).
        mask_steps: steps at a run's begin in which `routed` predicts with every adapter alone, to find its masks.
        mask_temperature: of the softmax over adapters at a place: small, the strongest alone acts there; large, all do.
            None: 0.6 for routed, 0.25 for local.
        mask_blur: side of the box mean over places that masks are made of, odd; 1: none.
        mask_text: share of every adapter's update that `routed` takes where there are no places: in the keys and values
            of the prompt, text tokens, the embedding of the time step. 1: whole, as a merge; 0.5 showed more of the
            LoRAs where it was measured (csrc_docs/places.md).
        shared: adapters that act in every prediction, the base model's too, everywhere (LCM, Lightning, quality LoRAs):
            they take no part in dominance, masks or means.
        regions: {adapter: mask}: a mask of one's own, a tensor, array or picture of any size in 0..1. `routed` takes it
            for its mask; in `composite` and `cmlora` it weighs the adapter's prediction, place by place: mean_i with
            combine="mean", its deviation else. Adapters without one act everywhere.
        prompts: {adapter: text, or what the pipeline's encode_prompt returns for one}: that adapter's predictions of
            `composite` and `cmlora` are made with its own prompt, in the conditional half.
        dominant_weight: weight of the dominant adapter before normalisation; None: N - 0.5.
        dominant_decay: at the k-th rotation the dominant weight has lost sum_{j=1..k} decay^j; 0: constant.
        dominant_floor: below which it does not fall; 1: never below the others.
        offline_boundary: share of the steps that is the early stage.
        online_gate: an image is in its early stage while its high-frequency share is at least this.
        online_cutoff: high frequencies are those beyond this share of the largest radius.
        async_switch: share of the steps after which `async` moves dominance.
        late_stage: the late stage rotates over "shift": all but the first high adapter; "low": the low ones.
        quadratic_interval, quadratic_center, quadratic_power: mean interval, center (share of the steps) and exponent
            of the "quadratic" schedule (DeepCache, arXiv 2312.00858).
        max_rows: at most so many rows (predictions x guidance halves x images) run at once; None: all. Rows go in whole
            predictions; fewer than the pipeline's own batch has are an error of the call.
        memory_budget: bytes that adapters, caches and activations may take together, beside the pipeline's weights;
            what fits is chosen when a run begins (csrc_docs/engine.md). None: as fast as can be.
        merge_weights: whether layers keep W + s B A: no low-rank work in a step. One weight for all rows with "merge",
            of convolutions too; else one of every adapter, of linear layers. None: on CUDA with "merge", where half of
            the free memory holds them; on the CPU in float32, where they take no more memory than the UNet; and where
            the budget allows it.
        winograd: whether wide 3x3 convolutions in float32 keep their weights transformed and do F(2x2, 3x3): less than
            half of the multiplications, 16/9 of the memory once more. None: on the CPU, where these and merged weights
            together take at most twice the UNet's memory and the budget allows it.
        cuda_graphs: steps are captured and replayed as CUDA graphs, one per kind of step; an error on other devices.
            "auto": on a CUDA device where the host is predicted to take more than half of the device's time and there
            is memory for it; steps that cannot be captured run eagerly then, and one warning says so.
        backend: "auto": Triton on CUDA and ROCm, torch elsewhere; "torch" or "triton" force one.

    Raises:
        ConfigError: names the field, what it allows and what came.
    """

    method: Method = "cmlora"
    partition: Partition = "online"
    adapters: Sequence[str] | None = None
    high: Sequence[str] | Literal["auto"] = ()
    low: Sequence[str] = ()
    cache_interval: int | CacheSchedule = 2
    cache_branch: tuple[int, int] | None = None
    max_cache_age: int | None = None
    cache_follow: bool = True
    switch_step: int = 5
    switch_stages: bool = False
    combine: Combine = "local"
    mask_steps: int = 2
    mask_temperature: float | None = None
    mask_text: float = 1.0
    mask_blur: int = 3
    shared: Sequence[str] = ()
    regions: Mapping[str, Any] | None = None
    prompts: Mapping[str, Any] | None = None
    dominant_weight: float | None = None
    dominant_decay: float = 0.5
    dominant_floor: float = 1.0
    offline_boundary: float = 120 / 220
    online_gate: float = 0.4
    online_cutoff: float = 0.2
    async_switch: float = 1 / 11
    late_stage: LateStage = "shift"
    quadratic_interval: int = 3
    quadratic_center: float = 0.3
    quadratic_power: float = 1.4
    max_rows: int | None = None
    memory_budget: int | None = None
    merge_weights: bool | None = None
    winograd: bool | None = None
    cuda_graphs: bool | Literal["auto"] = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for name, kind in (
            ("method", Method),
            ("partition", Partition),
            ("combine", Combine),
            ("late_stage", LateStage),
            ("backend", Backend),
        ):
            _one_of(name, getattr(self, name), get_args(kind))
        for name in ("adapters", "high", "low", "shared"):
            object.__setattr__(self, name, _names(name, getattr(self, name)))
        _disjoint(self.high, self.low)
        if isinstance(self.cache_interval, str):
            _one_of("cache_interval", self.cache_interval, get_args(CacheSchedule), "or an int >= 1")
        else:
            _integer("cache_interval", self.cache_interval, 1, "'nonuniform' or 'quadratic'")
        _integer("switch_step", self.switch_step, 1)
        _integer("quadratic_interval", self.quadratic_interval, 1)
        if self.max_cache_age is not None:
            _integer("max_cache_age", self.max_cache_age, 1, "None")
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs must be True, False or 'auto', got {self.cuda_graphs!r}")
        for name in ("cache_follow", "switch_stages"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_places()
        for name in ("merge_weights", "winograd"):
            if not isinstance(getattr(self, name), bool | None):
                raise ConfigError(f"{name} must be True, False or None, got {getattr(self, name)!r}")
        if self.max_rows is not None:
            _integer("max_rows", self.max_rows, 1, "None")
        if self.memory_budget is not None:
            _integer("memory_budget", self.memory_budget, 1, "None")
        object.__setattr__(self, "cache_branch", _branch(self.cache_branch))
        if self.dominant_weight is not None:
            _number("dominant_weight", self.dominant_weight, 0, None, "None")
        _number("dominant_decay", self.dominant_decay, 0, 1)
        _number("dominant_floor", self.dominant_floor, 0, None)
        for name in ("offline_boundary", "online_gate", "quadratic_center"):
            _number(name, getattr(self, name), 0, 1)
        _number("quadratic_power", self.quadratic_power, 1, 10, above=True)
        _number("online_cutoff", self.online_cutoff, 0, 1, below=True)
        _number("async_switch", self.async_switch, 0, 1, above=True)

    def _check_places(self) -> None:
        """Masks, regions, prompts and shared adapters."""
        _integer("mask_steps", self.mask_steps, 1)
        _integer("mask_blur", self.mask_blur, 1)
        if self.mask_blur % 2 == 0:
            raise ConfigError(f"mask_blur must be odd, got {self.mask_blur}")
        _number("mask_text", self.mask_text, 0, 1)
        if self.mask_temperature is not None:
            _number("mask_temperature", self.mask_temperature, 0, None, "None", above=True)
        if self.method == "routed" and self.merge_weights:
            raise ConfigError(
                "merge_weights must not be True with method='routed', whose adapters have a weight per token"
            )
        for name, methods in (("regions", ("routed", "composite", "cmlora")), ("prompts", ("composite", "cmlora"))):
            given = getattr(self, name)
            if given is None:
                continue
            if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
                raise ConfigError(f"{name} must be a mapping from adapter names, got {type(given).__name__}")
            if self.method not in methods:
                raise ConfigError(f"{name} must go with method={' or '.join(map(repr, methods))}, got {self.method!r}")
            both = sorted(set(given) & set(self.shared))
            if both:
                raise ConfigError(f"{name} must not name shared adapters, which act everywhere, got {', '.join(both)}")
        for name in ("high", "low"):
            both = sorted(set(getattr(self, name)) & set(self.shared)) if getattr(self, name) != "auto" else []
            if both:
                raise ConfigError(f"{name} must not name shared adapters, got {', '.join(both)}")

    @property
    def temperature(self) -> float:
        """`mask_temperature`, or the rule's own."""
        if self.mask_temperature is not None:
            return self.mask_temperature
        return 0.6 if self.method == "routed" else 0.25

    @classmethod
    def build(cls, config: CMLoRAConfig | None, overrides: dict[str, Any]) -> CMLoRAConfig:
        """`config`, or the defaults, with single fields replaced; an unknown field is a ConfigError."""
        if config is not None and not isinstance(config, cls):
            raise ConfigError(f"config must be a CMLoRAConfig or None, got {type(config).__name__}")
        known = {f.name for f in fields(cls)}
        for name in overrides:
            if name not in known:
                raise ConfigError(f"{name} is no field of CMLoRAConfig; its fields are {', '.join(sorted(known))}")
        current = {} if config is None else {name: getattr(config, name) for name in known}
        return cls(**(current | overrides))


def _one_of(name: str, value: object, allowed: tuple[str, ...], alternative: str = "") -> None:
    if value not in allowed:
        raise ConfigError(
            f"{name} must be one of {', '.join(map(repr, allowed))} {alternative}".rstrip() + f", got {value!r}"
        )


def _integer(name: str, value: object, least: int, alternative: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        choice = f" or {alternative}" if alternative else ""
        raise ConfigError(f"{name} must be an int >= {least}{choice}, got {value!r}")


def _number(
    name: str,
    value: object,
    least: float,
    most: float | None,
    alternative: str = "",
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and value >= least
    fits = fits and not (above and value == least)
    if fits:
        limit = math.inf if most is None else most
        strictly = below or most is None
        fits = value < limit if strictly else value <= limit  # type: ignore[operator]  # an int or a float by now
    if not fits:
        interval = f"{'(' if above else '['}{least}, {'inf)' if most is None else f'{most})' if below else f'{most}]'}"
        choice = f" or {alternative}" if alternative else ""
        raise ConfigError(f"{name} must be a number in {interval}{choice}, got {value!r}")


def _names(name: str, value: object) -> tuple[str, ...] | Literal["auto"] | None:
    if value is None and name == "adapters":
        return None
    if value == "auto" and name == "high":
        return "auto"
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        alternative = " or 'auto'" if name == "high" else ""
        raise ConfigError(f"{name} must be a sequence of adapter names{alternative}, got {value!r}")
    duplicates = sorted({v for v in value if list(value).count(v) > 1})
    if duplicates:
        raise ConfigError(f"{name} must name each adapter once, got {', '.join(duplicates)} more than once")
    return tuple(value)


def _disjoint(high: Sequence[str], low: Sequence[str]) -> None:
    if high == "auto":
        if low:
            raise ConfigError(f"low must be empty with high='auto', which settles both, got {', '.join(low)}")
        return
    both = sorted(set(high) & set(low))
    if both:
        raise ConfigError(f"high and low must not share an adapter, got {', '.join(both)} in both")


def _branch(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)
    ):
        raise ConfigError(f"cache_branch must be two ints (layer, block) >= 0 or None, got {value!r}")
    return (value[0], value[1])
