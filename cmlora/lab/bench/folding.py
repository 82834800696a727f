"""What folding LoRA's shrink into the norm or GEGLU that makes x would save in a step, and its neighbours; predicted.

Launches of real steps on `meta`, and what would take their place; time is predicted by the model of roofline.py. What
follows from it: csrc_docs/multi_lora.md, feature_bank.md. The command that prints the tables: benchmarks/folding.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cmlora.lab.bench.launched import Op, layer_kernels
from cmlora.lab.bench.roofline import RANK, Assumptions, Gpu, step_time
from cmlora.lab.bench.steps import ATTENTION, FEED_FORWARD, INTERVAL, MODELS, MetaPipe
from cmlora.lab.markdown import header, row
from cmlora_kernels.cards import chip
from cmlora_kernels.tiles import Problem, add_tile, cdiv, linear_tile, rank_bucket

ADAPTERS, WIDE = 5, 256
NORM = "group_norm_silu"
TARGETS = {"attention": ATTENTION, "attention, feed-forward": ATTENTION + FEED_FORWARD}
Ops = Sequence[Op]


@dataclass(frozen=True)
class Fold:
    """Launches of a step, and those that would take their place."""

    kind: str
    now: tuple[Op, ...]
    then: tuple[Op, ...]


def seconds(ops: Ops, gpu: Gpu) -> float:
    """Predicted device seconds of some launches."""
    return step_time(ops, gpu, Assumptions()).device


def layers(ops: Ops) -> Iterator[tuple[str, Op, tuple[Op, ...], Problem]]:
    """Every multi-LoRA linear whose x a layer norm has just made: its kind, that producer, its launches."""
    for i, op in enumerate(ops):
        if op.problem is None:
            continue
        p, first = op.problem, i if is_fused(op) else i - 1  # the base GEMM of an update in place lies before it
        producer = ops[first - 1]
        if producer.name == "native_layer_norm":
            kind = "q, k, v" if p.parts == 3 else "ff.net.0.proj" if p.outer > p.inner else "attn2.to_q"
            yield kind, producer, tuple(ops[first : i + 1]), p


def is_fused(op: Op) -> bool:
    """Whether a launch is a base GEMM with the update inside."""
    return op.problem is not None and not op.name.startswith(("add ", "gate "))


def shrink_folds(ops: Ops, gpu: Gpu) -> list[Fold]:
    """The shrink moved into the producer of x."""
    return [Fold(kind, (x, *layer), (with_shrink(x, p), *expanding(p, gpu))) for kind, x, layer, p in layers(ops)]


def with_shrink(producer: Op, p: Problem) -> Op:
    """The producer of x as a kernel that writes the scaled x A^T [rows, tokens, parts * rank], too."""
    m, columns = p.rows * p.tokens, p.parts * p.rank
    moved = producer.bytes + p.dtype.itemsize * (m * columns + p.adapters * columns * p.inner)
    work = 2 * m * p.inner * p.parts * rank_bucket(p.rank)
    return Op(f"{producer.name}, shrink", moved, 2 * m * p.inner * columns, work, "triton")


def expanding(p: Problem, gpu: Gpu) -> tuple[Op, ...]:
    """The layer once its shrink is there: expand in the GEMM's epilogue or in place behind cuBLAS, the faster of two.

    The GEMM gets the tile of one without an update, as if the epilogue took no registers.
    """
    m, size, rank = p.rows * p.tokens, p.dtype.itemsize, rank_bucket(p.rank)
    base_flops, expand_flops = 2 * m * p.inner * p.outer, 2 * m * p.rank * p.outer
    base = size * (m * (p.inner + p.outer) + p.outer * (p.inner + p.bias))
    spared = size * m * (p.outer - p.written)
    update = size * (m * p.parts * p.rank + p.adapters * p.outer * p.rank)
    tile, block_m = linear_tile(p._replace(rank=0), gpu.arch), add_tile(p, gpu.arch).block_m
    work = fused_work(p, tile.block_m, tile.block_n, shrinks=0)
    fused = (Op("linear, expand", base - spared + update, base_flops + expand_flops, work, "triton"),)
    add = (
        Op("linear", base, base_flops, base_flops, "library"),
        Op(
            "expand",
            update + 2 * size * m * p.outer - spared,
            expand_flops,
            2 * _tokens(p, block_m) * rank * p.outer,
            "triton",
        ),
    )
    return min(fused, add, key=lambda ops: seconds(ops, gpu))


def fused_work(p: Problem, block_m: int, block_n: int, shrinks: int = 1) -> int:
    """What matrix units do in a GEMM with the expand inside: whole tiles, the shrink so many times in each of them."""
    rank, tiles = rank_bucket(p.rank), p.parts * cdiv(p.outer // p.parts, block_n)
    return 2 * _tokens(p, block_m) * tiles * (p.inner * (block_n + shrinks * rank) + rank * block_n)


def _tokens(p: Problem, block_m: int) -> int:
    return p.rows * cdiv(p.tokens, block_m) * block_m


def wide_folds(ops: Ops, gpu: Gpu) -> list[Fold]:
    """A rival that needs no new kernel: fewer shrinks, in tiles of WIDE columns."""
    return [Fold(kind, (x, *layer), (x, *(wide(op, gpu) for op in layer))) for kind, x, layer, _ in layers(ops)]


def wide(op: Op, gpu: Gpu) -> Op:
    """A fused launch in tiles of WIDE columns, where it is one, they still fill the chip and they pay."""
    p = op.problem
    if p is None or not is_fused(op):
        return op
    block_m = linear_tile(p, gpu.arch).block_m
    programs = _tokens(p, block_m) // block_m * p.parts * cdiv(p.outer // p.parts, WIDE)
    return replace(op, work=min(op.work, fused_work(p, block_m, WIDE))) if programs >= chip(gpu.arch).units else op


def dearer(op: Op, gpu: Gpu) -> Op:
    """A fused launch whose shrink takes the matrix units twice as long: 16 columns are few for one instruction."""
    if op.problem is None or not is_fused(op):
        return op
    tile = linear_tile(op.problem, gpu.arch)
    return replace(op, work=fused_work(op.problem, tile.block_m, tile.block_n, shrinks=2))


def geglu_folds(ops: Ops) -> list[Fold]:
    """What a GEGLU as one kernel spares, wherever it runs: gelu writes what mul reads."""
    found = [op for op in ops if op.name.startswith("geglu ")] + [geglu(p) for p, _ in gated_layers(ops)]
    return [Fold("GEGLU in one pass", (Op("gelu", 2 * op.bytes // 3), Op("mul", op.bytes)), (op,)) for op in found]


def geglu(p: Problem) -> Op:
    """The gate behind a layer as a kernel of its own."""
    return Op("geglu", 3 * p.dtype.itemsize * p.rows * p.tokens * p.outer // 2)


def lora_layers(ops: Ops) -> Iterator[tuple[Problem, tuple[Op, ...]]]:
    """Every multi-LoRA linear and its launches."""
    launches: list[Op] = []
    for op, after in itertools.zip_longest(ops, ops[1:]):
        if op.problem is None:
            launches = [op] if op.name == "linear" else []  # the library's base GEMM has no problem of its own
            continue
        launches.append(op)
        if after is None or after.problem is None or is_fused(after):
            yield op.problem, tuple(launches)
            launches = []


def gated_layers(ops: Ops) -> Iterator[tuple[Problem, tuple[Op, ...]]]:
    """Those of them that have their gate inside."""
    return ((p, launches) for p, launches in lora_layers(ops) if p.gated)


def gate_folds(ops: Ops, gpu: Gpu) -> list[Fold]:
    """What the gate inside a layer spares of the layer and a GEGLU in one pass behind it."""
    return [
        Fold("GEGLU in its layer", (*layer_kernels(p._replace(gated=False))(gpu.arch), geglu(p)), layer)
        for p, layer in gated_layers(ops)
    ]


def silu_folds(ops: Ops) -> list[Fold]:
    """What SiLU in its group norm spares of torch's two ops, each of which reads and writes what ours does."""
    return [
        Fold("SiLU in its group norm", (Op("native_group_norm", norm[-1].bytes), Op("silu", norm[-1].bytes)), norm)
        for _, norm in group_norms(ops)
    ]


