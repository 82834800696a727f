"""Method, partition and schedule -> one Step per UNet evaluation, known before the run. Standard library only.

A *prediction* is one noise prediction of a step: an adapter's, the base model's (slot -1), or the merged one. What the
spectrum decides during the run stays open here: a gated step names the dominant adapter of either stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cmlora.config import CMLoRAConfig, Recipe
from cmlora.errors import AdapterError, ConfigError

ROLES_LOW = ("background",)
BASE = -1


@dataclass(frozen=True)
class Step:
    """One UNet evaluation.

    Attributes:
        slots: adapter slot of every prediction; -1 is the base model.
        refresh: predictions (positions in `slots`) that run the whole UNet for certain.
        refresh_dominant: whether the dominant prediction, where only the device knows it, does so too.
        early, late: the dominant prediction of either stage (equal where it is known); None: no dominance.
        rotate: whether dominance is decided anew in this step; else the last decision holds.
        dominant_coefficient, other_coefficient, base_coefficient: what a dominant, another and the base prediction
            are multiplied with before the sum.
    """

    slots: tuple[int, ...]
    refresh: tuple[int, ...]
    refresh_dominant: bool
    early: int | None
    late: int | None
    rotate: bool
    dominant_coefficient: float
    other_coefficient: float
    base_coefficient: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether the device decides which adapter dominates."""
        return self.early != self.late

    @property
    def full(self) -> bool:
        """Whether all predictions run the whole UNet."""
        return len(self.refresh) == len(self.slots)

    @property
    def full_predictions(self) -> int:
        """Number of predictions that run the whole UNet."""
        return len(self.refresh) + self.refresh_dominant


