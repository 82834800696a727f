"""The online partition: every image of a batch follows its own spectrum, and the host never waits for it."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cmlora
from cmlora.lab.bench.tiny import ATTENTION, DEVICE, call, embeddings, relative, three_adapters

CUTOFF = 0.2


def high_frequency_share(latent: np.ndarray) -> float:
    """m of one latent [channels, height, width], as the published NumPy code has it, with our cutoff."""
    image = latent.mean(0)
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(image)))
    rows, columns = amplitude.shape
    y, x = np.meshgrid(np.arange(rows) - rows // 2, np.arange(columns) - columns // 2, indexing="ij")
    radius = np.sqrt(x**2 + y**2).astype(int)
    profile = np.array([amplitude[radius == r].mean() for r in range(radius.max() + 1)])
    return (profile / profile.max())[np.arange(len(profile)) > CUTOFF * (len(profile) - 1)].mean()


def two_spectra(pipe):
    """Two images in a batch: white noise, and the same under a slow wave that takes over the spectrum."""
    given = embeddings(pipe, images=2)
    wave = torch.cos(torch.arange(16, device=DEVICE) * 2 * torch.pi / 16)
    given["latents"][1] = 0.2 * given["latents"][1] + 3 * wave
    return given


def test_images_of_one_batch_take_different_dominant_adapters_as_numpy_says():
    pipe = three_adapters(ATTENTION)
    latents = []

    def record(pipe, step, timestep, kwargs):
        latents.append(kwargs["latents"].double().cpu().numpy())
        return {}

    cmlora.accelerate(pipe, partition="online", online_gate=0.4, online_cutoff=CUTOFF, cache_interval=2)
    call(pipe, 8, given=two_spectra(pipe), callback_on_step_end=record)
    early, late = ("character", "style"), ("style", "background")
    steps = cmlora.summary(pipe).steps
    seen = set()
    for k, i in enumerate(range(0, 8, 2)):
        shares = [1.0, 1.0] if i == 0 else [high_frequency_share(x) for x in latents[i - 1]]
        wanted = tuple((early if m >= 0.4 else late)[k % 2] for m in shares)
        assert steps[i].dominant == wanted
        assert steps[i + 1].dominant == wanted, "dominance holds until the next refresh"
        if i:
            assert steps[i].gate == pytest.approx(shares, rel=1e-4)
        seen.add(len(set(wanted)))
    assert seen == {1, 2}, "the images must have parted and the first step must not"


def test_an_image_of_a_batch_is_the_image_that_it_is_alone():
    pipe = three_adapters(ATTENTION)
    given = two_spectra(pipe)
    cmlora.accelerate(pipe, partition="online", online_cutoff=CUTOFF, cache_interval=2)
    together = call(pipe, 6, given=given)
    for i in range(2):
        alone = call(pipe, 6, given={k: v[i : i + 1] for k, v in given.items()})
        assert relative(together[i : i + 1], alone) < 1e-5


def test_a_gate_that_is_always_open_or_shut_equals_the_offline_stages():
    pipe = three_adapters(ATTENTION)
    given = two_spectra(pipe)

    def image(**config):
        cmlora.accelerate(pipe, cache_interval=2, **config)
        return call(pipe, 6, given=given)

    early, late = (image(partition="offline", offline_boundary=boundary) for boundary in (1.0, 0.0))
    assert relative(early, late) > 1e-4, "the stages must differ"
    assert relative(image(partition="online", online_gate=0.0), early) < 1e-6
    assert relative(image(partition="online", online_gate=1.0), late) < 1e-6


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor's value is read or copied to the host, between the start and the end of a UNet call.

    One look before the first step is allowed: whether the guidance halves start from the same latents.
    """

    armed = False
    looks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.armed:
            name = func.overloadpacket.__name__
            self.looks += name == "equal"
            assert self.looks <= 1, "a second look"
            assert name not in ("_local_scalar_dense", "nonzero", "is_nonzero"), f"{name} reads a value"
            assert str((kwargs or {}).get("device", "")) != "cpu" or name != "_to_copy", "a copy to the host"
        return func(*args, **(kwargs or {}))


class NoHostCall(TorchFunctionMode):
    """The same for methods that dispatch nothing where the tensor is on the host already."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        reads = ("tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__int__", "__float__", "__index__")
        assert not self.mode.armed or getattr(func, "__name__", "") not in reads, f"{func.__name__} reads a value"
        return func(*args, **(kwargs or {}))


HALF = torch.linspace(0, 1, 64).view(8, 8)


@pytest.mark.parametrize(
    "config",
    [
        {"combine": "mean"},
        {"combine": "deviation", "max_cache_age": 3},
        {"combine": "local", "shared": ("style",)},
        {"combine": "mean", "regions": {"style": HALF}, "prompts": {"style": torch.ones(1, 77, 24)}},
        {"method": "routed", "mask_steps": 3},
        {"method": "routed", "regions": {"style": HALF}},
    ],
    ids=lambda config: "-".join(map(str, config)),
)
def test_no_step_reads_a_value_of_the_device(config):
    pipe = three_adapters(ATTENTION)
    cmlora.accelerate(pipe, partition="online", cache_interval=2, **config)
    mode, denoiser = NoHostRead(), pipe.unet.forward.cmlora.denoiser
    one_thread = denoiser._one_thread

    @contextmanager
    def armed():  # around all of a step; a function around forward would hide who calls
        with one_thread():
            mode.armed = True
            try:
                yield
            finally:
                mode.armed = False
                steps.append(1)

    steps = []
    denoiser._one_thread = armed
    with mode, NoHostCall(mode):
        call(pipe, 6, given=two_spectra(pipe))
    assert len(steps) == 6
