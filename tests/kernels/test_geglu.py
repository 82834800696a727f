"""The gate of a feed-forward against float64: not worse than the definition in the same precision."""

import pytest
import torch
from torch.nn import functional as F

from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import geglu
from tests.kernels.test_combine_noise import assert_as_good_as_the_definition

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


def test_strided_and_empty_tensors() -> None:
    x = normal(4, 6, 40)
    for part in (x[:, 1:4], x[..., ::2], x.transpose(0, 1), x[:0], x[..., :0]):
        got = geglu(part, backend="triton")
        assert got.shape == (*part.shape[:-1], part.shape[-1] // 2)
        assert torch.allclose(got, geglu(part, backend="torch"), atol=1e-6)


def test_op_holds_torchs_contract() -> None:
    for backend in ("torch", "triton"):
        torch.library.opcheck(torch.ops.cmlora_kernels.geglu.default, (normal(2, 3, 8), backend))


def test_errors_name_the_argument() -> None:
    for x in (normal(2, 3), normal(2, 4).long(), normal(1)[0]):
        with pytest.raises(ValueError, match=r"x must be \[..., 2 \* width\]"):
            geglu(x)
