"""The spectrum's kernels against torch.fft and against a NumPy spectrum on the CPU, copy included.

pytest benchmarks/bench_spectrum.py -s
"""

import numpy as np
import pytest
import torch
from harness import BACKEND, DEVICE, DTYPE, GPU, compare

from cmlora_kernels import radial_profile
from cmlora_kernels.spectrum import profile_definition, spectrum_launch
from cmlora_kernels.spectrum_finish import finish_launch

LATENTS = {"sd15": 64, "sdxl": 128}
MAPS = {"64x64x320": (320, 64), "32x32x640": (640, 32), "16x16x1280": (1280, 16)}
ROWS = 10 if GPU else 1


@pytest.mark.parametrize("model", LATENTS)
def test_latents(benchmark, model: str) -> None:
    x = torch.randn(2, 4, LATENTS[model], LATENTS[model], device=DEVICE, dtype=DTYPE)
    rivals = {
        "radial_profile": lambda: radial_profile(x, backend=BACKEND),
        "torch.fft": lambda: profile_definition(x, True),
        "NumPy on the CPU": lambda: numpy_profile(x),
    }
    want = numpy_profile(x)
    compare(f"latents {model}", rivals, want, 1e-4, moved(x, True), {})
    benchmark(rivals["radial_profile"])


@pytest.mark.parametrize("name", MAPS)
def test_feature_maps(benchmark, name: str) -> None:
    channels, side = MAPS[name]
    x = torch.randn(ROWS, channels, side, side, device=DEVICE, dtype=DTYPE)
    rivals = {
        "radial_profile": lambda: radial_profile(x, channel_mean=False, backend=BACKEND),
        "torch.fft": lambda: profile_definition(x, False),
    }
    # x to float32, less its mean, complex spectrum, amplitude: written and read, and x and the mean's pass read
    pixels = x.numel()
    fft = pixels * (DTYPE.itemsize + 4 + 4 + 2 * 4 + 2 * 8 + 2 * 4)
    want = numpy_profile(x, False)
    compare(f"maps {name} x {ROWS}", rivals, want, 1e-4, moved(x, False), {"torch.fft": fft})
    benchmark(rivals["radial_profile"])


def moved(x: torch.Tensor, channel_mean: bool) -> int:
    """Bytes that cross the memory bus for our two launches: repeated reads of one map by neighbours hit the cache."""
    launch = spectrum_launch(tuple(x.shape), x.stride(), x.dtype, channel_mean, "sm_90")
    parts = launch.grid[0] * launch.grid[1]
    return launch.unique_bytes + finish_launch(x.shape[0], *x.shape[2:], parts, None, None).unique_bytes


def numpy_profile(x: torch.Tensor, channel_mean: bool = True) -> torch.Tensor:
    """What a pipeline without these kernels does: copy to the CPU, NumPy's FFT (in float64), bincount."""
    images = x.float().cpu().numpy()
    images = images.mean(1, keepdims=True) if channel_mean else images
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(images), axes=(-2, -1)))
    height, width = images.shape[-2:]
    y, x_ = np.indices((height, width))
    radius = np.sqrt((y - height // 2) ** 2 + (x_ - width // 2) ** 2).astype(int).ravel()
    sums = np.stack([[np.bincount(radius, image.ravel()) for image in row] for row in amplitude])
    sums = (sums / np.bincount(radius)).mean(1)
    return torch.from_numpy(sums / sums.max(1, keepdims=True)).to(x.device)
