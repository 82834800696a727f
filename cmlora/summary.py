"""What the last run did, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cmlora.compose.plan import ALL, BASE, NONE, Step
from cmlora.engine.budget import Strategy
from cmlora.engine.denoiser import Denoiser
from cmlora.engine.run import Lane, Record


@dataclass(frozen=True)
class StepSummary:
    """One step.

    Attributes:
        rows_full, rows_shallow: rows that ran the whole UNet, and only its shallow part.
        dominant: dominant adapter per image of the pipeline's batch; empty where the method has none.
        weight: its weight before normalisation to the sum N, as in the config's `dominant_weight`.
        gate: m per image; empty where it is not computed.
    """

    rows_full: int
    rows_shallow: int
    dominant: tuple[str, ...]
    weight: float
    gate: tuple[float, ...]


@dataclass(frozen=True)
class Summary:
    """The last run of an accelerated pipeline; `str()` is a table.

    Attributes:
        method: of the config.
        adapters: in the order of their slots.
        steps: one entry per UNet evaluation.
        strategies: linear layers per strategy of the kernels' cost model: "fused" (the update inside the base GEMM),
            "add" (behind it), "merged" (a weight per adapter), "definition" (plain torch).
        refreshes: how often the whole UNet ran for each adapter, for the base model ("base") and for all adapters in
            one prediction ("a+b"), counted over the rows of the pipeline's batch.
        masks: where each adapter acts, [images, height, width] float32 of the latents' size on the CPU, as the last
            step of `routed`, of combine="local" or with regions had it; {} where there are no masks.
        adapter_bytes: memory of the stacked adapters, of the q, k, v weights laid one below the other, and of
            merged and transformed weights.
        cache_bytes: memory of the cached features, the prompt's keys and values and the time embeddings.
        strategy: what the run spent memory on; None before the first.
        peak: of `peak_bytes`.
    """

    method: str
    adapters: tuple[str, ...]
    steps: tuple[StepSummary, ...]
    refreshes: dict[str, int]
    masks: dict[str, Tensor] = field(repr=False, compare=False)
    strategies: dict[str, int]
    adapter_bytes: int
    cache_bytes: int
    strategy: Strategy | None
    peak: Callable[[], int | None] = field(repr=False, compare=False)

    @functools.cached_property
    def peak_bytes(self) -> int | None:
        """Predicted: the most memory that the run takes beside the pipeline's weights, adapters and caches included.

        From shapes alone, without a step being run (csrc_docs/engine.md). None before the first run, once the pipeline
        is restored, and where the UNet carries hooks or attention processors of one's own.
        """
        return self.peak()

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {', '.join(self.adapters) or 'no adapter'}; {len(self.steps)} steps",
            f"adapters {_mebi(self.adapter_bytes)}, cached {_mebi(self.cache_bytes)}, predicted peak "
            + ("unknown" if self.peak_bytes is None else _mebi(self.peak_bytes)),
            *([f"rows: {_spent(self.strategy)}"] if self.strategy else []),
            "full passes: " + (", ".join(f"{name} {count}" for name, count in self.refreshes.items()) or "none"),
            "LoRA layers: " + (", ".join(f"{name} {count}" for name, count in self.strategies.items()) or "none"),
            *(
                f"{name} acts in {float((mask > 0.5).float().mean()):.0%} of the image"
                for name, mask in self.masks.items()
            ),
            f"{'step':>4} {'full':>5} {'shallow':>7} {'weight':>7}  {'m':<16} dominant",
        ]
        for i, step in enumerate(self.steps):
            gate = " ".join(f"{m:.3f}" for m in step.gate) or "-"
            weight = f"{step.weight:.3f}" if step.dominant else "-"
            dominant = " ".join(step.dominant) or "-"
            lines.append(f"{i:>4} {step.rows_full:>5} {step.rows_shallow:>7} {weight:>7}  {gate:<16} {dominant}")
        return "\n".join(lines)


def summarise(denoiser: Denoiser) -> Summary:
    """Read the last run's record back from the device."""
    names, run, spending, method = denoiser.names, denoiser.last_run, denoiser.spending, denoiser.config.method
    lanes = [] if run is None else run.lanes
    labels = ("+".join(names),) if method in ("merge", "routed") else names
    refreshes = dict.fromkeys(("base", *labels, *names), 0)
    steps: dict[int, StepSummary] = {}
    for lane in lanes:
        for record in lane.record:
            for name in _refreshed(record, labels, names):
                refreshes[name] += 1
            told = _step(record, names)
            steps[record.index] = _together(steps[record.index], told) if record.index in steps else told
    return Summary(
        method=method,
        adapters=names,
        steps=tuple(steps[index] for index in sorted(steps)),
        refreshes={name: count for name, count in refreshes.items() if count or name in labels} if lanes else {},
        masks=_masks(lanes[0], names) if lanes else {},
        strategies=spending.layer_strategies() if lanes else {},
        adapter_bytes=spending.adapter_bytes,
        cache_bytes=sum(max((record.cache_bytes for record in lane.record), default=0) for lane in lanes),
        strategy=None if run is None else run.strategy,
        peak=lambda: spending.predicted_peak(run),
    )


