"""The spectrum's kernels and definitions against NumPy in float64 and against the reference code's own profiles."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmlora.lab.bench.tiny import DEVICE
from cmlora_kernels import dominant_from_latents, high_frequency_share, radial_profile, spectrum
from cmlora_kernels.dominant import select_definition
from tests.conftest import shared

SIZES = [(8, 8), (9, 9), (16, 8), (31, 33), (64, 64), (65, 63), (96, 128), (127, 64), (128, 128)]
BACKENDS = ["torch", "triton"]


def numpy_profile(x: torch.Tensor, channel_mean: bool) -> np.ndarray:
    images = x.double().cpu().numpy()
    images = images.mean(1, keepdims=True) if channel_mean else images
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(images), axes=(-2, -1)))
    height, width = images.shape[-2:]
    y, x_ = np.indices((height, width))
    radius = np.sqrt((y - height // 2) ** 2 + (x_ - width // 2) ** 2).astype(int).ravel()
    sums = np.stack([[np.bincount(radius, image.ravel()) for image in row] for row in amplitude])
    profile = (sums / np.bincount(radius)).mean(1)
    return profile / profile.max(1, keepdims=True)


def worst_bin(got: torch.Tensor, want: np.ndarray) -> float:
    assert got.dtype == torch.float32
    assert got.shape == want.shape
    return float(np.abs(got.double().cpu().numpy() / want - 1).max())


def images(shape: tuple[int, ...], mean: float = 0.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) + mean).to(DEVICE, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mean", [0.0, 20.0], ids=["centred", "strong mean"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_every_bin_equals_numpy(size: tuple[int, int], mean: float, backend: str) -> None:
    x = images((2, 4, *size), mean)
    assert worst_bin(radial_profile(x, backend=backend), numpy_profile(x, True)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 5, 16, 16), (1, 3, 33, 64), (1, 1, 128, 8)], ids=str)
def test_maps_of_every_channel_equal_numpy(shape: tuple[int, ...], backend: str) -> None:
    x = images(shape)
    assert worst_bin(radial_profile(x, channel_mean=False, backend=backend), numpy_profile(x, False)) < 1e-4


def test_many_maps_per_program_equal_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "group_size", lambda rows, images: 4)
    x = images((2, 10, 8, 11))  # groups of 4 images, the last one short
    assert worst_bin(radial_profile(x, channel_mean=False, backend="triton"), numpy_profile(x, False)) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_profiles_equal_the_reference_codes(backend: str) -> None:
    data = load_file(shared("golden/spectrum.safetensors"))
    for i in range(4):
        profile = radial_profile(data[f"latent_{i}"][None].to(DEVICE), backend=backend)
        assert worst_bin(profile, data[f"profile_{i}"][None].double().numpy()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_latents_lose_nothing_more(dtype: torch.dtype) -> None:
    x = images((2, 4, 64, 64), dtype=dtype)
    assert worst_bin(radial_profile(x, backend="triton"), numpy_profile(x, True)) < 1e-4


def test_strided_latents_equal_dense_ones() -> None:
    x = images((3, 9, 24, 40))
    sliced, turned = x[1:, 2:6], x.transpose(2, 3)
    for view in (sliced, turned):
        torch.testing.assert_close(
            radial_profile(view, backend="triton"), radial_profile(view.contiguous(), backend="triton"), rtol=0, atol=0
        )


def test_rows_do_not_influence_one_another() -> None:
    x = images((3, 4, 32, 32))
    alone = torch.cat([radial_profile(row[None], backend="triton") for row in x])
    assert torch.equal(radial_profile(x, backend="triton"), alone)
    x[1] = float("nan")
    profile = radial_profile(x, backend="triton")
    assert torch.equal(profile[[0, 2]], alone[[0, 2]])
    assert profile[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_share_is_the_mean_beyond_the_cutoff(backend: str) -> None:
    x = images((2, 4, 64, 64))
    profile = numpy_profile(x, True)
    for cutoff in (0.0, 0.2, 0.999):
        first = next(r for r in range(46) if r > cutoff * 45)
        share = high_frequency_share(x, cutoff, backend=backend)
        np.testing.assert_allclose(share.double().cpu(), profile[:, first:].mean(1), rtol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dominant_follows_the_gate_and_nan_counts_as_below(backend: str) -> None:
    x = images((3, 4, 64, 64))
    x[2] = float("nan")
    share = high_frequency_share(x, 0.2, backend=backend)
    gate = share[:2].max().item()  # what a gate equals is above it
    dominant, weights, got = dominant_from_latents(x, 0.2, gate, 2, 0, 3, 1.25, 0.5, backend=backend)
    assert torch.equal(got[:2], share[:2])
    assert got[2].isnan()
    early = share[:2].argmax().item()
    assert dominant.tolist() == [2 if row == early else 0 for row in range(3)]
    assert weights[:, early].tolist() == [0.5, 0.5, 1.25]
    assert weights[:, 2].tolist() == [1.25, 0.5, 0.5]


@pytest.mark.parametrize("shape", [(2, 4, 64, 64), (1, 4, 9, 130)], ids=["kernel", "beyond the kernel's sizes"])
def test_fused_choice_equals_its_two_parts(shape: tuple[int, ...]) -> None:
    x = images(shape)
    share = high_frequency_share(x, 0.2, backend="triton")
    gate = share.mean().item()
    want = (*select_definition(share, gate, 1, 3, 5, 1.5, 0.875), share)
    for got, part in zip(dominant_from_latents(x, 0.2, gate, 1, 3, 5, 1.5, 0.875, backend="triton"), want, strict=True):
        assert torch.equal(got, part)


def test_no_rows_give_no_profiles() -> None:
    x = images((0, 4, 16, 16))
    assert radial_profile(x, backend="triton").shape == (0, 12)
    assert dominant_from_latents(x, 0.2, 0.4, 0, 1, 2, 1.0, 1.0, backend="triton")[1].shape == (2, 0)


def test_ops_hold_torchs_contract() -> None:
    ops, x = torch.ops.cmlora_kernels, images((2, 4, 16, 16))
    for backend in BACKENDS:
        torch.library.opcheck(ops.radial_profile.default, (x, False, backend))
        torch.library.opcheck(ops.high_frequency_share.default, (x, 0.2, backend))
        torch.library.opcheck(ops.dominant_from_latents.default, (x, 0.2, 0.4, 0, 1, 3, 1.5, 0.5, backend))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: radial_profile(images((4, 8, 8))), r"x must be \[rows, channels, height, width\], got \(4, 8, 8\)"),
        (lambda: high_frequency_share(images((1, 4, 8, 8)), 1.0), r"cutoff must be in \[0, 1\), got 1.0"),
        (lambda: radial_profile(images((1, 4, 8, 8)), backend="cuda"), "backend must be one of"),
        (
            lambda: dominant_from_latents(images((1, 4, 8, 8)), 0.2, 0.4, 2, 0, 2, 1, 1),
            r"early must be in \[0, 2\), got 2",
        ),
        (lambda: dominant_from_latents(images((1, 4, 8, 8)), 0.2, 0.4, 0, -1, 2, 1, 1), "late must be in"),
    ],
)
def test_errors_name_the_argument(call, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()
