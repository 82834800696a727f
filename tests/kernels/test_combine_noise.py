"""The combination of noise predictions against float64: not worse than the definition in the same precision."""

import pytest
import torch

from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import combine_noise

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(4, 16, 16), (3, 7, 9), (1, 1, 2), (4, 65, 33)]


def predictions(
    adapters: int, rows: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, mean: float = 0.0
):
    generator = torch.Generator().manual_seed(adapters + rows)
    noise = torch.randn(adapters * rows, *shape, generator=generator) + mean
    return noise.to(DEVICE, dtype), torch.rand(adapters, rows, generator=generator).to(DEVICE)


def combine_float64(noise: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    stacked = noise.double().reshape(*coefficients.shape, *noise.shape[1:])
    return (stacked * coefficients.double().view(*coefficients.shape, 1, 1, 1)).sum(0)


def assert_as_good_as_the_definition(got: torch.Tensor, definition: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == definition.dtype
    rounding = torch.finfo(got.dtype).eps * want.abs().max()
    assert (got - want).abs().max() <= (definition - want).abs().max() + rounding


@pytest.mark.parametrize("adapters", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_combination_is_as_exact_as_its_definition(shape, dtype, adapters) -> None:
    noise, coefficients = predictions(adapters, 2, shape, dtype)
    want = combine_float64(noise, coefficients)
    definition = combine_noise(noise, coefficients, backend="torch")
    assert_as_good_as_the_definition(combine_noise(noise, coefficients, backend="triton"), definition, want)


def test_channels_last_and_strided_noise_keep_their_values() -> None:
    noise, coefficients = predictions(3, 2, (4, 9, 9))
    want = combine_noise(noise, coefficients, backend="triton")
    last = combine_noise(noise.contiguous(memory_format=torch.channels_last), coefficients, backend="triton")
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, want)
    strided = torch.stack((noise, noise), -1)[..., 0]
    assert torch.equal(combine_noise(strided, coefficients, backend="triton"), want)


def test_rows_do_not_influence_one_another() -> None:
    noise, coefficients = predictions(2, 3, (4, 8, 8))
    want = combine_noise(noise, coefficients, backend="triton")
    noise.view(2, 3, 4, 8, 8)[1, 1] = float("nan")
    got = combine_noise(noise, coefficients, backend="triton")
    assert torch.equal(got[[0, 2]], want[[0, 2]])
    assert got[1].isnan().all()


def test_ops_hold_torchs_contract() -> None:
    noise, coefficients = predictions(2, 2, (4, 5, 5))
    for backend in ("torch", "triton"):
        torch.library.opcheck(torch.ops.cmlora_kernels.combine_noise.default, (noise, coefficients, backend))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda n, c: combine_noise(n, c[:, :1]), r"adapters \* rows = 6, got \(2, 1\)"),
        (lambda n, c: combine_noise(n, c.half()), "coefficients must be float32"),
        (lambda n, c: combine_noise(n[:, 0, 0, 0], c), "noise must be"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(*predictions(2, 3, (4, 5, 5)))