def _masks(lane: Lane, names: Sequence[str]) -> dict[str, Tensor]:
    """Of every adapter [images, height, width] on the CPU."""
    holder = lane.routing or lane.combiner
    if holder is None or holder.masks is None:
        return {}
    return {name: mask.detach().cpu().clone() for name, mask in zip(names, holder.masks, strict=True)}


def _together(one: StepSummary, other: StepSummary) -> StepSummary:
    """Guidance halves that were called one by one: the rows of both; what was decided is the same for both."""
    full, shallow = one.rows_full + other.rows_full, one.rows_shallow + other.rows_shallow
    return replace(one, rows_full=full, rows_shallow=shallow)


def _mebi(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _spent(strategy: Strategy) -> str:
    """A strategy in words."""
    stacked, kept = "stacked" if strategy.stack else "apart", "kept" if strategy.keep_prompt else "made in every step"
    more = ("; weights merged" if strategy.merge else "") + ("; convolutions transformed" if strategy.transform else "")
    return f"{strategy.at_once} predictions at once; q, k, v {stacked}; the prompt's keys and values {kept}{more}"


def _refreshed(record: Record, labels: Sequence[str], names: Sequence[str]) -> list[str]:
    """What every full pass of a step predicted with, once per row of the pipeline's batch."""
    step = record.step
    predictions = range(len(step.slots)) if record.refreshed_all else step.refresh
    told = [_label(step, p, labels, names) for p in predictions for _ in range(record.own)]
    if step.refresh_dominant and not record.refreshed_all:
        told += [names[slot] for slot in _per_row(record.dominant, record.own)]
    return told if record.probe is None else told + _refreshed(record.probe, labels, names)


def _label(step: Step, prediction: int, labels: Sequence[str], names: Sequence[str]) -> str:
    """Of one prediction; a slot without a label of its own is that of the base model with the shared adapters."""
    slot, who = step.slots[prediction], step.who[prediction] if step.who else ALL
    if slot == BASE or slot >= len(labels) or who == NONE:
        return "base"
    return labels[slot] if who == ALL else names[who]


def _step(record: Record, names: Sequence[str]) -> StepSummary:
    step, rows = record.step, record.own
    predictions = len(step.slots) if record.refreshed_all else step.full_predictions
    dominant = tuple(names[slot] for slot in _per_row(record.dominant, rows)) if step.early is not None else ()
    gate = () if record.gate is None else tuple(float(m) for m in record.gate.tolist())
    probe = None if record.probe is None else _step(record.probe, names)
    return StepSummary(
        rows_full=predictions * rows + (probe.rows_full if probe else 0),
        rows_shallow=(len(step.slots) - predictions) * rows + (probe.rows_shallow if probe else 0),
        dominant=_images(dominant, record.halves),
        weight=step.dominant_coefficient / step.other_coefficient,
        gate=_images(gate, record.halves),
    )


def _per_row(dominant: Tensor | int | None, rows: int) -> list[int]:
    if isinstance(dominant, torch.Tensor):
        return [int(slot) for slot in dominant.tolist()]
    return [] if dominant is None else [dominant] * rows


def _images(values: tuple, halves: int) -> tuple:  # type: ignore[type-arg]  # of names or numbers alike
    """One value per image: the guidance halves of an image share theirs."""
    return values[: len(values) // halves]
