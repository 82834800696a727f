"""What each of our own ops launches on a target: the kernels, by their own counts, and the library's beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cmlora_kernels.combine_noise import combine_launch
from cmlora_kernels.combine_places import local_launch, regions_launch
from cmlora_kernels.costs import choose
from cmlora_kernels.feature_bank import concat_channels_launch, scatter_launch
from cmlora_kernels.geglu import geglu_launch
from cmlora_kernels.group_norm import group_norm_launches, images_of
from cmlora_kernels.launch import Launch
from cmlora_kernels.layout import dense_format
from cmlora_kernels.merged_bank import merged_launch
from cmlora_kernels.modulated_norm import modulated_launch
from cmlora_kernels.multi_lora_add import add_launches
from cmlora_kernels.multi_lora_conv import ConvProblem, conv_add_launches
from cmlora_kernels.multi_lora_gate import gated_launches
from cmlora_kernels.multi_lora_linear import linear_launch
from cmlora_kernels.places import blur_launch, lay_out, masks_launch, strength_launch
from cmlora_kernels.rotary_norm import rotary_launch
from cmlora_kernels.spectrum import spectrum_launch
from cmlora_kernels.spectrum_finish import finish_launch
from cmlora_kernels.tiles import Problem

Unit = Literal["none", "library", "triton", "attention"]


@dataclass(frozen=True)
class Op:
    """One kernel on the device.

    Attributes:
        name: of the op or the launch.
        bytes: read and written, every element once.
        flops: multiplications and additions (2 per multiply-add) on unpadded sizes; elementwise work is not counted.
        work: the flops that the matrix units really do, whole tiles.
        unit: whose matrix kernel it is: cuBLAS's or cuDNN's, ours, the flash-attention kernel; "none" is elementwise.
        problem: the layer of a multi-LoRA launch; the adapters are those that its rows can name.
    """

    name: str
    bytes: int
    flops: int = 0
    work: int = 0
    unit: Unit = "none"
    problem: Problem | None = None


def tensors_in(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def bytes_of(tensor: Tensor) -> int:
    """Bytes of the elements that differ: an expanded dimension is one."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _kernel(launch: Launch, work: int = 0, problem: Problem | None = None) -> Op:
    return Op(launch.name, launch.unique_bytes, launch.flops, work, "triton" if work else "none", problem)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Any,
    slots: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    _: str,
    token_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> Any:
    return layer_kernels(Problem.of(x, slots, b, scales, bias is not None, token_weights))


def _gated(x: Tensor, _: Tensor, bias: Any, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, *rest: Any) -> Any:
    p = Problem.of(x, slots, b, scales, bias is not None, rest[1] if rest[1:] else None)._replace(gated=True)
    used = p._replace(adapters=min(p.rows, p.adapters))

    def kernels(arch: str) -> Iterator[Op]:
        fused = choose(p, arch).strategy == "fused"
        if not fused:
            yield _base(p)
        for i, (_, launch) in enumerate(gated_launches(used, arch, fused)):
            yield _fused(launch, used) if fused and i == 0 else _update(launch, used)

    return kernels


def layer_kernels(p: Problem) -> Callable[[str], Iterator[Op]]:
    """What `multi_lora_linear` launches for a layer, per target."""
    used = p._replace(adapters=min(p.rows, p.adapters))  # a row reads one adapter

    def kernels(arch: str) -> Iterator[Op]:
        strategy = choose(p, arch).strategy
        if strategy == "fused":
            yield _fused(linear_launch(used, arch), used)
            yield from _adds(used, arch, 1)
            return
        if strategy != "add":
            raise ValueError(f"dtype must be one that the kernels serve, got {p.dtype}")
        yield _base(p)
        yield from _adds(used, arch)

    return kernels


def _base(p: Problem) -> Op:
    """The base GEMM by the library."""
    m = p.rows * p.tokens
    flops = 2 * m * p.inner * p.outer
    moved = p.dtype.itemsize * (m * (p.inner + p.outer) + p.outer * (p.inner + p.bias))
    return Op("linear", moved, flops, flops, "library")


def _fused(launch: Launch, p: Problem) -> Op:
    m, n, r = (launch.constexprs[f"BLOCK_{axis}"] for axis in "MNR")
    return _kernel(launch, 2 * math.prod(launch.grid) * m * (p.inner * (n + r) + r * n), p)


