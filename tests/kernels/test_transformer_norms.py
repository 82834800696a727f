"""The norms of transformers' blocks against float64: not worse than the definition in the same precision."""

import pytest
import torch

from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import modulated_norm, rotary_norm
from tests.kernels.test_combine_noise import assert_as_good_as_the_definition

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
ROWS = [(1, 1), (4, 2), (2, 6)]  # of x and of what meets it: the fewer repeat
EPS = 1e-6


def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + mean).to(DEVICE, dtype)


def repeated(x: torch.Tensor, rows: int) -> torch.Tensor:
    return x.double().repeat(rows // x.shape[0], *[1] * (x.ndim - 1))


def modulated_float64(x, shift, scale):
    rows = max(x.shape[0], shift.shape[0])
    x, shift, scale = (repeated(t, rows) for t in (x, shift, scale))
    deviation = x - x.mean(-1, keepdim=True)
    return deviation / (deviation.square().mean(-1, keepdim=True) + EPS).sqrt() * (1 + scale) + shift


def rotary_float64(parts, turns):
    """`parts`: (x, weight), in the order of their tokens; pairs turned one number at a time, as diffusers does."""
    rows = max(x.shape[0] for x, _ in parts)
    normed = [x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * w.double() for x, w in parts]
    x = torch.cat([repeated(n, rows) for n in normed], 1)
    cos, sin = turns.double().repeat_interleave(2, 1).unbind(-1)
    other = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos[:, None] + other * sin[:, None]


def angles(tokens: int, width: int) -> torch.Tensor:
    angle = normal(tokens, width // 2) * 3
    return torch.stack((angle.cos(), angle.sin()), -1)


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 48), (1, 130)], ids=str)
def test_modulated_norm_is_as_exact_as_its_definition(shape, dtype, rows) -> None:
    x = normal(rows[0], *shape, dtype=dtype, mean=1.5)
    shift, scale, _ = normal(rows[1], 3, shape[1], dtype=dtype).chunk(3, 1)
    definition = modulated_norm(x, shift, scale, EPS, backend="torch")
    got = modulated_norm(x, shift, scale, EPS, backend="triton")
    assert_as_good_as_the_definition(got, definition, modulated_float64(x, shift, scale))


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 3, 24), (33, 2, 16)], ids=str)
def test_rotary_norm_is_as_exact_as_its_definition(shape, dtype, rows) -> None:
    tokens, heads, width = shape
    x, before = normal(rows[0], *shape, dtype=dtype), normal(rows[1], 5, heads, width, dtype=dtype)
    weight, other = normal(2, width, dtype=dtype)
    turns = angles(tokens + 5, width)
    for parts in ([(x, weight)], [(before, other), (x, weight)], [(x, weight.float())]):
        weight = parts[-1][1]
        given = (x, weight, turns[: tokens + 5 * (len(parts) - 1)], EPS, *(parts[0] if len(parts) > 1 else ()))
        definition, got = (rotary_norm(*given, backend=backend) for backend in ("torch", "triton"))
        assert_as_good_as_the_definition(got, definition, rotary_float64(parts, given[2]))


def test_rows_of_a_longer_sequence_and_strided_ones_are_read_where_they_lie() -> None:
    x, shift = normal(2, 12, 40), normal(2, 1, 40)
    for part in (x[:, 3:9], x[..., ::2], x.transpose(0, 1)[:2]):
        width = part.shape[2]
        given = (part, shift[..., :width], shift[..., :width], EPS)
        want = modulated_norm(*given, backend="torch")
        assert torch.allclose(modulated_norm(*given, backend="triton"), want, atol=1e-5)
    heads, turns, weight = x.view(2, 12, 4, 10), angles(6, 10), normal(10)
    for part in (heads[:, 3:9], heads.transpose(1, 2).contiguous().transpose(1, 2)[:, :6]):
        want = rotary_norm(part.contiguous(), weight, turns, EPS, backend="torch")
        assert torch.allclose(rotary_norm(part, weight, turns, EPS, backend="triton"), want, atol=1e-5)


def test_no_rows_and_no_tokens_are_no_work() -> None:
    for backend in ("torch", "triton"):
        assert modulated_norm(normal(0, 3, 8), normal(0, 1, 8), normal(0, 1, 8), EPS, backend).shape == (0, 3, 8)
        x, weight = normal(2, 3, 1, 8), normal(8)
        got = rotary_norm(x, weight, angles(3, 8), EPS, normal(2, 0, 1, 8), weight, backend)
        assert torch.allclose(got, rotary_norm(x, weight, angles(3, 8), EPS, backend="torch"), atol=1e-6)


def test_ops_hold_torchs_contract() -> None:
    ops = torch.ops.cmlora_kernels
    x, shift, scale = normal(2, 3, 8), normal(4, 1, 8), normal(4, 1, 8)
    heads, weight = normal(2, 3, 2, 8), normal(8)
    for backend in ("torch", "triton"):
        torch.library.opcheck(ops.modulated_norm.default, (x, shift, scale, EPS, backend))
        torch.library.opcheck(ops.rotary_norm.default, (heads, weight, angles(3, 8), EPS, None, None, backend))
        both = (heads, weight, angles(5, 8), EPS, normal(1, 2, 2, 8), weight, backend)
        torch.library.opcheck(ops.rotary_norm.default, both)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, s: modulated_norm(x[0], s, s, EPS), r"x must be \[rows, tokens, width\]"),
        (lambda x, s: modulated_norm(x, s[..., :3], s, EPS), r"shift must be \[own rows, 1, 8\]"),
        (lambda x, s: modulated_norm(x, s, s.half(), EPS), "scale must be"),
        (lambda x, s: modulated_norm(x, s[:4], s[:4], EPS), "shift's rows must be"),
        (lambda x, s: rotary_norm(x, s[0, 0], angles(3, 8), EPS), r"x must be \[rows, tokens, heads, even width\]"),
        (lambda x, s: rotary_norm(x[:, :, None], s[0, 0, :4], angles(3, 8), EPS), r"weight must be \[8\]"),
        (lambda x, s: rotary_norm(x[:, :, None], s[0, 0], angles(4, 8), EPS), r"turns must be \[3, 4, 2\] float32"),
        (lambda x, s: rotary_norm(x[:, :, None], s[0, 0], angles(3, 8), EPS, x[:, :, None]), "given together"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(normal(6, 3, 8), normal(9, 1, 8))
