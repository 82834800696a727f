"""Group norm and SiLU against float64: not worse than the definition in the same precision."""

import pytest
import torch
from torch.nn import functional as F

import cmlora_kernels.group_norm as kernel
from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import group_norm_silu
from cmlora_kernels.chips import TARGETS
from cmlora_kernels.group_norm import Images, group_norm_launches, tile_of
from tests.kernels.test_combine_noise import assert_as_good_as_the_definition

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
EPS = 1e-6
SHAPES = {  # shape of x, groups
    "whole_blocks": ((2, 64, 8, 8), 8),
    "nothing_divides": ((3, 30, 7, 5), 6),
    "groups_of_10": ((1, 320, 9, 8), 32),
    "one_group": ((2, 7, 3, 11), 1),
    "a_channel_a_group": ((1, 6, 4, 9), 6),
    "one_place": ((2, 12, 1, 1), 3),
}


def make(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: torch.memory_format = LAYOUTS[0], mean=0.5
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with another mean and spread in every channel, weight and bias."""
    g = torch.Generator().manual_seed(sum(shape))
    spread, shift, weight, bias = torch.randn(4, shape[1], generator=g)
    x = torch.randn(shape, generator=g) * (1 + spread.abs())[:, None, None] + mean * (1 + shift.abs())[:, None, None]
    x, weight, bias = (t.to(DEVICE, dtype) for t in (x, weight, bias))
    return x.contiguous(memory_format=layout), weight, bias


def float64(x, groups, weight, bias) -> torch.Tensor:
    grouped = x.double().reshape(x.shape[0], groups, -1)
    apart = grouped - grouped.mean(-1, keepdim=True)
    normed = (apart / (apart.square().mean(-1, keepdim=True) + EPS).sqrt()).view(x.shape)
    y = normed * weight.double()[:, None, None] + bias.double()[:, None, None]
    return y * torch.sigmoid(y)


@pytest.fixture(params=[1, 3], ids=["one_launch", "slices"])
def slices(request, monkeypatch) -> int:
    """Blocks so small that every program has several, in one launch or in slices of them."""
    kernel.tile_of.cache_clear()
    kernel.group_norm_launches.cache_clear()
    monkeypatch.setattr(kernel, "BLOCK_BYTES", 512)
    monkeypatch.setattr(kernel, "_slices", lambda p, programs, blocks, arch: min(request.param, blocks))
    yield request.param
    kernel.tile_of.cache_clear()
    kernel.group_norm_launches.cache_clear()


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_group_norm_silu_is_as_exact_as_its_definition(shape, dtype, layout, slices) -> None:
    size, groups = shape
    x, weight, bias = make(size, dtype, layout)
    definition = group_norm_silu(x, groups, weight, bias, EPS, backend="torch")
    assert torch.equal(definition, F.silu(F.group_norm(x, groups, weight, bias, EPS)))
    got = group_norm_silu(x, groups, weight, bias, EPS, backend="triton")
    assert got.stride() == definition.stride()
    assert_as_good_as_the_definition(got, definition, float64(x, groups, weight, bias))


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
def test_a_large_mean_does_not_cancel(layout, slices) -> None:
    """Squares of numbers around 4096 have no digits left in float32 for a deviation of 1."""
    x, weight, bias = make((2, 20, 16, 9), layout=layout, mean=4096)
    definition = group_norm_silu(x, 4, weight, bias, EPS, backend="torch")
    assert_as_good_as_the_definition(
        group_norm_silu(x, 4, weight, bias, EPS, backend="triton"), definition, float64(x, 4, weight, bias)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_group(layout, wrong, slices) -> None:
    x, weight, bias = make((2, 20, 8, 9), layout=layout)
    clean = group_norm_silu(x, 10, weight, bias, EPS, backend="triton")
    x[1, 5, 3, 4] = wrong
    got, same = group_norm_silu(x, 10, weight, bias, EPS, backend="triton"), torch.ones(2, 20, dtype=torch.bool)
    same[1, 4:6] = False
    assert got[1, 4:6].isnan().all()
    assert torch.equal(got[same], clean[same])


def test_strided_empty_and_foreign_tensors() -> None:
    x, weight, bias = make((4, 16, 6, 10))
    for part in (x[:, :, 1:4], x[..., ::2], x.transpose(2, 3), x[:0], x[1:], x.flatten(2), x.double()):
        given = (weight.to(part.dtype), bias.to(part.dtype), EPS)
        got = group_norm_silu(part, 4, *given, backend="triton")
        assert torch.allclose(got, F.silu(F.group_norm(part, 4, *given)), atol=1e-5)


@pytest.mark.parametrize("arch", [*TARGETS, "sm_90/132/NVIDIA H200", "sm_89/58/NVIDIA L4"])
@pytest.mark.parametrize("last", [False, True])
def test_tiles_of_unets_are_whole_sectors_that_fill_no_more_than_a_block(arch, last) -> None:
    for rows, channels, side, dtype in ((10, 320, 128, 2), (2, 960, 64, 2), (1, 320, 128, 4), (2, 2560, 8, 2)):
        p = Images(rows, channels, side * side, 32, last, torch.float16 if dtype == 2 else torch.float32)
        tile = tile_of(p, arch)
        taken = tile.groups * p.width
        assert taken <= tile.channels or not last
        assert tile.channels * tile.places * dtype <= kernel.BLOCK_BYTES
        assert not taken * dtype % 32 or not last
        launches = group_norm_launches(p, p.dtype, EPS, arch)
        assert len(launches) == (1 if tile.slices == 1 else 2)
        elements = (2 if len(launches) == 1 else 3) * p.bytes
        assert sum(launch.unique_bytes for launch in launches) == pytest.approx(elements, rel=0.02)


def test_few_programs_of_a_large_image_are_cut_into_slices() -> None:
    """One row of SDXL's first level leaves most of an H100's bus idle; ten rows do not, nor do small cards."""
    ten = Images(10, 320, 128 * 128, 32, False, torch.float16)
    assert tile_of(ten, "sm_90").slices == 1
    assert tile_of(ten._replace(rows=1), "sm_90").slices > 1
    assert tile_of(ten._replace(rows=1), "sm_86").slices == 1
    assert tile_of(ten._replace(rows=1, places=64), "sm_90").slices == 1, "a launch is longer than what is saved"


def test_op_holds_torchs_contract() -> None:
    for backend in ("torch", "triton"):
        for layout in LAYOUTS:
            x, weight, bias = make((2, 8, 3, 5), layout=layout)
            op = torch.ops.cmlora_kernels.group_norm_silu.default
            torch.library.opcheck(op, (x, 4, weight, bias, EPS, backend))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, w: group_norm_silu(x[0, 0, 0], 2, w, w), r"x must be \[rows, channels, \.\.\.\]"),
        (lambda x, w: group_norm_silu(x.long(), 2, w, w), "x must be"),
        (lambda x, w: group_norm_silu(x, 3, w, w), "groups must divide 8 channels, got 3"),
        (lambda x, w: group_norm_silu(x, 0, w, w), "groups must divide"),
        (lambda x, w: group_norm_silu(x, 2, w[1:], w), r"weight must be \[8\]"),
        (lambda x, w: group_norm_silu(x, 2, w, w.half()), "bias must be"),
        (lambda x, w: group_norm_silu(x, 2, w, w, backend="cuda"), "backend must be"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    x, weight, _ = make((2, 8, 3, 5))
    with pytest.raises(ValueError, match=named):
        call(x, weight)
