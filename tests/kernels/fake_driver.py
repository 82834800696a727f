"""Run every op with the tensors of a step of SD1.5 or Flux under a driver that only writes down what it is asked.

A program of its own: the kernels must be imported without TRITON_INTERPRET. Its argument is the target, "sm_90" or
"gfx942". Prints one JSON line per launch.
"""

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.runtime import driver

import cmlora_kernels as ck
from cmlora.lab.doctor.cases import variants_of
from cmlora.lab.doctor.step_cases import step_cases
from cmlora_kernels import launch as launch_module
from cmlora_kernels.inspect import gpu_target

current: list[launch_module.Launch] = []


def fake_compile(source: Any, target: Any = None, options: dict[str, Any] | None = None, **_: Any) -> Any:
    """Stands in for triton.compile: holds what the JIT specialised against what the inspection compiles."""
    launch, options = current[-1], options or {}
    inspected = launch.source(driver.active.get_current_target())
    for each in (source, inspected):  # without the empty ones, in one order: the hash is of their text
        each.attrs = {place: attribute for place, attribute in sorted(each.attrs.items()) if attribute}
    same = source.hash() == inspected.hash()
    stages = (options["num_warps"], options["num_stages"]) == (launch.num_warps, launch.num_stages)

    def run(x: int, y: int, z: int, *rest: Any) -> None:
        write((x, y, z), rest[6:], again=False)

    def write(grid: tuple[int, int, int], arguments: Sequence[Any], again: bool) -> None:
        launched, (x, y, z) = current[-1], grid
        pointers = [a for a in arguments if isinstance(a, torch.Tensor)]
        others = [a for a in arguments if a is not None and not isinstance(a, torch.Tensor)]
        record = {
            "kernel": launched.kernel.__name__,
            "name": launched.name,
            "same_source": same,
            "same_options": stages,
            "same_grid": grid == launched.grid,
            "same_numbers": others == [*launched.scalars.values(), *launched.constexprs.values()],
            "again": again,
            "programs": x * y * z,
            "grid": [x, y, z],
            "aligned": all(p.data_ptr() % 16 == 0 for p in pointers),
            "pointers": len(pointers),
            "expected_pointers": sum(kind is not None for kind in launched.tensors.values()),
        }
        sys.stdout.write(json.dumps(record) + "\n")

    class Compiled:
        """As much of triton's compiled kernel as a launch uses."""

        function = packed_metadata = None

        def __init__(self) -> None:
            self.run, self.launch_metadata = run, lambda *_: None

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
            return lambda *arguments: write(grid, arguments, again=True)

    return Compiled()


def install(target: str) -> None:
    """Put the fake driver, the fake compiler and the choice of Triton on CPU tensors in place."""
    interface = SimpleNamespace(
        get_current_target=lambda: gpu_target(target), get_current_device=lambda: 0, get_current_stream=lambda device: 0
    )
    driver.set_active(interface)
    triton.compiler.compile = fake_compile
    call = launch_module.Launch.__call__

    def remembered(self: launch_module.Launch, *tensors: Any) -> None:
        current.append(self)
        call(self, *tensors)

    launch_module.Launch.__call__ = remembered
    for name in [n for n in sys.modules if n.startswith("cmlora_kernels.")]:
        module = importlib.import_module(name)
        if hasattr(module, "use_triton"):
            module.use_triton = lambda tensor, backend: backend == "triton"
        if hasattr(module, "arch_of"):
            module.arch_of = lambda device: target


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def step() -> None:
    """A refresh step of SD1.5 at 512 x 512, guidance on, N = 5: what issues launches, each with its own tensors."""
    latents, rows = empty(2, 4, 64, 64), 10
    ck.radial_profile(latents, backend="triton")
    ck.radial_profile(empty(rows, 320, 64, 64), channel_mean=False, backend="triton")
    ck.high_frequency_share(latents, 0.2, backend="triton")
    for early, late in ((0, 1), (1, 0), (2, 4)):
        ck.dominant_from_latents(latents, 0.2, 0.4, early, late, 5, 1.25, 0.75, backend="triton")
    bank, skip = empty(rows, 640, 64, 64), empty(rows, 320, 64, 64)
    index = torch.arange(rows)
    ck.scatter_rows(bank, bank[:2].clone(), index[:2].clone(), backend="triton")
    ck.concat_channels(bank, skip, backend="triton")
    last = torch.channels_last
    ck.concat_channels(bank.to(memory_format=last), skip.to(memory_format=last), backend="triton")
    noise, weights = empty(rows, 4, 64, 64), torch.ones(5, 2)
    ck.combine_noise(noise, weights, backend="triton")
    ck.geglu(empty(rows, 256, 2560), backend="triton")
    weight = empty(960)
    for images in (empty(rows, 960, 64, 64), empty(1, 960, 128, 128)):  # one launch, and two
        for layout in (torch.contiguous_format, last):
            ck.group_norm_silu(images.to(memory_format=layout), 32, weight, weight, 1e-5, backend="triton")
    lora()


