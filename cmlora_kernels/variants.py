"""Every launch that this library makes for SD1.5, SDXL and Flux, from their published configurations; pure Python.

A row is one adapter and guidance half of one image. N adapters run 2 N rows where all are refreshed, and 2 rows in the
deep part of a step that refreshes one adapter; on Flux, whose guidance is distilled, N and 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from cmlora_kernels.combine_noise import combine_launch
from cmlora_kernels.combine_places import local_launch, regions_launch
from cmlora_kernels.costs import choose
from cmlora_kernels.feature_bank import concat_channels_launch, scatter_launch
from cmlora_kernels.geglu import geglu_launch
from cmlora_kernels.group_norm import Images, group_norm_launches
from cmlora_kernels.launch import Launch
from cmlora_kernels.merged_bank import merged_launch
from cmlora_kernels.modulated_norm import modulated_launch
from cmlora_kernels.multi_lora_add import add_launches
from cmlora_kernels.multi_lora_conv import ConvProblem, conv_add_launches
from cmlora_kernels.multi_lora_gate import gated_launches
from cmlora_kernels.multi_lora_linear import NO_WEIGHTS, linear_launch, part_rank
from cmlora_kernels.places import blur_launch, masks_launch, strength_launch
from cmlora_kernels.rotary_norm import rotary_launch
from cmlora_kernels.spectrum import spectrum_launch
from cmlora_kernels.spectrum_finish import finish_launch
from cmlora_kernels.tiles import Problem, supports

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ADAPTERS = (2, 3, 4, 5)
RANKS = (16, 32, 64, 128)  # the buckets; a rank between two runs the upper one's tile
ROUTED = ((80, 5), (256, 2))  # ranks of all adapters together and token weights: 5 of 16, and 2 of 128 in chunks
PROMPT_TOKENS = 77
TIME_CHANNELS = 1280


class UNet(NamedTuple):
    """What its config.json says: latent side, channels and transformer layers per level, prompt width."""

    size: int
    channels: tuple[int, ...]
    depth: tuple[int, ...]
    context: int
    linear_projection: bool
    layers_per_block: int = 2


UNETS = {
    # stable-diffusion-v1-5/unet/config.json, 512 x 512 pixels
    "sd15": UNet(64, (320, 640, 1280, 1280), (1, 1, 1, 0), 768, False),
    # stable-diffusion-xl-base-1.0/unet/config.json, 1024 x 1024 pixels
    "sdxl": UNet(128, (320, 640, 1280), (0, 2, 10), 2048, True),
}


class Transformer(NamedTuple):
    """What its config.json and its size of image say: latent side, tokens of image and text, width, channels, heads."""

    size: int
    image: int
    text: int
    width: int
    channels: int
    heads: int


TRANSFORMERS = {
    # black-forest-labs/FLUX.1-dev/transformer/config.json, 1024 x 1024 pixels
    "flux": Transformer(128, 4096, 512, 3072, 16, 24),
}
MODELS = (*UNETS, *TRANSFORMERS)


class Linear(NamedTuple):
    """A linear layer; `parts` projections of one x stacked."""

    tokens: int
    inner: int
    outer: int
    bias: bool
    parts: int = 1


class Conv(NamedTuple):
    """A square convolution on a [channels, size, size] image."""

    size: int
    channels: int
    outer: int
    kernel: int
    stride: int = 1


def linear_layers(unet: UNet) -> Iterator[Linear]:
    """Linear layers that LoRAs train: attention, feed-forward, projections and the resnets' time projections."""
    last = len(unet.channels) - 1
    for level, (channels, depth) in enumerate(zip(unet.channels, unet.depth, strict=True)):
        yield Linear(1, TIME_CHANNELS, channels, True)
        if not depth and level != last:
            continue  # the middle block attends on the last level in any case
        tokens = (unet.size >> level) ** 2
        yield Linear(tokens, channels, channels, False)  # q, k, v of self-attention, q of cross-attention
        yield Linear(tokens, channels, 3 * channels, False, 3)
        yield Linear(tokens, channels, channels, True)  # out, and SDXL's projections around the transformer
        yield Linear(PROMPT_TOKENS, unet.context, channels, False)
        yield Linear(PROMPT_TOKENS, unet.context, 2 * channels, False, 2)
        yield Linear(tokens, channels, 8 * channels, True)  # GEGLU
        yield Linear(tokens, 4 * channels, channels, True)


