"""The multi-LoRA kernels against float64: their error may not exceed the torch definition's plus one rounding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cmlora_kernels.multi_lora as ops
from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import (
    merge_weights,
    merged_bank,
    merged_linear,
    multi_lora_add_,
    multi_lora_conv2d,
    multi_lora_conv2d_add_,
    multi_lora_linear,
)
from cmlora_kernels.costs import Cost, choose, costs, without_memory
from cmlora_kernels.merged_bank import merged_definition
from cmlora_kernels.multi_lora_add import triton_add
from cmlora_kernels.multi_lora_linear import fused_linear
from cmlora_kernels.tiles import Problem

DTYPES = [torch.float32, torch.float16]  # bfloat16 is run by its definition: the interpreter's tl.dot misreads it


class Case(NamedTuple):
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    slots: Tensor
    a: Tensor
    b: Tensor
    scales: Tensor


def make(
    rows: int,
    tokens: int,
    inner: int,
    outer: int,
    rank: int,
    parts: int = 1,
    adapters: int = 2,
    dtype: torch.dtype = DTYPES[0],
) -> Case:
    """Inputs of unit variance all the way, so that an absolute error means something; slots hold -1 too."""
    g = torch.Generator().manual_seed(rows + tokens + inner + outer + rank)

    def normal(*shape: int, fan: int = 1) -> Tensor:
        return (torch.randn(shape, generator=g) / fan**0.5).to(DEVICE, dtype)

    slots = torch.arange(rows, device=DEVICE) % (adapters + 1) - 1
    a, b = normal(adapters, parts * rank, inner, fan=inner), normal(adapters, outer, rank, fan=rank)
    scales = torch.rand(adapters, parts, generator=g).to(DEVICE) + 0.5
    return Case(normal(rows, tokens, inner), normal(outer, inner, fan=inner), normal(outer), slots, a, b, scales)


def expected(c: Case, y: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """y + update (or the base layer + update) in NumPy float64, a row and a part at a time."""
    x, a, b, scales = (t.double().cpu().numpy() for t in (c.x, c.a, c.b, c.scales))
    if y is None:
        y = x @ c.weight.double().cpu().numpy().T + (0 if c.bias is None else c.bias.double().cpu().numpy())
    rank, width = b.shape[2], b.shape[1] // scales.shape[1]
    for row, slot in enumerate(c.slots.tolist()):
        for part in range(scales.shape[1] if slot >= 0 else 0):
            columns, ranks = slice(part * width, (part + 1) * width), slice(part * rank, (part + 1) * rank)
            y[row, :, columns] += scales[slot, part] * (x[row] @ a[slot, ranks].T) @ b[slot, columns].T
    return y


def assert_as_good(got: Tensor, definition: Tensor, exact: np.ndarray[Any, Any]) -> None:
    """Largest error at most the definition's, plus half a unit in the last place of the largest value."""
    assert got.dtype == definition.dtype
    assert got.shape == definition.shape == exact.shape
    error, allowed = (np.abs(t.double().cpu().numpy() - exact).max() for t in (got, definition))
    assert error <= allowed + torch.finfo(got.dtype).eps / 2 * np.abs(exact).max()  # NaN compares false


def poisoned(c: Case) -> Tensor:
    return c.x.new_full((*c.x.shape[:2], c.weight.shape[0]), float("nan"))