def lora() -> None:
    """The layers, two rows: q, k and v stacked, a wide feed-forward, a prompt's k, a 3x3 and a 1x1 convolution."""
    slots = torch.tensor([0, -1])

    def bank(inner: int, outer: int, parts: int = 1) -> tuple[torch.Tensor, ...]:
        return empty(5, 16 * parts, inner), empty(5, outer, 16), torch.ones(5, parts)

    x = empty(2, 64, 1280)
    ck.multi_lora_linear(x, empty(3840, 1280), None, slots, *bank(1280, 3840, 3), backend="triton")
    ck.merged_linear(x, empty(6, 1280, 1280), None, slots, backend="triton")
    ck.multi_lora_geglu(x, empty(10240, 1280), empty(10240), slots, *bank(1280, 10240), backend="triton")
    ck.multi_lora_linear(empty(2, 77, 768), empty(320, 768), None, slots, *bank(768, 320), backend="triton")
    ck.multi_lora_add_(empty(2, 64, 1280), empty(2, 64, 5120), slots, *bank(5120, 1280), backend="triton")
    images = empty(2, 320, 8, 8)
    for k in (1, 3):
        a, b, scales = empty(5, 16, 320, k, k), empty(5, 320, 16), torch.ones(5, 1)
        weight, padding = empty(320, 320, k, k), (k // 2, k // 2)
        ck.multi_lora_conv2d(images, weight, None, slots, a, b, scales, padding=padding, backend="triton")
        ck.multi_lora_conv2d_add_(images.clone(), images, slots, a, b, scales, padding=padding, backend="triton")


def places() -> None:
    """Masks of the same step, and what is combined with them."""
    noise, adapters, bases = empty(12, 4, 64, 64), torch.arange(1, 6), torch.zeros(5, dtype=torch.int64)
    strength = ck.place_strength(noise, adapters, bases, 1, 1, backend="triton")
    strength = ck.place_strength(noise, adapters, bases, 1, 1, strength, backend="triton")
    for own in (True, False):
        mu = ck.place_masks(strength, 0.6, own=own, backend="triton")
    for base in (0, 1, bases[:1].clone()):
        ck.combine_local(noise, mu, torch.ones(5, 2), adapters, bases, base, backend="triton")
    ck.combine_regions(noise[2:].clone(), mu, torch.ones(5, 2), backend="triton")


def routed() -> None:
    """Layers of a routed step: five adapters' ranks in one slot, then two of rank 128, which take two chunks."""
    slots, scales = torch.tensor([0, 0]), torch.ones(1, 1)
    for rank, weights in ((80, 5), (256, 2)):
        a, b, groups = empty(1, rank, 320), empty(1, 320, rank), torch.zeros(1, rank, dtype=torch.int32)
        masks = torch.ones(1, weights, 64).expand(2, -1, -1)
        x, weight = empty(2, 64, 320), empty(320, 320)
        ck.multi_lora_linear(x, weight, None, slots, a, b, scales, "triton", token_weights=masks, groups=groups)
        ck.multi_lora_add_(x.clone(), x, slots, a, b, scales, "triton", token_weights=masks, groups=groups)
        wide = empty(2560, 320), None, slots, a, empty(1, 2560, rank), scales
        ck.multi_lora_geglu(x, *wide, "triton", token_weights=masks, groups=groups)
        images, a = empty(2, 320, 8, 8), empty(1, rank, 320, 3, 3)
        weighted = {"token_weights": masks, "groups": groups, "padding": (1, 1), "backend": "triton"}
        ck.multi_lora_conv2d_add_(images.clone(), images, slots, a, b, scales, **weighted)


def norms() -> None:
    """Of Flux's blocks at 1024 x 1024, three predictions of one image: parts of a sequence of both, then the whole."""
    width, both, text = 3072, 4608, 512
    x, gates = empty(3, both, width), [empty(1, count, width) for count in (6, 6, 3)]
    for part, given in zip((x[:, text:], x[:, :text], x), gates, strict=True):
        shift, scale, *_ = given.chunk(given.shape[1], 1)
        ck.modulated_norm(part, shift, scale, 1e-6, backend="triton")
    heads, weight, turns = x.view(3, both, 24, 128), empty(128), torch.zeros(both, 64, 2)
    ck.rotary_norm(heads, weight, turns, 1e-6, backend="triton")
    image, prompt = empty(3, both - text, 24, 128), empty(3, text, 24, 128)
    ck.rotary_norm(image, weight, turns, 1e-6, prompt, weight, backend="triton")


def doctor(target: str) -> None:
    """What `cmlora doctor` launches on a GPU: its cheapest variants, aligned, and the kernels of a step."""
    cpu = torch.device("cpu")
    layers = variants_of(target, torch.float16, (16,))
    cheapest = [next(case for case in layers if case.name.startswith(kind)) for kind in ("fused", "add", "merged")]
    convolutions = [case for case in layers if case.name.startswith("conv")][:2]
    for case in (*cheapest, *convolutions, *step_cases(torch.float16, 16, 8)):
        if "ragged" not in case.name:  # whose tensors begin where they may
            case.run(cpu)


if __name__ == "__main__":
    install(sys.argv[1])
    step()
    places()
    norms()
    routed()
    routed()  # kernels that were compiled are launched without asking Triton
    doctor(sys.argv[1])