def _adds(p: Problem, arch: str, done: int = 0) -> Iterator[Op]:
    """The update in place, a launch per chunk of ranks but for those that are done."""
    for _, launch in add_launches(p, arch)[done:]:
        yield _update(launch, p)


def _update(launch: Launch, p: Problem) -> Op:
    """Of `piece` columns, or of as many values and gates."""
    tile, piece = launch.constexprs, int(launch.scalars["piece"]) * (2 if p.gated else 1)
    return _kernel(launch, 2 * math.prod(launch.grid) * tile["BLOCK_M"] * tile["BLOCK_R"] * (p.inner + piece), p)


def _merged(x: Tensor, bank: Tensor, bias: Any, slots: Tensor, _: str) -> Any:
    rows, tokens, inner = x.shape
    used = min(rows, bank.shape[0] - 1)  # a row reads one weight
    p = Problem(rows, tokens, inner, bank.shape[1], 0, 1, used, x.dtype, bias is not None)

    def kernels(arch: str) -> Iterator[Op]:
        launch = merged_launch(p, arch)
        m, n = (launch.constexprs[f"BLOCK_{axis}"] for axis in "MN")
        yield _kernel(launch, 2 * math.prod(launch.grid) * m * n * inner)

    return kernels


def _add(y: Tensor, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, _: str, *weights: Any) -> Any:
    p = Problem.of(x, slots, b, scales, False, weights[0] if weights else None)
    return lambda arch: _adds(p._replace(adapters=min(p.rows, p.adapters)), arch)


def _conv_add(
    y: Any, x: Tensor, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, *rest: Any
) -> Callable[[str], Iterator[Op]]:
    stride, padding, dilation, _, *weights = rest
    count = weights[0].shape[1] if weights and weights[0] is not None else 0
    geometry: list[Any] = [tuple(a.shape[3:]), tuple(stride), tuple(padding), tuple(dilation)]
    sizes: list[Any] = [*x.shape, b.shape[1], a.shape[1], min(x.shape[0], a.shape[0]), x.dtype]
    p = ConvProblem._make([*sizes, *geometry, count])

    def kernels(arch: str) -> Iterator[Op]:
        for _, launch in conv_add_launches(p, arch):
            tile, piece = launch.constexprs, int(launch.scalars["piece"])
            padded = 2 * math.prod(launch.grid) * tile["BLOCK_M"] * tile["BLOCK_R"]
            yield _kernel(launch, padded * (math.prod(a.shape[2:]) + piece))

    return kernels


def _conv(
    x: Tensor, weight: Tensor, bias: Any, slots: Tensor, a: Tensor, b: Tensor, scales: Tensor, *rest: Any
) -> Callable[[str], Iterator[Op]]:
    stride, padding, dilation, _, *weights = rest
    add = _conv_add(None, x, slots, a, b, scales, *rest)
    y = torch.nn.functional.conv2d(x, weight, bias, stride, padding, dilation)
    flops, moved = 2 * y.numel() * math.prod(weight.shape[1:]), sum(map(bytes_of, tensors_in((x, weight, bias, y))))
    base = Op("convolution", moved, flops, flops, "library")
    plain = weight.shape[2:] == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    outer, inner = weight.shape[:2]
    count = weights[0].shape[1] if weights and weights[0] is not None else 0
    rows, one = x.shape[0], y[0, 0].numel()
    pixels = Problem(rows, one, inner, outer, a.shape[1], 1, a.shape[0], x.dtype, bias is not None, count)

    def kernels(arch: str) -> Iterator[Op]:
        if plain and choose(pixels, arch).strategy == "fused":
            yield from layer_kernels(pixels)(arch)
            return
        yield base
        yield from add(arch)

    return kernels


def _concat(bank: Tensor, skip: Tensor, _: str) -> Any:
    rows, channels, height, width = skip.shape
    last = dense_format(bank, skip) is torch.channels_last
    launch = concat_channels_launch(rows, bank.shape[1], channels, height * width, bank.dtype, last)
    return lambda arch: iter((_kernel(launch),))


def _scatter(bank: Tensor, rows: Tensor, index: Tensor, _: str) -> Any:
    launch = scatter_launch(rows.shape[0], bank[0].numel(), bank.dtype)
    return lambda arch: iter((_kernel(launch),))


def _combine(noise: Tensor, coefficients: Tensor, _: str) -> Any:
    launch = combine_launch(*coefficients.shape, noise[0].numel(), noise.dtype)
    return lambda arch: iter((_kernel(launch),))