def group_norms(ops: Ops) -> Iterator[tuple[Op | None, tuple[Op, ...]]]:
    """Every group norm with SiLU, one launch or two, and the launch before it."""
    for before, op, after in zip((None, *ops), ops, (*ops[1:], None), strict=False):
        if op.name.startswith(f"{NORM} moments") and after is not None:
            yield before, (op, after)
        elif op.name.startswith(NORM) and not op.name.startswith(f"{NORM} apply"):
            yield before, (op,)


def concat_folds(ops: Ops) -> list[Fold]:
    """Every concat with a group norm behind it; in a step of reuse the first is that of the cached feature.

    A norm in one launch reads x a second time, out of a cache or not; it is counted as if not.
    """
    found = []
    for before, norm in group_norms(ops):
        if before is not None and (before.name == "cat" or before.name.startswith("concat_channels")):
            *first, last = norm if len(norm) > 1 else (Op("statistics", norm[0].bytes // 2), *norm)
            found.append(Fold("statistics in the concat", (before, *first, last), (before, last)))
    return found


def table(model: str, gpu: Gpu) -> Iterator[str]:
    """What is launched now and what would be, per LoRA targets, step and kind of layer."""
    yield f"Predicted for {MODELS[model].title}, fp16, {ADAPTERS} LoRAs of rank {RANK}, {gpu.name}."
    yield f"Steps: the two of an interval of {INTERVAL}, and their sum. TFLOP: what matrix units do, in whole tiles."
    yield ""
    names = ("LoRA on", "step", "what", "times", "launches", "GB", "TFLOP", "predicted ms", "saved, of the step")
    yield from header(*names)
    for title, targets in TARGETS.items():
        steps = MetaPipe(model, ADAPTERS, RANK, targets).steps("cmlora, mean", ADAPTERS)
        reuse, refresh = (step.trace.ops(gpu.arch) for step in steps)
        both, heavy = reuse + refresh, [dearer(op, gpu) for op in reuse + refresh]
        for step, ops in (("reuse", reuse), ("refresh", refresh)):
            folds = shrink_folds(ops, gpu)
            for kind in dict.fromkeys(fold.kind for fold in folds):
                yield _sums((title, step, kind), [fold for fold in folds if fold.kind == kind], ops, gpu)
        for what, folds, ops in (
            ("shrink folded", shrink_folds(both, gpu), both),
            ("the same, a tile's shrink at twice its work", shrink_folds(heavy, gpu), heavy),
            (f"nothing folded, tiles of {WIDE} columns", wide_folds(both, gpu), both),
        ):
            yield _sums((title, "both", what), folds, ops, gpu)
        yield _sums((title, "both", "GEGLU in one pass, done"), geglu_folds(both), both, gpu)
        if folds := gate_folds(both, gpu):
            yield _sums((title, "both", "GEGLU in its layer, done"), folds, both, gpu)
        yield _sums((title, "both", "SiLU in its group norm, done"), silu_folds(both), both, gpu)
    yield _sums(("any", "reuse", "statistics in the cached feature's concat"), concat_folds(reuse)[:1], reuse, gpu)
    yield _sums(("any", "both", "statistics in every concat"), concat_folds(both), both, gpu)


def saved(folds: Sequence[Fold], ops: Ops, gpu: Gpu) -> float:
    """The share of the time of `ops` that some folds of them spare."""
    spared = sum(seconds(fold.now, gpu) - seconds(fold.then, gpu) for fold in folds)
    return spared / seconds(ops, gpu)


def _sums(titles: Sequence[str], folds: Sequence[Fold], ops: Ops, gpu: Gpu) -> str:
    now, then = [op for fold in folds for op in fold.now], [op for fold in folds for op in fold.then]

    def pair(digits: int, value: Callable[[Ops], float]) -> str:
        return f"{value(now):.{digits}f} -> {value(then):.{digits}f}"

    return row(
        *titles,
        len(folds),
        pair(0, len),
        pair(2, lambda side: sum(op.bytes for op in side) / 1e9),
        pair(2, lambda side: sum(op.work for op in side) / 1e12),
        pair(2, lambda side: seconds(side, gpu) * 1e3),
        f"{saved(folds, ops, gpu):.1%}",
    )