def partition_adapters(names: Sequence[str], config: CMLoRAConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """High and low adapters, each in given order (design of ComposLoRA's roles: background is low, all else high).

    Raises:
        ConfigError: high or low names an adapter that takes no part.
    """
    assert config.high != "auto"  # accelerate has settled it
    for field, given in (("high", config.high), ("low", config.low)):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ConfigError(f"{field} names {', '.join(unknown)}, but the adapters are {', '.join(names)}")
    low = [n for n in names if n in config.low or (n not in config.high and n.lower().startswith(ROLES_LOW))]
    high = [n for n in names if n not in low]
    if not high:
        high, low = low, []
    return tuple(high), tuple(low)


def order_adapters(names: Sequence[str], config: CMLoRAConfig) -> tuple[str, ...]:
    """The adapters in the order of their slots: cmlora puts high before low.

    Raises:
        AdapterError: too few adapters for the method.
    """
    if config.method in ("composite", "cmlora") and len(names) < 2:
        raise AdapterError(
            f"method={config.method!r} composes at least two adapters, got {', '.join(names) or 'none'}; "
            "load another LoRA and activate both with pipe.set_adapters([...]), or use method='merge'"
        )
    if config.method == "switch" and not names:
        raise AdapterError("method='switch' needs an adapter, got none; load one with pipe.load_lora_weights")
    if config.method != "cmlora":
        return tuple(names)
    high, low = partition_adapters(names, config)
    return high + low


def make_recipes(config: CMLoRAConfig, names: Sequence[str]) -> tuple[Recipe, ...]:
    """What the slots stand for: all adapters together for merge, else one each."""
    if config.method == "merge":
        return (tuple((name, 1.0) for name in names),) if names else ()
    return tuple(((name, 1.0),) for name in names)


def refresh_steps(config: CMLoRAConfig, steps: int) -> frozenset[int]:
    """The steps at which deep features are refreshed; always includes step 0 (DeepCache, arXiv 2312.00858)."""
    interval = config.cache_interval
    if interval == "nonuniform":
        first, second = int(0.375 * steps), int(0.875 * steps)
        return frozenset({0, *range(0, first, 2), *range(first, second, 3), *range(second, steps, 2)})
    if interval == "quadratic":
        return _quadratic_steps(config, steps)
    assert isinstance(interval, int)  # validated by CMLoRAConfig
    return frozenset(range(0, steps, interval))


def _quadratic_steps(config: CMLoRAConfig, steps: int) -> frozenset[int]:
    """DeepCache's power law: evenly spaced on a curve x^power around the center, lowered until the steps suffice."""
    count = -(-steps // config.quadratic_interval)
    center = min(int(config.quadratic_center * steps), steps - 1)
    power = config.quadratic_power
    found: frozenset[int] = frozenset({0})
    while power > 1:
        # A negative base has a complex root; its real part after the power is what the schedule is made of.
        low, high = complex(-center) ** (1 / power), complex(steps - center) ** (1 / power)
        step = (high - low) / count
        inner = sorted({int(((low + i * step) ** power).real) for i in range(count + 1)})[1:-1]
        found = frozenset({0, *(x + center for x in inner)})
        if len(found) == count:
            break
        power -= 0.02
    return found


def make_plan(config: CMLoRAConfig, names: Sequence[str], steps: int) -> tuple[Step, ...]:
    """The steps of one run.

    Args:
        config: the method and its schedule.
        names: adapters in the order of their slots (`order_adapters`).
        steps: UNet evaluations of the run.

    Raises:
        AdapterError, ConfigError: as `order_adapters` and `partition_adapters`.
    """
    if config.method in ("composite", "cmlora"):
        planned = _many(config, names, steps)
    else:
        planned = _single(config, 0 if config.method == "no_lora" else len(names), steps)
    return tuple(_bound_age(planned, config.max_cache_age))


def _single(config: CMLoRAConfig, adapters: int, steps: int) -> list[Step]:
    """no_lora, merge, switch: one prediction a step; a switch of adapters is a refresh."""
    refreshes = refresh_steps(config, steps)
    planned: list[Step] = []
    only = 0 if adapters else BASE
    for i in range(steps):
        slot = (max(i - 1, 0) // config.switch_step) % adapters if config.method == "switch" else only
        changed = bool(planned) and planned[-1].slots != (slot,)
        refresh = (0,) if i in refreshes or changed else ()
        planned.append(Step((slot,), refresh, False, None, None, False, 1.0, 1.0))
    return planned


def _many(config: CMLoRAConfig, names: Sequence[str], steps: int) -> list[Step]:
    """composite, cmlora: a prediction per adapter, and the base's for combine='deviation'."""
    n = len(names)
    base = (n,) if config.combine == "deviation" else ()
    slots = (*range(n), *(BASE for _ in base))
    everyone = tuple(range(len(slots)))
    refreshes = refresh_steps(config, steps)
    if config.method == "composite":
        weights = _coefficients(config, n, 1.0)
        return [
            Step(slots, everyone if i in refreshes else (), False, None, None, False, *weights) for i in range(steps)
        ]
    planned: list[Step] = []
    for i, (rotate, turn, first, last) in enumerate(_dominance(config, names, steps, refreshes)):
        refreshing, known = i in refreshes, first == last
        refresh = ((first, *base) if known else base) if refreshing else ()
        if i == 0 or config.cache_interval == 1:
            refresh, known = everyone, True
        weights = _coefficients(config, n, _dominant_weight(config, n, turn))
        planned.append(Step(slots, refresh, refreshing and not known, first, last, rotate, *weights))
    return planned


def _dominance(
    config: CMLoRAConfig, names: Sequence[str], steps: int, refreshes: frozenset[int]
) -> Iterator[tuple[bool, int, int, int]]:
    """Per step: whether dominance rotates, how often it has, and the dominant adapter of the early and late stage."""
    early, late = _rotations(config, names)
    period = max(1, round(config.async_switch * steps))
    turn = -1
    first = last = early[0]
    for i in range(steps):
        rotate = i % period == 0 if config.partition == "async" else i in refreshes
        if rotate:
            turn += 1
            first, last = early[turn % len(early)], late[turn % len(late)]
            if config.partition != "online":
                # 120/220 of 220 steps is a hair below 120 in floating point
                first = last = first if i <= config.offline_boundary * steps + 1e-9 else last
            elif i == 0:
                last = first  # there is no previous step: m = 1
        yield rotate, turn, first, last


def _rotations(config: CMLoRAConfig, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Slots over which dominance rotates in the early and in the late stage."""
    high, low = partition_adapters(names, config)
    early = list(range(len(high)))
    everyone = range(len(names))
    if not low:
        return early, early
    late = list(everyone[1:] if config.late_stage == "shift" else everyone[len(high) :])
    return early, late


def _dominant_weight(config: CMLoRAConfig, n: int, turn: int) -> float:
    start = n - 0.5 if config.dominant_weight is None else config.dominant_weight
    return max(config.dominant_floor, start - sum(config.dominant_decay**j for j in range(1, turn + 1)))


def _coefficients(config: CMLoRAConfig, n: int, weight: float) -> tuple[float, float, float]:
    """Factors of the dominant, the other and the base prediction; weights sum to n, as the paper normalises them."""
    other = n / (weight + n - 1)
    dominant = weight * other
    if config.combine == "mean":
        return dominant / n, other / n, 0.0
    # eps_base + sum_i (w_i / mean(w)) (eps_i - eps_base), and mean(w) is 1
    return dominant, other, 1.0 - n


def _bound_age(planned: list[Step], max_age: int | None) -> list[Step]:
    """Refresh what would grow older than `max_age`; an age that only the device knows counts at its bound."""
    if max_age is None:
        return planned
    ages: list[int] = []
    bounded: list[Step] = []
    for step in planned:
        ages = [age + 1 for age in ages] or [0] * len(step.slots)
        stale = {p for p, age in enumerate(ages) if age > max_age}
        refresh = tuple(sorted({*step.refresh, *stale}))
        open_refresh = step.refresh_dominant and len(refresh) < len(step.slots)
        if open_refresh and {step.early, step.late} & stale:
            # the dominant one may be among the stale: all together keeps the number of rows known
            refresh, open_refresh = tuple(range(len(step.slots))), False
        for p in refresh:
            ages[p] = 0
        bounded.append(replace(step, refresh=refresh, refresh_dominant=open_refresh))
    return bounded
