"""Group norm and SiLU: y = silu(group_norm(x)), as a UNet's resnets begin (arXiv 1803.08494, 1702.03118)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cmlora_kernels.chips import LAUNCH_SECONDS, data_sheet, split
from cmlora_kernels.dispatch import Backend, check_backend, register, use_triton
from cmlora_kernels.launch import POINTER, Launch, arch_of
from cmlora_kernels.layout import dense_format
from cmlora_kernels.tiles import cdiv
from cmlora_kernels.triton_shim import tl, triton

BLOCK_BYTES = 32768  # of x in flight per program: in fp16 four 16-byte loads in each of 512 threads
THREAD_NUMBERS = 32  # of a block; in float32 half of them, in twice as many threads, spilled on sm_80
SECTOR = 16  # channels_last: a program's channels are a multiple of it, 32 bytes in fp16, what memory is read by
LANES = 256  # channels_last: no more channels a program, so that a block has 64 places and a thread some of one channel
SLICES = 64  # at most, of a group's places
LATENCY = 1e-6  # seconds of a load while the bus is busy, assumed: about twice an idle one's


class Tile(NamedTuple):
    """What one program does.

    Attributes:
        groups: whole groups of one image. slices: parts of their places, each a program's; 1: one launch for all.
        channels, places: a block of the second reading; channels_last, of the first one, too.
        block: of the first reading of contiguous images, where a group is one run of numbers.
    """

    groups: int
    slices: int
    channels: int
    places: int
    block: int
    num_warps: int


@triton.jit
def _over_groups(values, width, GROUPS: tl.constexpr):
    """[C] summed over the `width` channels of each group, [G]; those behind the last group are left out."""
    group, channel = tl.arange(0, GROUPS), tl.arange(0, values.shape[0])
    return tl.sum(tl.where(channel[None, :] // width == group[:, None], values[None, :], 0.0), 1)


@triton.jit
def _per_channel(values, channel, width):
    """[G] to the channels of each group, [C]; 0 behind the last."""
    group = tl.arange(0, values.shape[0])
    return tl.sum(tl.where(channel[:, None] // width == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def _moments(
    x_ptr, channels, width, places, channel_stride, place_stride, part, parts,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of each group over every `parts`-th block of places.

    Every lane goes by itself (Welford), so nothing cancels, whatever the mean; then lanes, then channels are joined.
    """
    channel, place = tl.arange(0, CHANNELS), tl.arange(0, PLACES)
    mean = tl.zeros((CHANNELS, PLACES), tl.float32)
    squares = tl.zeros((CHANNELS, PLACES), tl.float32)
    number = 0.0
    for start in range(part * PLACES, places, parts * PLACES):
        inside = (channel < channels)[:, None] & (start + place < places)[None, :]
        x_ptrs = x_ptr + channel[:, None] * channel_stride + (start + place)[None, :] * place_stride
        x = tl.load(x_ptrs, inside, 0.0).to(tl.float32)
        number += 1.0
        apart = tl.where(inside, x - mean, 0.0)
        mean += apart * (1.0 / number)
        squares += apart * (x - mean)
    blocks = tl.maximum((places - place + PLACES - 1) // PLACES - part, 0)
    seen = (blocks + parts - 1) // parts  # per lane: the last block may be short
    weight, count = seen.to(tl.float32)[None, :], tl.sum(seen, 0).to(tl.float32)
    of_channel = tl.sum(mean * weight, 1) / count
    apart = mean - of_channel[:, None]
    squares = tl.sum(squares + weight * apart * apart, 1)
    of_group = _over_groups(of_channel, width, GROUPS) / width
    apart = of_channel - _per_channel(of_group, channel, width)
    return count * width, of_group, _over_groups(squares + count * apart * apart, width, GROUPS)


@triton.jit
def _place_of(channels, taken, places, LAST: tl.constexpr):
    """Where this program's channels begin: in x, int64, and in the weights."""
    tiles = channels // taken
    row, first = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles * taken
    return row * channels * places + (first if LAST else first * places), first


@triton.jit
def _first_reading(
    x_ptr, channels, taken, width, places, part, parts,
    LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if LAST:
        moments = _moments(x_ptr, taken, width, places, 1, channels, part, parts, GROUPS, CHANNELS, PLACES)
    else:
        moments = _moments(x_ptr, 1, 1, width * places, 0, 1, part, parts, 1, 1, BLOCK)
    return moments


@triton.jit
def _second_reading(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean, scale, channels, taken, width, places, part, parts,
    LAST: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """y of every `parts`-th block; all pointers at the program's first channel."""
    across = tl.cdiv(places, PLACES)
    for block in range(part, tl.cdiv(taken, CHANNELS) * across, parts):
        channel = block // across * CHANNELS + tl.arange(0, CHANNELS)
        place = block % across * PLACES + tl.arange(0, PLACES)
        here = channel < taken
        inside = here[:, None] & (place < places)[None, :]
        offsets = channel[:, None] * (1 if LAST else places) + place[None, :] * (channels if LAST else 1)
        x = tl.load(x_ptr + offsets, inside, 0.0).to(tl.float32)
        factor = tl.load(weight_ptr + channel, here, 0.0).to(tl.float32) * _per_channel(scale, channel, width)
        bias = tl.load(bias_ptr + channel, here, 0.0).to(tl.float32)
        y = (x - _per_channel(mean, channel, width)[:, None]) * factor[:, None] + bias[:, None]
        y = y / (1.0 + tl.exp(-y))
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def group_norm_silu_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, channels, taken, width, places, eps,
    LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program's groups from beginning to end; the second reading is of what it has just read."""
    begin, first = _place_of(channels, taken, places, LAST)
    count, mean, squares = _first_reading(
        x_ptr + begin, channels, taken, width, places, 0, 1, LAST, GROUPS, CHANNELS, PLACES, BLOCK
    )
    scale = tl.rsqrt(squares / count + eps)
    _second_reading(
        x_ptr + begin, weight_ptr + first, bias_ptr + first, y_ptr + begin,
        mean, scale, channels, taken, width, places, 0, 1, LAST, CHANNELS, PLACES,
    )  # fmt: skip


@triton.jit
def moments_kernel(
    x_ptr, parts_ptr, channels, taken, width, places,
    LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[rows * groups, slices, 3]: count, mean and squared deviations of a slice."""
    begin, _ = _place_of(channels, taken, places, LAST)
    part, parts = tl.program_id(1), tl.num_programs(1)
    count, mean, squares = _first_reading(
        x_ptr + begin, channels, taken, width, places, part, parts, LAST, GROUPS, CHANNELS, PLACES, BLOCK
    )
    ptrs = parts_ptr + ((tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)) * parts + part) * 3
    tl.store(ptrs, tl.zeros_like(mean) + count)
    tl.store(ptrs + 1, mean)
    tl.store(ptrs + 2, squares)


@triton.jit
def apply_kernel(
    x_ptr, weight_ptr, bias_ptr, parts_ptr, y_ptr, channels, taken, width, places, eps,
    LAST: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """A slice of y; every program joins the slices' moments anew, in one order."""
    begin, first = _place_of(channels, taken, places, LAST)
    part, parts = tl.program_id(1), tl.num_programs(1)
    group, other = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS), tl.arange(0, SLICES)
    ptrs = parts_ptr + (group[:, None] * parts + other[None, :]) * 3
    known = tl.broadcast_to((other < parts)[None, :], (GROUPS, SLICES))
    count, means = tl.load(ptrs, known, 0.0), tl.load(ptrs + 1, known, 0.0)
    total = tl.sum(count, 1)
    mean = tl.sum(count * means, 1) / total
    apart = means - mean[:, None]
    squares = tl.sum(tl.load(ptrs + 2, known, 0.0) + count * apart * apart, 1)
    _second_reading(
        x_ptr + begin, weight_ptr + first, bias_ptr + first, y_ptr + begin,
        mean, tl.rsqrt(squares / total + eps), channels, taken, width, places, part, parts, LAST, CHANNELS, PLACES,
    )  # fmt: skip


def group_norm_silu_definition(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`group_norm_silu` in plain torch."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps)).contiguous(memory_format=dense_format(x))


class Images(NamedTuple):
    """What lies where: [rows, channels, places] in `groups` groups, channels innermost if `last`."""

    rows: int
    channels: int
    places: int
    groups: int
    last: bool
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.channels // self.groups

    @property
    def bytes(self) -> int:
        return self.rows * self.channels * self.places * self.dtype.itemsize


@functools.lru_cache(maxsize=1024)
def tile_of(p: Images, arch: str) -> Tile:
    """How the images are cut.

    A group of a contiguous image is one run of numbers: a program each. channels_last, a place has `width` numbers of
    it, so a program takes as many groups as fill whole sectors.
    """
    most, groups = BLOCK_BYTES // p.dtype.itemsize, 1
    if p.last:
        fitting = (n for n in (1, 2, 4, 8, 16) if not p.groups % n and n * p.width <= LANES)
        groups = next((n for n in fitting if not n * p.width % SECTOR), 1)
    block = min(most, _power(groups * p.width * p.places))
    lanes = _power(groups * p.width)
    places = block // lanes if p.last else min(block, _power(p.places))
    channels = lanes if p.last else min(lanes, block // places)
    warps = min(16, max(4, block // (32 * THREAD_NUMBERS)))
    blocks = cdiv(p.places, places) if p.last else cdiv(p.width * p.places, block)
    slices = _slices(p, p.rows * p.groups // groups, blocks, arch)
    return Tile(groups, slices, channels, places, block, warps)


def _slices(p: Images, programs: int, blocks: int, arch: str) -> int:
    """1: a program reads its groups twice, the second time out of a cache; more: two launches read x from memory.

    Few programs have too few loads in flight to keep the bus busy. The data sheet, not what was measured on the card:
    slices change the last bit.
    """
    bandwidth = data_sheet(*split(arch)).bandwidth
    wanted = bandwidth * LATENCY / BLOCK_BYTES
    whole = 2 * p.bytes / (bandwidth * min(1.0, programs / wanted))
    if whole <= 3 * p.bytes / bandwidth + LAUNCH_SECONDS:
        return 1
    return min(SLICES, blocks, cdiv(int(wanted) + 1, programs))


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()


@functools.lru_cache(maxsize=256)
def group_norm_launches(p: Images, weight: torch.dtype, eps: float, arch: str) -> tuple[Launch, ...]:
    """One launch, or two where the places are in slices; `weight`: dtype of weight and bias."""
    tile, x, w = tile_of(p, arch), POINTER[p.dtype], POINTER[weight]
    programs, parts = p.rows * p.groups // tile.groups, 12 * p.rows * p.groups * tile.slices
    # each program loads the weights of a block's channels anew for every block of places
    weights = 2 * weight.itemsize * p.rows * p.channels * cdiv(p.places, tile.places)
    own = 2 * weight.itemsize * p.channels
    numbers: dict[str, int | float] = {
        "channels": p.channels,
        "taken": tile.groups * p.width,  # given, not computed: Triton learns what divides it
        "width": p.width,
        "places": p.places,
    }
    cut = {"LAST": p.last, "GROUPS": tile.groups, "CHANNELS": tile.channels, "PLACES": tile.places}

    def launch(kernel: object, what: str, tensors: dict[str, str], moved: int, unique: int) -> Launch:
        last = {"SLICES": SLICES} if kernel is apply_kernel else {"BLOCK": tile.block}
        return Launch(
            kernel=kernel,
            name=f"{what} {p.rows}x{p.channels}x{p.places}/{p.groups}" + (" channels_last" if p.last else ""),
            tensors=tensors,
            scalars=numbers if kernel is moments_kernel else {**numbers, "eps": float(eps)},
            constexprs={**cut, **last},
            grid=(programs, tile.slices, 1),
            num_warps=tile.num_warps,
            num_stages=1,
            bytes=moved,
            unique_bytes=unique,
            flops=0,
        )

    given = {"x_ptr": x, "weight_ptr": w, "bias_ptr": w}
    if tile.slices == 1:
        tensors = {**given, "y_ptr": x}
        whole = (3 * p.bytes + weights, 2 * p.bytes + own)
        return (launch(group_norm_silu_kernel, "group_norm_silu", tensors, *whole),)
    statistics = (p.bytes + parts, p.bytes + parts)
    applied = (2 * p.bytes + weights + parts * tile.slices, 2 * p.bytes + own + parts)
    return (
        launch(moments_kernel, "group_norm_silu moments", {"x_ptr": x, "parts_ptr": "*fp32"}, *statistics),
        launch(apply_kernel, "group_norm_silu apply", {**given, "parts_ptr": "*fp32", "y_ptr": x}, *applied),
    )


def images_of(x: Tensor, groups: int) -> Images:
    """What `group_norm_launches` asks of x, dense in one of the two formats."""
    last = dense_format(x) is torch.channels_last
    return Images(x.shape[0], x.shape[1], x.shape[2:].numel(), groups, last, x.dtype)


def _body(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    served = x.dtype in POINTER and weight.dtype in POINTER and x.numel() > 0 and x[:1].numel() < 2**31
    if not (use_triton(x, backend) and served):
        return group_norm_silu_definition(x, groups, weight, bias, eps)
    y, x = _fake(x, groups, weight, bias, eps, backend), x.contiguous(memory_format=dense_format(x))
    weight, bias = weight.contiguous(), bias.contiguous()
    p = images_of(x, groups)
    whole, *rest = group_norm_launches(p, weight.dtype, eps, arch_of(x.device))
    if not rest:
        whole(x, weight, bias, y)
        return y
    parts = x.new_empty(p.rows * groups, whole.grid[1], 3, dtype=torch.float32)
    whole(x, parts)
    rest[0](x, weight, bias, parts, y)
    return y


def _fake(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, backend: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=dense_format(x))


_op = register(
    "group_norm_silu(Tensor x, int groups, Tensor weight, Tensor bias, float eps, str backend) -> Tensor", _body, _fake
)


def group_norm_silu(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """silu(group_norm(x)), y sigmoid(y), statistics and all arithmetic in float32, rounded once.

    Args:
        x: [rows, channels, ...] of a float dtype; dense and channels_last are read where they lie, others copied.
        groups: of channels; each group of each row is normalised by its own mean and variance.
        weight, bias: [channels] of x's dtype.
        eps: added to the variance.
        backend: "auto", "torch" or "triton".

    Returns:
        [rows, channels, ...] of x's dtype, channels_last where x is.

    Raises:
        ValueError: shapes or dtypes that do not fit, or an unknown backend.
    """
    check_backend(backend)
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be [rows, channels, ...] of a float dtype, got {tuple(x.shape)} {x.dtype}")
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must divide {channels} channels, got {groups}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t.shape != (channels,) or t.dtype != x.dtype:
            raise ValueError(f"{name} must be [{channels}] {x.dtype}, got {tuple(t.shape)} {t.dtype}")
    y: Tensor = _op(x, groups, weight, bias, eps, backend)
    return y