SHAPES = {
    "square_aligned": (3, 128, 128, 128, 16),
    "prompt_77_tokens": (3, 77, 96, 80, 16),
    "nothing_divides": (2, 33, 70, 45, 5),
    "qkv_stacked": (3, 40, 64, 120, 8, 3),
    "one_token": (3, 1, 160, 320, 64),
    "size_one_everywhere": (1, 1, 1, 1, 1),
    "rank_128": (2, 20, 130, 64, 128),
    "rank_33_padded": (2, 70, 64, 33, 33),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_base_gemm_with_update_inside(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    c = make(*shape, dtype=dtype)
    assert_as_good(fused_linear(*c, poisoned(c)), ops.linear_definition(*c), expected(c))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_update_added_in_place(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    c = make(*shape, dtype=dtype)
    base = F.linear(c.x, c.weight)
    got, definition, exact = base.clone(), base.clone(), expected(c, base.double().cpu().numpy())
    triton_add(got, c.x, c.slots, c.a, c.b, c.scales)
    ops.add_definition(definition, c.x, c.slots, c.a, c.b, c.scales)
    assert_as_good(got, definition, exact)
    base_rows = c.slots < 0
    assert torch.equal(got[base_rows], base[base_rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES["prompt_77_tokens"], SHAPES["nothing_divides"]], ids=str)
def test_merged_bank(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    c = make(*shape, dtype=dtype)
    bank = merge_weights(c.weight, c.a, c.b, c.scales)
    weights = bank.double().cpu().numpy()[[slot if slot >= 0 else -1 for slot in c.slots.tolist()]]
    assert c.bias is not None
    exact = c.x.double().cpu().numpy() @ weights.swapaxes(1, 2) + c.bias.double().cpu().numpy()
    assert_as_good(
        merged_linear(c.x, bank, c.bias, c.slots, "triton"), merged_definition(c.x, bank, c.bias, c.slots), exact
    )
    rounding = torch.finfo(dtype).eps * np.abs(exact).max() * c.x.shape[2] ** 0.5
    assert np.abs(exact - expected(c)).max() <= rounding  # the bank's own: W + dW is rounded once


@pytest.mark.parametrize("small", [0, 2**24], ids=["one by one", "together"])
@pytest.mark.parametrize("slots", [[0, 0, 1, 1, 2, 2], [2, 2, -1, 0, 0, 0], [1] * 6], ids=str)
def test_merged_bank_on_the_cpu_by_neighbours_of_one_slot(slots: list[int], small: int, monkeypatch) -> None:
    monkeypatch.setattr(merged_bank, "SMALL", small)
    x, bank = torch.randn(6, 7, 20), torch.randn(4, 12, 20)
    for bias in (None, torch.randn(12)):
        got = merged_definition(x, bank, bias, torch.tensor(slots))
        exact = torch.einsum("rti,roi->rto", x.double(), bank.double()[slots]) + (0 if bias is None else bias.double())
        assert (got - exact).abs().max() <= 20**0.5 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("adapters", [1, 2, 3, 4, 5])
def test_mixed_ranks_are_zero_padded(adapters: int) -> None:
    c = make(adapters + 1, 24, 48, 32, 20, adapters=adapters)
    for slot in range(adapters):
        c.a[slot, 4 * slot + 3 :] = 0
    for unused in range(adapters):  # what B holds beyond its adapter's rank meets zeros
        c.b[unused, :, 4 * unused + 3 :] = 7
    assert_as_good(fused_linear(*c, poisoned(c)), ops.linear_definition(*c), expected(c))


@pytest.mark.parametrize("op", ["linear", "add"])
def test_strided_inputs(op: str) -> None:
    c = make(3, 40, 64, 48, 8)
    c = c._replace(
        x=c.x.transpose(1, 2).contiguous().transpose(1, 2),  # pixels innermost, as in NCHW
        weight=c.weight.t().contiguous().t(),
        bias=torch.stack([c.bias, c.bias], 1)[:, 0] if c.bias is not None else None,
        slots=torch.stack([c.slots, c.slots], 1)[:, 0],
        a=torch.cat([c.a, c.a], 1)[:, : c.a.shape[1]],
        b=c.b.transpose(1, 2).contiguous().transpose(1, 2),
    )
    if op == "linear":
        assert_as_good(fused_linear(*c, poisoned(c)), ops.linear_definition(*c), expected(c))
        return
    wide = c.x.new_zeros(3, 40, 96)
    triton_add(wide[:, :, :48], c.x, c.slots, c.a, c.b, c.scales)
    assert_as_good(
        wide[:, :, :48],
        ops.add_definition(wide.new_zeros(3, 40, 48), *c[:1], *c[3:]),
        expected(c, np.zeros((3, 40, 48))),
    )
    assert not wide[:, :, 48:].any()


def test_rows_do_not_influence_one_another() -> None:
    c = make(4, 33, 48, 40, 8)
    y = fused_linear(*c, poisoned(c))
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    shuffled = c._replace(x=c.x[order], slots=c.slots[order])
    assert torch.equal(fused_linear(*shuffled, poisoned(c)), y[order])
    c.x[1] = float("nan")
    assert torch.equal(fused_linear(*c, poisoned(c))[[0, 2, 3]], y[[0, 2, 3]])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_base_rows_never_read_an_adapter() -> None:
    c = make(3, 20, 48, 40, 8)
    clean = fused_linear(*c, poisoned(c))
    c.a.fill_(float("inf"))
    c.b.fill_(float("nan"))
    base_rows = c.slots < 0
    assert torch.equal(fused_linear(*c, poisoned(c))[base_rows], clean[base_rows])


CONVS = {
    "resnet_3x3": ((32, 3, 3), (1, 1), (1, 1), (1, 1)),
    "downsample_3x3": ((32, 3, 3), (2, 2), (1, 1), (1, 1)),
    "asymmetric_dilated": ((20, 3, 1), (1, 2), (2, 0), (2, 1)),
    "projection_1x1": ((32, 1, 1), (1, 1), (0, 0), (1, 1)),
    "strided_1x1": ((32, 1, 1), (2, 2), (0, 0), (1, 1)),
}


def merged_convolution(c: Case, taps: tuple[int, ...], *geometry: tuple[int, int]) -> np.ndarray[Any, Any]:
    """Every row's convolution in float64, its update merged into the weights."""
    rows = []
    for x, slot in zip(c.x.double(), c.slots.tolist(), strict=True):
        update = c.scales[slot, 0].double() * (c.b[slot].double() @ c.a[slot].double()) if slot >= 0 else 0
        bias = None if c.bias is None else c.bias.double()
        rows.append(F.conv2d(x[None], (c.weight.double() + update).view(-1, *taps), bias, *geometry))
    return torch.cat(rows).cpu().numpy()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("taps", "stride", "padding", "dilation"), CONVS.values(), ids=CONVS)
def test_convolution_equals_one_with_merged_weights(
    taps: tuple[int, ...],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    fan = taps[0] * taps[1] * taps[2]
    c = make(3, 1, fan, 24, 6, dtype=dtype)
    x = torch.randn(3, taps[0], 9, 11, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    x = x.contiguous(memory_format=memory_format)
    weight, a = c.weight.view(24, *taps), c.a.view(2, 6, *taps)
    exact = merged_convolution(c._replace(x=x), taps, stride, padding, dilation)
    args = (x, weight, c.bias, c.slots, a, c.b, c.scales, stride, padding, dilation)
    got, definition = multi_lora_conv2d(*args, "triton"), multi_lora_conv2d(*args, "torch")
    assert got.stride() == definition.stride()
    assert_as_good(got, definition, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("taps", "stride", "padding", "dilation"), CONVS.values(), ids=CONVS)
def test_update_of_a_convolution_added_in_place(taps, stride, padding, dilation, dtype: torch.dtype) -> None:
    fan = taps[0] * taps[1] * taps[2]
    c = make(3, 1, fan, 24, 6, dtype=dtype)
    x = torch.randn(3, taps[0], 9, 11, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    a, geometry = c.a.view(2, 6, *taps), (stride, padding, dilation)
    base = F.conv2d(x, c.weight.view(24, *taps), None, *geometry)
    update = merged_convolution(c._replace(x=x, weight=torch.zeros_like(c.weight), bias=None), taps, *geometry)
    want = base.double().cpu().numpy() + update
    definition = multi_lora_conv2d_add_(base.clone(), x, c.slots, a, c.b, c.scales, *geometry, "torch")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        got = base.clone(memory_format=memory_format)
        assert multi_lora_conv2d_add_(got, x, c.slots, a, c.b, c.scales, *geometry, "triton") is got
        assert_as_good(got, definition, want)
        assert torch.equal(got[c.slots < 0], base[c.slots < 0])
    wide = torch.stack([base, torch.zeros_like(base)], 4).flatten(3)[..., ::2]  # no format is dense here
    multi_lora_conv2d_add_(wide, x, c.slots, a, c.b, c.scales, *geometry, "triton")
    assert_as_good(wide, definition, want)


@pytest.mark.parametrize("strategy", ["fused", "add"])
def test_triton_backend_does_not_fall_back(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever strategy the cost model picks, it is a kernel that answers, not a definition."""
    c = make(2, 16, 64, 64, 4)
    definition = ops.linear_definition(*c)
    monkeypatch.setattr(ops, "choose", lambda *_: Cost(strategy, 0.0, 0, 0, 0))
    monkeypatch.setattr(ops, "_route", ops._route.__wrapped__)
    monkeypatch.setattr(ops, "linear_definition", None)
    monkeypatch.setattr(ops, "add_definition", None)
    assert_as_good(multi_lora_linear(*c, "triton"), definition, expected(c))


@pytest.mark.parametrize("shape", [(0, 8, 16, 16, 4), (2, 0, 16, 16, 4)], ids=["no_rows", "no_tokens"])
def test_empty(shape: tuple[int, ...]) -> None:
    c = make(*shape)
    assert multi_lora_linear(*c, "triton").shape == (*shape[:2], 16)
    assert multi_lora_add_(c.x.new_zeros(*shape[:2], 16), c.x, *c[3:], "triton").shape == (*shape[:2], 16)


def test_what_no_kernel_serves_runs_as_its_definition() -> None:
    double, half = (make(2, 4, 16, 16, 4, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    assert torch.equal(multi_lora_linear(*double, "triton"), ops.linear_definition(*double))
    if DEVICE == "cpu":
        assert torch.equal(multi_lora_linear(*half, "triton"), ops.linear_definition(*half))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x must be"),
        ({"weight": torch.zeros(16, 16, dtype=torch.float16)}, "weight must be of x's dtype"),
        ({"bias": torch.zeros(16, dtype=torch.float64)}, "bias must be of x's dtype"),
        ({"a": torch.zeros(2, 4, 16, dtype=torch.bfloat16)}, "a must be of x's dtype"),
        ({"scales": torch.zeros(2, 1, dtype=torch.float16)}, "scales must be float32"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "slots must be int64"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "slots must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_argument_is_named(change: dict[str, Tensor], message: str) -> None:
    c = make(2, 4, 16, 16, 4)._replace(**{name: value.to(DEVICE) for name, value in change.items()})
    with pytest.raises(ValueError, match=message):
        multi_lora_linear(*c)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_registered_ops_pass_opcheck(backend: str) -> None:
    c = make(2, 4, 16, 16, 4)
    x, a = torch.randn(2, 16, 5, 5, device=DEVICE), c.a.view(2, 4, 16, 1, 1)
    conv = (x, c.weight.view(16, 16, 1, 1), c.bias, c.slots, a, c.b, c.scales, [1, 1], [0, 0], [1, 1], backend)
    bank = merge_weights(c.weight, c.a, c.b, c.scales)
    library = torch.ops.cmlora_kernels
    torch.library.opcheck(library.multi_lora_linear.default, (*c, backend))
    torch.library.opcheck(library.multi_lora_add_.default, (torch.zeros_like(c.x), c.x, *c[3:], backend))
    torch.library.opcheck(library.multi_lora_conv2d.default, conv)
    torch.library.opcheck(library.multi_lora_conv2d_add_.default, (torch.zeros_like(x), x, *conv[3:]))
    torch.library.opcheck(library.merged_linear.default, (c.x, bank, c.bias, c.slots, backend))


def test_compiles_without_a_graph_break() -> None:
    c = make(2, 4, 16, 16, 4)

    def layer(c: Case) -> Tensor:
        y = multi_lora_linear(*c).relu()
        return multi_lora_add_(y, c.x, *c[3:])

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(c), layer(c), rtol=0, atol=0)


def test_cost_model_keeps_narrow_layers_fused_and_wide_ones_with_cublas() -> None:
    def problem(tokens: int, inner: int, outer: int, rank: int = 16) -> Problem:
        return Problem(2, tokens, inner, outer, rank, 1, 1, torch.float16, True)

    def pick(tokens: int, inner: int, outer: int, rank: int = 16, budget: int = 0) -> str:
        return choose(problem(tokens, inner, outer, rank), "sm_90", budget).strategy

    assert [pick(4096, 640, 640), pick(1024, 1280, 1280)] == ["fused"] * 2
    wide = problem(1024, 1280, 10240)
    slow, fast = (without_memory(costs(wide, "sm_90", share)) for share in (0.65, 1.0))
    assert (slow[0].strategy, fast[0].strategy) == ("add", "fused"), "the best one hangs on a share nobody measured"
    assert slow[1].seconds / slow[0].seconds > fast[1].seconds / fast[0].seconds
    assert pick(1024, 1280, 10240) == "add", "what loses least if the share is not what was assumed"
    assert [pick(1024, 5120, 1280), pick(1024, 1280, 1280, rank=128)] == ["add"] * 2
    assert pick(1024, 1280, 1280, budget=2 * 1280 * 1280 * 2) == "merged"
    assert pick(1024, 1280, 1280, budget=2 * 1280 * 1280 * 2 - 1) == "fused"


def test_costs_count_bytes_flops_and_launches() -> None:
    p = Problem(2, 64, 32, 48, 4, 1, 1, torch.float16, False)
    counted = {cost.strategy: (cost.bytes, cost.flops, cost.launches, cost.memory) for cost in costs(p, "sm_90")}
    x, y, weight, lora = 128 * 32, 128 * 48, 32 * 48, 4 * 80
    assert counted == {
        "fused": (2 * (x + y + weight + lora), 2 * 128 * (32 * 48 + 4 * 80), 1, 0),
        "add": (2 * (2 * x + 3 * y + weight + lora), 2 * 128 * (32 * 48 + 4 * 80), 2, 0),
        "merged": (2 * (x + y + weight), 2 * 128 * 32 * 48, 1, 2 * 2 * weight),
    }
