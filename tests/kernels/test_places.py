"""Masks from predictions, and what is combined with them, against float64: not worse than the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cmlora_kernels.places as places
from cmlora_kernels import combine_local, combine_noise, combine_regions, place_masks, place_strength
from tests.kernels.test_combine_noise import DEVICE, DTYPES, assert_as_good_as_the_definition

SIZES = {
    "aligned": (4, 16, 16),
    "ragged": (3, 7, 9),
    "one_place": (1, 1, 1),
    "packed": (16, 9, 33),
    "wide": (4, 5, 270),
}
BACKENDS = ("torch", "triton")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def index(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def masks_float64(strength: Tensor, temperature: float, blur: int, own: bool) -> Tensor:
    """Design: the box mean with replicated edges, softmax over its ratio to the mean, the strongest made 1."""
    m = np.pad(strength.double().cpu().numpy(), [(0, 0), (0, 0), (blur // 2,) * 2, (blur // 2,) * 2], mode="edge")
    b = np.lib.stride_tricks.sliding_window_view(m, (blur, blur), axis=(2, 3)).mean((4, 5))
    mean = b.mean((2, 3) if own else (0, 2, 3), keepdims=True)
    s = torch.from_numpy(np.divide(b, mean, out=np.zeros_like(b), where=mean != 0))
    soft = torch.softmax(s / temperature, 0)
    return (soft / soft.amax(0)).to(strength.device)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_strength_is_the_distance_from_each_adapters_own_base(size, dtype: torch.dtype, guided: bool) -> None:
    images, first = 2, 2 if guided else 0
    noise = normal(5 * (images + first), *size, dtype=dtype)
    adapters, bases = index(1, 2, 4), index(0, 0, 3)  # the third has a prompt of its own, and so a base of its own
    e = noise.double().view(5, images + first, *size)[:, first:]
    want = (e[adapters] - e[bases]).square().sum(2).sqrt()
    previous = uniform(3, images, *size[1:])
    for kept, expected in ((None, want), (previous, 0.7 * previous.double() + 0.3 * want)):
        got, definition = (place_strength(noise, adapters, bases, first, images, kept, backend=b) for b in BACKENDS)
        assert_as_good_as_the_definition(got, definition, expected)


@pytest.mark.parametrize(("adapters", "blur", "own"), [(1, 3, True), (3, 1, False), (3, 5, True), (16, 3, False)])
@pytest.mark.parametrize("size", [(16, 16), (7, 9), (1, 1), (5, 270)], ids=str)
def test_masks_are_the_designs(size: tuple[int, int], adapters: int, blur: int, own: bool) -> None:
    strength = uniform(adapters, 2, *size) * (1 + torch.arange(adapters, device=DEVICE).view(-1, 1, 1, 1))
    got, definition = (place_masks(strength, 0.3, blur, own, backend=b) for b in BACKENDS)
    want = masks_float64(strength, 0.3, blur, own)
    exponent = 1 - 0.3 * want.log().amin()  # the largest s, at most: exp makes its rounding one of this size
    rounding = torch.finfo(torch.float32).eps * exponent / 0.3
    assert (got - want).abs().max() <= (definition - want).abs().max() + rounding
    assert torch.equal(got.amax(0), torch.ones_like(got[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_that_changes_nothing_is_the_weakest_and_no_nan(backend: str) -> None:
    strength = uniform(3, 2, 8, 8) + 0.1
    strength[1] = 0
    for own in (True, False):
        mu = place_masks(strength, 0.5, own=own, backend=backend)
        torch.testing.assert_close(mu.double(), masks_float64(strength, 0.5, 3, own), rtol=1e-5, atol=1e-6)
        assert (mu[1] == mu.amin(0)).all()
    assert torch.equal(place_masks(torch.zeros_like(strength), 0.5, backend=backend), torch.ones_like(strength))


@pytest.mark.parametrize("backend", BACKENDS)
def test_images_have_masks_of_their_own(backend: str) -> None:
    noise = normal(3 * 6, 4, 8, 8)
    adapters, bases = index(1, 2), index(0, 0)

    def run() -> Tensor:
        return place_masks(place_strength(noise, adapters, bases, 3, 3, backend=backend), 0.5, backend=backend)

    want = run()
    noise.view(3, 6, 4, 8, 8)[:, 4] = float("nan")
    noise.view(3, 6, 4, 8, 8)[:, :3] = float("nan")  # the half that does not count
    got = run()
    assert torch.equal(got[:, [0, 2]], want[:, [0, 2]])
    assert got[:, 1].isnan().all()


def local_float64(noise, mu, coefficients, adapters, bases, base: int) -> Tensor:
    rows = coefficients.shape[1]
    e = noise.double().view(-1, rows, *noise.shape[1:])
    y = e[base].clone()
    for j, (own, of) in enumerate(zip(adapters.tolist(), bases.tolist(), strict=True)):
        for row in range(rows):
            y[row] += coefficients[j, row].double() * mu[j, row % mu.shape[1]].double() * (e[own, row] - e[of, row])
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_deviations_where_the_masks_let_them(size, dtype: torch.dtype) -> None:
    noise, mu, coefficients = normal(5 * 4, *size, dtype=dtype), uniform(3, 2, *size[1:]), uniform(3, 4, seed=1)
    adapters, bases = index(1, 2, 4), index(0, 0, 3)
    for number in (0, 3):
        want = local_float64(noise, mu, coefficients, adapters, bases, number)
        definition = combine_local(noise, mu, coefficients, adapters, bases, number, "torch")
        for base in (number, index(number)):
            got = combine_local(noise, mu, coefficients, adapters, bases, base, "triton")
            assert_as_good_as_the_definition(got, definition, want)
            assert torch.equal(combine_local(noise, mu, coefficients, adapters, bases, base, "torch"), definition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_regions_are_a_weighted_mean_of_every_place(size, dtype: torch.dtype) -> None:
    noise, regions, coefficients = normal(3 * 4, *size, dtype=dtype), uniform(3, 2, *size[1:]), uniform(3, 4, seed=1)
    regions[:, :, 0] = 0  # a place that nobody took
    e, c = noise.double().view(3, 4, *size), coefficients.double().view(3, 4, 1, 1, 1)
    weights = c * regions.double().repeat(1, 2, 1, 1).unsqueeze(2)
    weights[:, :, :, 0] = c[:, :, :, 0]
    want = (weights * e).sum(0) / weights.sum(0)
    got, definition = (combine_regions(noise, regions, coefficients, b) for b in BACKENDS)
    assert_as_good_as_the_definition(got, definition, want)


def test_what_the_combinations_become_without_masks() -> None:
    """Whole masks give compositional guidance, whole regions the mean: both known to `combine_noise`."""
    noise, whole, coefficients = normal(4 * 2, 4, 8, 8), torch.ones(3, 1, 8, 8, device=DEVICE), uniform(3, 2)
    deviations = torch.cat([1 - coefficients.sum(0, keepdim=True), coefficients])
    for backend in BACKENDS:
        got = combine_local(noise, whole, coefficients, index(1, 2, 3), index(0, 0, 0), 0, backend)
        torch.testing.assert_close(got, combine_noise(noise, deviations), rtol=1e-5, atol=1e-5)
        mean = combine_noise(noise[2:], coefficients / coefficients.sum(0))
        torch.testing.assert_close(combine_regions(noise[2:], whole, coefficients, backend), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_channels_last_and_strided_predictions_keep_their_values(dtype: torch.dtype) -> None:
    noise, mu, coefficients = normal(3 * 2, 4, 9, 7, dtype=dtype), uniform(2, 1, 9, 7), uniform(2, 2)
    adapters, bases = index(1, 2), index(0, 0)
    last = noise.contiguous(memory_format=torch.channels_last)
    strided = torch.stack((noise, noise), -1)[..., 0]
    swapped = mu.transpose(2, 3).contiguous().transpose(2, 3)
    want = place_strength(noise, adapters, bases, 1, 1, backend="triton")
    local = combine_local(noise, mu, coefficients, adapters, bases, 0, "triton")
    regions = combine_regions(noise[2:], mu, coefficients, "triton")
    for view in (last, strided):
        assert torch.equal(place_strength(view, adapters, bases, 1, 1, backend="triton"), want)
        assert torch.equal(combine_local(view, swapped, coefficients, adapters, bases, 0, "triton"), local)
        assert torch.equal(combine_regions(view[2:], swapped, coefficients, "triton"), regions)
    for backend in BACKENDS:
        for got in (
            combine_local(last, mu, coefficients, adapters, bases, 0, backend),
            combine_regions(last[2:], mu, coefficients, backend),
        ):
            assert got.is_contiguous(memory_format=torch.channels_last)


def test_every_place_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and scratch start as NaN."""

    def poison(make):
        return lambda *a, **k: t.fill_(float("nan")) if (t := make(*a, **k)).is_floating_point() else t

    monkeypatch.setattr(Tensor, "new_empty", poison(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    noise, coefficients = normal(3 * 2, 3, 7, 41), uniform(2, 2)
    strength = place_strength(noise, index(1, 2), index(0, 0), 1, 1, backend="triton")
    mu = place_masks(strength, 0.5, backend="triton")
    local = combine_local(noise, mu, coefficients, index(1, 2), index(0, 0), 0, "triton")
    regions = combine_regions(noise[2:], mu, coefficients, "triton")
    assert not any(t.isnan().any() for t in (strength, mu, local, regions))


def test_masks_equal_average_pooling_and_softmax_of_torch() -> None:
    strength = uniform(4, 1, 12, 10)
    b = F.avg_pool2d(F.pad(strength.double(), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    soft = torch.softmax(b / b.mean(dim=(2, 3), keepdim=True) / 0.6, 0)
    torch.testing.assert_close(
        place_masks(strength, 0.6).double(), soft / soft.amax(0, keepdim=True), rtol=1e-5, atol=1e-6
    )


def test_ops_hold_torchs_contract() -> None:
    noise, mu, coefficients = normal(3 * 2, 4, 5, 5), uniform(2, 1, 5, 5), uniform(2, 2)
    adapters, bases, library = index(1, 2), index(0, 0), torch.ops.cmlora_kernels
    for backend in BACKENDS:
        for previous in (None, mu):
            args = (noise, adapters, bases, 1, 1, previous, 0.7, backend)
            torch.library.opcheck(library.place_strength.default, args)
        torch.library.opcheck(library.place_masks.default, (mu, 0.5, 3, True, backend))
        for base in (None, index(0)):
            local = (noise, mu, coefficients, adapters, bases, base, 0, backend)
            torch.library.opcheck(library.combine_local.default, local)
        torch.library.opcheck(library.combine_regions.default, (noise[2:], mu, coefficients, backend))


MU, C, ONE, TWO = torch.ones(2, 1, 5, 5), torch.ones(2, 2), torch.tensor([1, 2]), torch.tensor([0, 0])


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda n: place_strength(n, ONE, TWO, 2, 2), "noise must be .* 4 rows"),
        (lambda n: place_strength(n, ONE.int(), TWO, 1, 1), r"adapters must be \[adapters\] int64"),
        (lambda n: place_strength(n, ONE, TWO[:1], 1, 1), r"bases must be \[adapters\] int64"),
        (lambda n: place_strength(n, ONE, TWO, 1, 1, MU[:1]), "previous must be"),
        (lambda n: place_masks(MU.half(), 0.5), "strength must be"),
        (lambda n: place_masks(torch.ones(17, 1, 5, 5), 0.5), "1 to 16 adapters"),
        (lambda n: place_masks(MU, 0.5, blur=2), "blur must be odd"),
        (lambda n: place_masks(MU, 0.0), "temperature must be above 0"),
        (lambda n: combine_local(n, MU[:, :, 1:], C, ONE, TWO, 0), "mu must be"),
        (lambda n: combine_local(n, MU, C.half(), ONE, TWO, 0), "coefficients must be"),
        (lambda n: combine_local(n, MU, C, ONE, TWO, 3), "base must be one of 3 predictions"),
        (lambda n: combine_local(n, MU, C, ONE, TWO, torch.tensor([0.0])), "base must be a number or int64"),
        (lambda n: combine_regions(n, MU, C), r"noise must be \[4, channels"),
        (lambda n: combine_regions(n[2:], MU.expand(2, 3, 5, 5), C), "number of images that divides 2 rows"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call(torch.zeros(6, 4, 5, 5))


def test_tiles_hold_any_number_of_channels() -> None:
    assert [places.tile_of(channels) for channels in (1, 4, 16, 100)] == [(1, 1024), (4, 256), (16, 64), (128, 16)]