def transformer_layers(model: Transformer) -> Iterator[Linear]:
    """Linear layers that LoRAs train: blocks of two streams, blocks of one, modulation, embedders."""
    width, both = model.width, model.image + model.text
    for tokens in (model.image, model.text, both):
        yield Linear(tokens, width, width, True)  # q, k, v, out
        yield Linear(tokens, width, 4 * width, True)  # feed-forward; of one stream: proj_mlp
    for tokens in (model.image, model.text):
        yield Linear(tokens, 4 * width, width, True)
    yield Linear(both, 5 * width, width, True)  # proj_out: attention and feed-forward side by side
    for count in (3, 6):
        yield Linear(1, width, count * width, True)  # shifts, scales and gates
    yield Linear(model.image, 4 * model.channels, width, True)
    yield Linear(model.image, width, 4 * model.channels, True)


def conv_layers(unet: UNet) -> Iterator[Conv]:
    """Convolutions that LoRAs train: resnets with their shortcuts, samplers, SD1.5's projections."""
    last = len(unet.channels) - 1
    skips = [unet.channels[0]]  # channels of the tensors that the up blocks concatenate, in order of their making
    incoming = unet.channels[0]
    for level, channels in enumerate(unet.channels):
        size = unet.size >> level
        yield from _resnet(size, incoming, channels)
        yield Conv(size, channels, channels, 3)
        skips += [channels] * unet.layers_per_block
        incoming = channels
        if level != last:
            yield Conv(size, channels, channels, 3, 2)
            skips.append(channels)
        if not unet.linear_projection and (unet.depth[level] or level == last):
            yield Conv(size, channels, channels, 1)
    for level in range(last, -1, -1):
        size, channels = unet.size >> level, unet.channels[level]
        for _ in range(unet.layers_per_block + 1):
            yield from _resnet(size, incoming + skips.pop(), channels)
            incoming = channels
        if level:
            yield Conv(2 * size, channels, channels, 3)


def group_norms(unet: UNet) -> list[tuple[int, int]]:
    """(side, channels) of what the resnets and the end of a UNet norm: what their 3x3 convolutions read."""
    level_of = {unet.size >> level: channels for level, channels in enumerate(unet.channels)}
    convs = [c for c in conv_layers(unet) if c.kernel == 3 and c.stride == 1 and c.outer == level_of[c.size]]
    return list(dict.fromkeys((conv.size, conv.channels) for conv in convs))


def _resnet(size: int, incoming: int, channels: int) -> Iterator[Conv]:
    yield Conv(size, incoming, channels, 3)
    if incoming != channels:
        yield Conv(size, incoming, channels, 1)


@dataclass(frozen=True)
class Variant:
    """One launch of one model; `others` more compile to the same code."""

    launch: Launch
    model: str
    dtype: torch.dtype
    others: int


def variants(
    arch: str,
    models: Iterable[str] = tuple(UNETS),
    dtypes: Iterable[torch.dtype] = DTYPES,
    ranks: Iterable[int] = RANKS,
) -> list[Variant]:
    """What the library launches on `arch`, one variant per compiled code: the one that moves most bytes."""
    found: dict[Any, list[Variant]] = {}
    for model in models:
        for dtype in dtypes:
            for launch in launches(model, dtype, arch, tuple(ranks)):
                found.setdefault(code_key(launch), []).append(Variant(launch, model, dtype, 0))
    chosen = []
    for same in found.values():
        most = max(same, key=lambda v: v.launch.bytes)
        chosen.append(Variant(most.launch, most.model, most.dtype, len({v.launch.name for v in same}) - 1))
    return chosen


