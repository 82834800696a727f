"""The gate of a feed-forward against float64: not worse than the definition in the same precision."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cmlora_kernels.multi_lora_gate as layer
from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import geglu, multi_lora_geglu
from cmlora_kernels.costs import Cost, costs
from cmlora_kernels.multi_lora_add import add_launches
from cmlora_kernels.multi_lora_linear import linear_launch
from cmlora_kernels.tiles import Problem
from tests.kernels.test_combine_noise import assert_as_good_as_the_definition
from tests.kernels.test_multi_lora import Case, expected, make

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(2, 16, 512), (3, 77, 1280), (5, 3, 2), (1, 1, 522), (9, 300)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (2 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)


def geglu_float64(x: torch.Tensor) -> torch.Tensor:
    value, gate = x.double().chunk(2, -1)
    return value * gate * torch.special.ndtr(gate)  # gelu(x) = x P(X <= x), arXiv 1606.08415


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_geglu_is_as_exact_as_its_definition(shape, dtype) -> None:
    x = normal(*shape, dtype=dtype)
    definition = geglu(x, backend="torch")
    assert torch.equal(definition, x[..., : shape[-1] // 2] * F.gelu(x[..., shape[-1] // 2 :]))
    assert_as_good_as_the_definition(geglu(x, backend="triton"), definition, geglu_float64(x))


LAYERS = {
    "aligned": (3, 64, 64, 256, 16),
    "nothing_divides": (2, 33, 70, 90, 5),
    "one_token": (3, 1, 160, 64, 64),
    "ranks_in_two_chunks": (2, 20, 40, 32, 136),
    "one_column": (1, 1, 1, 2, 1),
}


def run_as(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of a strategy and nothing else, whatever the cost model says."""
    monkeypatch.setattr(layer, "choose", lambda *_: Cost(strategy, 0.0, 0, 0, 0))
    monkeypatch.setattr(layer, "linear_definition", None)


def exact_layer(c: Case) -> np.ndarray:
    return geglu_float64(torch.from_numpy(expected(c))).numpy()


def assert_as_good_behind_the_gate(got: torch.Tensor, definition: torch.Tensor, exact: np.ndarray) -> None:
    """Value and gate may each have the one rounding more that `assert_as_good` allows, their product a third."""
    assert got.dtype == definition.dtype
    assert got.shape == definition.shape == exact.shape
    error, allowed = (np.abs(t.double().cpu().numpy() - exact).max() for t in (got, definition))
    assert error <= allowed + 3 * torch.finfo(got.dtype).eps / 2 * np.abs(exact).max()


@pytest.mark.parametrize("strategy", ["fused", "add"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_the_gate_inside_the_layer(shape, dtype, strategy, monkeypatch) -> None:
    """In bfloat16 the interpreter's tl.dot misreads numbers: the definition runs."""
    c = make(*shape, dtype=dtype)
    definition = multi_lora_geglu(*c, backend="torch")
    run_as(strategy, monkeypatch)
    assert_as_good_behind_the_gate(multi_lora_geglu(*c, backend="triton"), definition, exact_layer(c))


@pytest.mark.parametrize("strategy", ["fused", "add"])
@pytest.mark.parametrize("rank", [8, 136])
def test_token_weights_strides_and_no_bias(rank, strategy, monkeypatch) -> None:
    c = make(3, 21, 48, 40, rank)._replace(bias=None)
    wide = c._replace(x=torch.cat([c.x, c.x], 2)[..., :48], a=c.a.transpose(1, 2).contiguous().transpose(1, 2))
    weights = torch.rand(3, 4, 21, device=DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    groups = torch.arange(2 * rank, dtype=torch.int32, device=DEVICE).view(2, rank) % 5 - 1
    routed = {"token_weights": weights, "groups": groups}
    want = multi_lora_geglu(*(t if t is None or not t.is_floating_point() else t.double() for t in c[:6]),
        c.scales, backend="torch", **routed)  # fmt: skip
    definition = multi_lora_geglu(*c, backend="torch", **routed)
    run_as(strategy, monkeypatch)
    assert_as_good_behind_the_gate(multi_lora_geglu(*wide, backend="triton", **routed), definition, want.cpu().numpy())


@pytest.mark.parametrize("strategy", ["fused", "add"])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_base_rows_pass_the_gate_and_never_read_an_adapter(strategy, monkeypatch) -> None:
    run_as(strategy, monkeypatch)
    c = make(3, 20, 48, 40, 8)
    clean, base_rows = multi_lora_geglu(*c, backend="triton"), c.slots < 0
    c.a.fill_(float("inf"))
    c.b.fill_(float("nan"))
    assert torch.equal(multi_lora_geglu(*c, backend="triton")[base_rows], clean[base_rows])


@pytest.mark.parametrize("rank", [16, 200])
def test_half_of_the_answer_is_not_written(rank) -> None:
    p = Problem(10, 256, 320, 2560, rank, 1, 5, torch.float16, True)
    spared = 2 * 2560 * 1280
    plain, behind = ({cost.strategy: cost for cost in costs(q, "sm_90")} for q in (p, p._replace(gated=True)))
    for strategy in ("fused", "add"):
        assert plain[strategy].bytes - behind[strategy].bytes == spared
        assert (plain[strategy].launches, plain[strategy].flops) == (behind[strategy].launches, behind[strategy].flops)
        launches = layer.gated_launches(p._replace(gated=True), "sm_90", strategy == "fused")
        without = [launch for _, launch in add_launches(p, "sm_90")]
        without[0] = linear_launch(p, "sm_90") if strategy == "fused" else without[0]
        assert sum(x.unique_bytes for x in without) - sum(x.unique_bytes for _, x in launches) == spared
        assert sum(x.flops for x in without) == sum(x.flops for _, x in launches)


def test_what_no_kernel_serves_runs_as_its_definition() -> None:
    for c in (make(2, 4, 16, 16, 4, dtype=torch.float64), make(2, 0, 16, 16, 4), make(0, 8, 16, 16, 4)):
        assert torch.equal(multi_lora_geglu(*c, backend="triton"), multi_lora_geglu(*c, backend="torch"))


def test_strided_and_empty_tensors() -> None:
    x = normal(4, 6, 40)
    for part in (x[:, 1:4], x[..., ::2], x.transpose(0, 1), x[:0], x[..., :0]):
        got = geglu(part, backend="triton")
        assert got.shape == (*part.shape[:-1], part.shape[-1] // 2)
        assert torch.allclose(got, geglu(part, backend="torch"), atol=1e-6)


def test_op_holds_torchs_contract() -> None:
    for backend in ("torch", "triton"):
        torch.library.opcheck(torch.ops.cmlora_kernels.geglu.default, (normal(2, 3, 8), backend))
        given = (*make(2, 4, 16, 16, 4), backend)
        torch.library.opcheck(torch.ops.cmlora_kernels.multi_lora_geglu.default, given)


def test_errors_name_the_argument() -> None:
    for x in (normal(2, 3), normal(2, 4).long(), normal(1)[0]):
        with pytest.raises(ValueError, match=r"x must be \[..., 2 \* width\]"):
            geglu(x)
    c = make(2, 4, 16, 15, 4)
    with pytest.raises(ValueError, match=r"weight must be \[2 \* width, in\]"):
        multi_lora_geglu(*c)
    with pytest.raises(ValueError, match="scales must be"):
        multi_lora_geglu(*make(2, 4, 16, 16, 4, parts=2))
    with pytest.raises(ValueError, match="slots must be int64"):
        multi_lora_geglu(*c._replace(slots=c.slots.int()))
