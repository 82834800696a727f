"""LoRA as more columns of K, and what each idea of folding.py would save of a step, per card; predicted.

y = [x | s x A^T] [W | B]^T: the base GEMM stays the library's, with K grown by the ranks of all slots, since rows of
one GEMM share their weight; a row's ranks of other slots are zeros. A small GEMM shrinks before it. What follows from
it: csrc_docs/multi_lora.md. The command that prints the table: benchmarks/folding.py --cards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cmlora.lab.bench.folding import (
    ADAPTERS,
    TARGETS,
    Fold,
    Ops,
    gate_folds,
    geglu,
    geglu_folds,
    lora_layers,
    saved,
    seconds,
    silu_folds,
)
from cmlora.lab.bench.launched import Op
from cmlora.lab.bench.roofline import RANK, Gpu
from cmlora.lab.bench.steps import INTERVAL, MODELS, MetaPipe
from cmlora.lab.markdown import header, row
from cmlora_kernels.tiles import Problem

ATTENTION_WIDTHS = (40, 64, 48)  # a head of SD1.5, what flash kernels make of it, and the next multiple of 16


def column_folds(ops: Ops, gpu: Gpu, copied: bool) -> list[Fold]:
    """Every layer as columns of K; `copied`: x is copied into the wider buffer, else whoever made x wrote it there."""
    return [Fold("columns of K", layer, as_columns(p, copied)) for p, layer in lora_layers(ops)]


def as_columns(p: Problem, copied: bool) -> tuple[Op, ...]:
    """The launches of a layer: copy, shrink by the library, mask and scale, the wider GEMM, and a gate that follows."""
    m, size, ranks = p.rows * p.tokens, p.dtype.itemsize, p.adapters * p.parts * p.rank
    shrink, wide = 2 * m * p.inner * ranks, 2 * m * (p.inner + ranks) * p.outer
    weight = p.outer * (p.inner + ranks + p.bias)
    found = [
        Op("shrink", size * (m * (p.inner + ranks) + ranks * p.inner), shrink, shrink, "library"),
        Op("mask", size * 2 * m * ranks),  # not in place of anything: the GEMM above it knows no slots
        Op("linear", size * (m * (p.inner + ranks + p.outer) + weight), wide, wide, "library"),
    ]
    copy = [Op("copy", size * 2 * m * p.inner)] if copied else []
    return (*copy, *found, *([geglu(p)] if p.gated else []))


def unpadded(ops: Ops) -> list[Fold]:
    """Attention with heads of SD1.5's width padded to a multiple of 16 and not to that of a flash kernel."""
    head, now, then = ATTENTION_WIDTHS
    narrow = [op for op in ops if op.name == "attention" and op.work * head == op.flops * now]
    return [
        Fold("heads", (op,), (Op("attention", op.bytes, op.flops, op.flops * then // head, op.unit),)) for op in narrow
    ]


def cards_table(model: str, gpus: Iterable[Gpu]) -> Iterator[str]:
    """The share of a step's time that each idea saves, per card and LoRA targets; negative: it costs that much."""
    yield f"Predicted for {MODELS[model].title}, fp16, {ADAPTERS} LoRAs of rank {RANK}: share of the two steps of an"
    yield f"interval of {INTERVAL}. Columns of K: x copied, not copied, and copied where that alone gains."
    yield ""
    ideas = ("GEGLU in one pass", "in its layer", "layers fused", "SiLU in its norm", "heads of 48", "columns of K")
    yield from header("LoRA on", "card", "predicted ms", *ideas, "not copied", "where it gains")
    for title, targets in TARGETS.items():
        steps = MetaPipe(model, ADAPTERS, RANK, targets).steps("cmlora, mean", ADAPTERS)
        for gpu in gpus:
            yield _line(title, [op for step in steps for op in step.trace.ops(gpu.arch)], gpu)


def _line(title: str, ops: Ops, gpu: Gpu) -> str:
    gates = gate_folds(ops, gpu)
    copied, free = (column_folds(ops, gpu, copied) for copied in (True, False))
    gaining = [fold for fold in copied if seconds(fold.then, gpu) < seconds(fold.now, gpu)]
    whole = sum(len(fold.then) == 1 for fold in gates)
    columns = (f"{saved(folds, ops, gpu):.1%}" for folds in (silu_folds(ops), unpadded(ops), copied, free))
    inside = (f"{saved(gates, ops, gpu):.1%}", f"{whole} of {len(gates)}") if gates else ("", "")
    milliseconds = f"{seconds(ops, gpu) * 1e3:.1f}"
    one_pass, best = (f"{saved(folds, ops, gpu):.1%}" for folds in (geglu_folds(ops), gaining))
    where = f"{best} by {len(gaining)} of {len(copied)}"
    return row(title, gpu.name, milliseconds, one_pass, *inside, *columns, where)
