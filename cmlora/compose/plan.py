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
ALL, NONE = -1, -2
"""What a prediction has of the adapters of its slot, as in `batch.placing`: this file imports no torch."""


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
        adapters: number of predictions that are an adapter's; the base models' follow them.
        bases: for each adapter's prediction the one of the base model that it is compared with; () without any.
        who: what of the adapters of its slot a prediction has, where they have masks: as in `batch.placing`.
        probe: predictions that are no part of the noise, from which this step's masks are made anew; None: they stay.
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
    adapters: int = 1
    bases: tuple[int, ...] = ()
    who: tuple[int, ...] = ()
    probe: Step | None = None

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
    least = 1 if config.shared else 2
    if config.method in ("composite", "cmlora") and len(names) < least:
        raise AdapterError(
            f"method={config.method!r} composes at least two adapters, got {', '.join(names) or 'none'}; "
            "load another LoRA and activate both with pipe.set_adapters([...]), or use method='merge'"
        )
    if config.method in ("switch", "routed") and not names:
        raise AdapterError(f"method={config.method!r} needs an adapter, got none; load one with pipe.load_lora_weights")
    if config.method != "cmlora" and not config.switch_stages:
        return tuple(names)
    high, low = partition_adapters(names, config)
    return high + low


def make_recipes(config: CMLoRAConfig, names: Sequence[str]) -> tuple[Recipe, ...]:
    """What the slots stand for: one adapter each, or all together; shared adapters are in each of them.

    The last one is the base model with the shared adapters, where there are any: the base model alone is slot -1.
    """
    shared = tuple((name, 1.0) for name in config.shared)
    base: tuple[Recipe, ...] = (shared,) if shared else ()
    if config.method == "no_lora":
        return base
    if config.method in ("merge", "routed"):
        whole = (*((name, 1.0) for name in names), *shared)
        return (whole, *base) if whole else ()
    return (*(((name, 1.0), *shared) for name in names), *base)


def base_slot(config: CMLoRAConfig, names: Sequence[str]) -> int:
    """The slot of the base model."""
    return len(make_recipes(config, names)) - 1 if config.shared else BASE


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
    elif config.method == "routed":
        planned = _routed(config, names, steps)
    else:
        planned = _single(config, names, steps)
    return tuple(_bound_age(planned, config.max_cache_age))


def _single(config: CMLoRAConfig, names: Sequence[str], steps: int) -> list[Step]:
    """no_lora, merge, switch: one prediction a step; a switch of adapters is a refresh."""
    refreshes = refresh_steps(config, steps)
    only = base_slot(config, names) if config.method == "no_lora" or not names else 0
    turns = _turns(config, names, steps) if config.method == "switch" else [only] * steps
    planned: list[Step] = []
    for i, slot in enumerate(turns):
        changed = bool(planned) and planned[-1].slots != (slot,)
        refresh = (0,) if i in refreshes or changed else ()
        planned.append(Step((slot,), refresh, False, None, None, False, 1.0, 1.0))
    return planned


def _turns(config: CMLoRAConfig, names: Sequence[str], steps: int) -> list[int]:
    """The adapter of each step of switch; with stages each one begins with its first adapter, and its own count."""
    if not config.switch_stages:
        return [max(i - 1, 0) // config.switch_step % len(names) for i in range(steps)]
    high, low = partition_adapters(names, config)
    early, late = range(len(high)), range(len(high), len(high) + len(low))
    begin = next((i for i in range(steps) if not _is_early(config, i, steps)), steps) if low else steps
    turns = [early[max(i - 1, 0) // config.switch_step % len(early)] for i in range(begin)]
    return turns + [late[i // config.switch_step % len(late)] for i in range(steps - begin)]


def _is_early(config: CMLoRAConfig, step: int, steps: int) -> bool:
    # 120/220 of 220 steps is a hair below 120 in floating point
    return step <= config.offline_boundary * steps + 1e-9


def _routed(config: CMLoRAConfig, names: Sequence[str], steps: int) -> list[Step]:
    """One prediction of all adapters; beside it, in the first steps, every adapter alone and the base model."""
    refreshes, n, base = refresh_steps(config, steps), len(names), base_slot(config, names)
    probes = 0 if config.regions is not None else min(config.mask_steps, steps)

    def predict(slots: tuple[int, ...], who: tuple[int, ...], count: int) -> list[Step]:
        everyone = tuple(range(len(slots)))
        plain = Step(slots, (), False, None, None, False, 1.0, 1.0, adapters=len(slots), who=who)
        return [replace(plain, refresh=everyone if i in refreshes else ()) for i in range(count)]

    planned = predict((0,), (ALL,), steps)
    alone = _bound_age(predict((*(0 for _ in names), base), (*range(n), NONE), probes), config.max_cache_age)
    return [*(replace(step, probe=probe) for step, probe in zip(planned, alone, strict=False)), *planned[probes:]]


def _many(config: CMLoRAConfig, names: Sequence[str], steps: int) -> list[Step]:
    """composite, cmlora: a prediction per adapter, and the base's for combine='deviation'."""
    n, base_row = len(names), base_slot(config, names)
    apart = base_prompts(config, names)  # base models on an adapter's own prompt, before the one on the pipeline's
    base = () if config.combine == "mean" else tuple(range(n, n + len(apart) + 1))
    slots = (*range(n), *(base_row for _ in base))
    bases = tuple(n + (apart.index(name) if name in apart else len(apart)) for name in names) if base else ()
    everyone = tuple(range(len(slots)))
    refreshes = refresh_steps(config, steps)
    if config.method == "composite":
        dominance: Iterator[tuple[bool, int, int | None, int | None]] = ((False, 0, None, None) for _ in range(steps))
    else:
        dominance = _dominance(config, names, steps, refreshes)
    planned: list[Step] = []
    for i, (rotate, turn, first, last) in enumerate(dominance):
        refreshing, known = i in refreshes, first == last
        if first is None or i == 0 or config.cache_interval == 1:
            refresh, known = everyone if refreshing else (), True
        else:
            refresh = ((first, *base) if known else base) if refreshing else ()
        weight = 1.0 if first is None else _dominant_weight(config, n, turn)
        planned.append(
            Step(
                slots,
                refresh,
                refreshing and not known,
                first,
                last,
                rotate,
                *_coefficients(config, n, weight),
                adapters=n,
                bases=bases,
            )
        )
    return planned


def base_prompts(config: CMLoRAConfig, names: Sequence[str]) -> tuple[str, ...]:
    """The adapters with a prompt of their own, each compared with the base model on that prompt."""
    return tuple(name for name in names if name in (config.prompts or {}))


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
                first = last = first if _is_early(config, i, steps) else last
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