def _strength(noise: Tensor, adapters: Tensor, bases: Tensor, first: int, images: int, *rest: Any) -> Any:
    previous, keep, _ = rest
    shape, strides = (first + images, images, noise.shape[1], noise[0, 0].numel()), lay_out(noise)[1]
    kept = None if previous is None else keep
    launch = strength_launch(shape, strides, adapters.shape[0], first, kept, noise.dtype)
    return lambda arch: iter((_kernel(launch),))


def _masks(strength: Tensor, temperature: float, blur: int, own: bool, _: str) -> Any:
    adapters, images, height, width = strength.shape
    launches = (
        blur_launch(adapters, images, height, width, blur),
        masks_launch(adapters, images, height * width, temperature, own),
    )
    return lambda arch: map(_kernel, launches)


def _local(noise: Tensor, masks: Tensor, coefficients: Tensor, *rest: Any) -> Any:
    *_, base_at, base, _ = rest
    shape = (coefficients.shape[1], masks.shape[1], noise.shape[1], noise[0, 0].numel())
    number = base if base_at is None else None
    launch = local_launch(shape, lay_out(noise)[1], masks.shape[0], number, noise.dtype)
    return lambda arch: iter((_kernel(launch),))


def _regions(noise: Tensor, regions: Tensor, coefficients: Tensor, _: str) -> Any:
    shape = (coefficients.shape[1], regions.shape[1], noise.shape[1], noise[0, 0].numel())
    launch = regions_launch(shape, lay_out(noise)[1], regions.shape[0], noise.dtype)
    return lambda arch: iter((_kernel(launch),))


def _modulated(x: Tensor, shift: Tensor, _: Tensor, eps: float, __: str) -> Any:
    launch = modulated_launch(tuple(x.shape), shift.shape[0], (x.stride(0), shift.stride(0)), x.dtype, eps)
    return lambda arch: iter((_kernel(launch),))


def _rotary(x: Tensor, weight: Tensor, _: Tensor, eps: float, before: Tensor | None, *__: Any) -> Any:
    rows, tokens, stride = (0, 0, 0) if before is None else (*before.shape[:2], before.stride(0))
    launch = rotary_launch(tuple(x.shape), (rows, tokens), (x.stride(0), stride), x.dtype, weight.dtype, eps)
    return lambda arch: iter((_kernel(launch),))


def _geglu(x: Tensor, _: str) -> Any:
    launch = geglu_launch(x.shape[:-1].numel(), x.shape[-1] // 2, x.dtype)
    return lambda arch: iter((_kernel(launch),))


def _group_norm(x: Tensor, groups: int, weight: Tensor, _: Tensor, eps: float, __: str) -> Any:
    return lambda arch: map(_kernel, group_norm_launches(images_of(x, groups), weight.dtype, eps, arch))


def _spectrum(x: Tensor, cutoff: float, choice: Any) -> Any:
    shape, strides, dtype = tuple(x.shape), x.stride(), x.dtype

    def kernels(arch: str) -> Iterator[Op]:
        launch = spectrum_launch(shape, strides, dtype, True, arch)
        yield _kernel(launch)
        parts = launch.grid[0] * launch.grid[1]
        yield _kernel(finish_launch(shape[0], *shape[2:], parts, cutoff, choice))

    return kernels


def _dominant(x: Tensor, cutoff: float, gate: float, early: int, late: int, adapters: int, *rest: Any) -> Any:
    return _spectrum(x, cutoff, (gate, early, late, adapters, *rest[:2]))


# op -> its arguments -> target -> its kernels; an op that is missing here is a KeyError, not a wrong count
KERNELS: dict[str, Callable[..., Callable[[str], Iterator[Op]]]] = {
    "multi_lora_linear": _linear,
    "merged_linear": _merged,
    "multi_lora_geglu": _gated,
    "multi_lora_add_": _add,
    "multi_lora_conv2d": _conv,
    "multi_lora_conv2d_add_": _conv_add,
    "concat_channels": _concat,
    "scatter_rows": _scatter,
    "combine_noise": _combine,
    "place_strength": _strength,
    "place_masks": _masks,
    "combine_local": _local,
    "combine_regions": _regions,
    "modulated_norm": _modulated,
    "rotary_norm": _rotary,
    "geglu": _geglu,
    "group_norm_silu": _group_norm,
    "dominant_from_latents": _dominant,
    "high_frequency_share": lambda x, cutoff, _: _spectrum(x, cutoff, None),
}