def code_key(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that Triton compiles once: types, constexprs, and which numbers are 1 or multiples of 16."""
    numbers = tuple((_kind(v), v == 1, type(v) is int and v % 16 == 0) for v in launch.scalars.values())
    constexprs = tuple(launch.constexprs.items())
    kernel = launch.kernel.__name__
    return (kernel, tuple(launch.tensors.values()), numbers, constexprs, launch.num_warps, launch.num_stages)


def _kind(value: int | float) -> str:
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def launches(name: str, dtype: torch.dtype, arch: str, ranks: tuple[int, ...]) -> Iterator[Launch]:
    """All launches of one model in one dtype; many share their code."""
    model = UNETS.get(name) or TRANSFORMERS[name]
    halves = 2 if isinstance(model, UNet) else 1
    for adapters in ADAPTERS:
        for rows in (halves, halves * adapters):
            for rank in ranks:
                if supports(rank, dtype):
                    yield from _lora_launches(model, Lora(rows, adapters, rank, dtype), arch)
        if isinstance(model, UNet):
            yield from _step_launches(model, adapters, dtype, arch)
        else:
            yield from _transformer_step_launches(model, adapters, dtype, arch)
    for rank, weights in ROUTED:
        yield from _lora_launches(model, Lora(halves, 1, rank, dtype, weights), arch)


class Lora(NamedTuple):
    """What the rows of a batch carry: `adapters` slots of `rank` ranks, with token weights or 0."""

    rows: int
    adapters: int
    rank: int
    dtype: torch.dtype
    weights: int = 0


def _lora_launches(model: UNet | Transformer, lora: Lora, arch: str) -> Iterator[Launch]:
    rows, adapters, rank, dtype, weights = lora
    for layer in linear_layers(model) if isinstance(model, UNet) else transformer_layers(model):
        tokens, inner, outer, bias, parts = layer
        problem = Problem(rows, tokens, inner, outer, rank, parts, adapters, dtype, bias, weights)
        yield from _linear_launches(problem, arch)
        if outer == 8 * inner:  # a UNet's feed-forward, whose gate follows
            gated = problem._replace(gated=True)
            fused = choose(gated, arch).strategy == "fused"
            yield from (launch for _, launch in gated_launches(gated, arch, fused))
        if parts == 1 and not weights:
            yield merged_launch(problem, arch)
    for conv in conv_layers(model) if isinstance(model, UNet) else ():
        for channels_last in (False, True):
            yield from conv_launches(conv, lora, arch, channels_last)


def _linear_launches(problem: Problem, arch: str) -> Iterator[Launch]:
    adds = [launch for _, launch in add_launches(problem, arch)]
    if choose(problem, arch).strategy == "fused":
        yield linear_launch(problem, arch)
        adds = adds[1:]
    yield from adds


def conv_launches(conv: Conv, lora: Lora, arch: str, channels_last: bool = False) -> Iterator[Launch]:
    """The launches of one convolution; images are contiguous (NCHW) unless a pipeline is told otherwise."""
    rows, adapters, rank, dtype, weights = lora
    size, channels, outer, kernel, stride = conv
    pixels, taps = (size // stride) ** 2, kernel * kernel
    masks = (weights * pixels, pixels, 1) if weights else NO_WEIGHTS
    if kernel == 1:
        problem = Problem(rows, pixels, channels, outer, rank, 1, adapters, dtype, True, weights)
        if choose(problem, arch).strategy == "fused" and channels_last:
            yield from _linear_launches(problem, arch)
            return
        if choose(problem, arch).strategy == "fused":
            tokens, y = (channels * pixels, 1, pixels), (outer * pixels, 1, pixels)
            updates = (part_rank(problem), rank * channels, channels, outer * rank, rank, *y, *masks)
            yield linear_launch(problem, arch, (*tokens, channels, *updates))
            yield from (launch for _, launch in add_launches(problem, arch, (*tokens, *updates))[1:])
            return
    pair = (kernel // 2, kernel // 2)
    convolution = ConvProblem(
        rows,
        channels,
        size,
        size,
        outer,
        rank,
        adapters,
        dtype,
        (kernel, kernel),
        (stride, stride),
        pair,
        (1, 1),
        weights,
    )
    if channels_last:
        yield from (launch for _, launch in conv_add_launches(convolution, arch))
        return
    x = (channels * size * size, size * size, size, 1)
    a = (rank * channels * taps, channels * taps, 1, channels)  # channels innermost, as the adapter lays them
    strides = (*x, part_rank(convolution.as_linear()), *a, outer * rank, rank, outer * pixels, pixels, 1, *masks)
    yield from (launch for _, launch in conv_add_launches(convolution, arch, strides))


def _step_launches(unet: UNet, adapters: int, dtype: torch.dtype, arch: str) -> Iterator[Launch]:
    """What a step launches beside its layers: spectrum, choice, feature bank, combination."""
    size, rows = unet.size, 2 * adapters
    latents = (2, 4, size, size)
    spectrum = spectrum_launch(latents, (4 * size * size, size * size, size, 1), dtype, True, arch)
    parts, choice = spectrum.grid[0] * spectrum.grid[1], (0.4, 0, 1, adapters, 1.25, 0.75)
    yield spectrum
    for cutoff, chosen in ((None, None), (0.2, None), (0.2, choice)):
        yield finish_launch(2, size, size, parts, cutoff, chosen)
    for level, channels in enumerate(unet.channels):
        side = size >> level
        maps = (rows, channels, side, side)
        stride = (channels * side * side, side * side, side, 1)
        yield (each := spectrum_launch(maps, stride, dtype, False, arch))
        yield finish_launch(rows, side, side, each.grid[0] * each.grid[1], None, None)
    # the cache of branch (0, 1): the last up block's input
    deep, skip = unet.channels[1], unet.channels[0]
    for channels_last in (False, True):
        yield concat_channels_launch(rows, deep, skip, size * size, dtype, channels_last)
    yield scatter_launch(2, deep * size * size, dtype)
    latent = 4 * size * size
    yield combine_launch(adapters, 2, latent, dtype)
    for level, depth in enumerate(unet.depth):
        if depth:
            yield geglu_launch(rows * (size >> level) ** 2, 4 * unet.channels[level], dtype)
    for side, channels in group_norms(unet):
        for count in (1, 2, rows):
            for last in (False, True):
                images = Images(count, channels, side * side, 32, last, dtype)
                yield from group_norm_launches(images, dtype, 1e-5, arch)
    yield from _place_launches(size, adapters, dtype)


def _transformer_step_launches(model: Transformer, adapters: int, dtype: torch.dtype, arch: str) -> Iterator[Launch]:
    """The same of a transformer, on latents unpacked from their tokens; its cache is what the deep blocks add."""
    size, channels = model.size, model.channels
    latents = (1, channels, size, size)
    spectrum = spectrum_launch(latents, (channels * size * size, size * size, size, 1), dtype, True, arch)
    yield spectrum
    choice = (0.4, 0, 1, adapters, 1.25, 0.75)
    for cutoff, chosen in ((0.2, None), (0.2, choice)):
        yield finish_launch(1, size, size, spectrum.grid[0] * spectrum.grid[1], cutoff, chosen)
    for tokens in (model.image, model.image + model.text):
        yield scatter_launch(1, tokens * model.width, dtype)
    yield combine_launch(adapters, 1, channels * size * size, dtype)
    shape, strides = (1, 1, channels, size * size), (size * size, 1)
    for keep in (None, 0.7):
        yield strength_launch(shape, strides, adapters, 1, keep, dtype)
    yield local_launch(shape, strides, adapters, 0, dtype)
    yield regions_launch(shape, strides, adapters, dtype)
    for rows in (1, adapters):
        yield from _norm_launches(model, rows, dtype)


def _norm_launches(model: Transformer, rows: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Norms of the blocks of one image: its own modulation for all rows, queries and keys of both kinds of block."""
    width, both, head = model.width, model.image + model.text, (model.heads, model.width // model.heads)
    for tokens, count in ((model.image, 6), (model.text, 6), (both, 3)):  # shifts, scales and gates side by side
        yield modulated_launch((rows, tokens, width), 1, (tokens * width, count * width), dtype, 1e-6)
    yield rotary_launch((rows, both, *head), (0, 0), (both * width, 0), dtype, dtype, 1e-6)
    strides = (model.image * width, model.text * width)
    yield rotary_launch((rows, model.image, *head), (rows, model.text), strides, dtype, dtype, 1e-6)


def _place_launches(size: int, adapters: int, dtype: torch.dtype) -> Iterator[Launch]:
    """Masks of one image with guidance, and what is combined with them; one number of adapters in every form."""
    places, every = size * size, adapters == ADAPTERS[0]
    shape = (2, 1, 4, places)
    for strides in ((places, 1), (1, 4)) if every else ((places, 1),):
        for keep in (None, 0.7):
            yield strength_launch(shape, strides, adapters, 1, keep, dtype)
        for base in (0, None) if every else (0,):
            yield local_launch(shape, strides, adapters, base, dtype)
        yield regions_launch(shape, strides, adapters, dtype)
    for blur in (1, 3):
        yield blur_launch(adapters, 1, size, size, blur)
    for own, temperature in ((True, 0.6), (False, 0.25)):
        yield masks_launch(adapters, 1, places, temperature, own)
