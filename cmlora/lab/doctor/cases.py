"""What the kernels' part checks: every kernel variant that SD1.5 and SDXL launch, as calls with their float64 answers.

A case makes its own tensors, of unit variance all the way, and gives back the kernel's result, the definition's in the
same precision and the definition's in float64, on a few tokens of the layer: all tiles are run, a few are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cmlora_kernels as ck
from cmlora_kernels.launch import Launch, arch_of
from cmlora_kernels.merged_bank import merged_launch
from cmlora_kernels.multi_lora import add_definition, linear_definition
from cmlora_kernels.multi_lora_add import add_launches, triton_add
from cmlora_kernels.multi_lora_conv import ConvProblem, conv_add_launches
from cmlora_kernels.multi_lora_linear import fused_linear, linear_launch
from cmlora_kernels.tiles import Problem, rank_chunks
from cmlora_kernels.variants import UNETS, code_key, conv_layers, linear_layers

COMPARED = 64  # tokens of a row, or so


class Results(NamedTuple):
    """Of one case: the kernel's, the definition's in the same precision, the definition's in float64.

    `whole` is all that the kernel wrote: no number of it may be missing.
    """

    got: Tensor
    definition: Tensor
    exact: Tensor
    whole: Tensor


class Case(NamedTuple):
    """A check: its name, and what computes it on a device."""

    name: str
    run: Callable[[torch.device], Results]


class Inputs(NamedTuple):
    """Tensors of a linear layer as `multi_lora_linear` takes them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    slots: Tensor
    a: Tensor
    b: Tensor
    scales: Tensor
    token_weights: Tensor | None
    groups: Tensor | None

    def double(self, tokens: Tensor) -> Inputs:
        """Of some tokens, what the kernel rounds in float64."""
        return self._at(tokens, lambda t: t.double())

    def some(self, tokens: Tensor) -> Inputs:
        """Of some tokens."""
        return self._at(tokens, lambda t: t)

    def _at(self, tokens: Tensor, cast: Callable[[Tensor], Tensor]) -> Inputs:
        weights = None if self.token_weights is None else self.token_weights[:, :, tokens]
        bias = None if self.bias is None else cast(self.bias)
        layer = (cast(self.x[:, tokens]), cast(self.weight), bias, self.slots, cast(self.a), cast(self.b))
        return Inputs(*layer, self.scales, weights, self.groups)


def make_inputs(p: Problem, device: torch.device, *, odd: bool = False) -> Inputs:
    """Random ones; slots hold the base layer, too. `odd`: x begins 2 bytes off and has gaps between its rows."""
    g = torch.Generator(device.type).manual_seed(p.tokens + p.inner + p.rank)

    def normal(*shape: int, fan: int = 1) -> Tensor:
        drawn: Tensor = torch.randn(shape, generator=g, device=device) / fan**0.5
        return drawn.to(p.dtype)

    x = normal(p.rows, p.tokens, p.inner + 1)[..., 1:] if odd else normal(p.rows, p.tokens, p.inner)
    slots = torch.arange(p.rows, device=device) % (p.adapters + 1) - 1
    a, b = normal(p.adapters, p.parts * p.rank, p.inner, fan=p.inner), normal(p.adapters, p.outer, p.rank, fan=p.rank)
    scales = torch.rand(p.adapters, p.parts, generator=g, device=device) + 0.5
    weights = groups = None
    if p.weights:
        weights = torch.rand(p.rows, p.weights, p.tokens, generator=g, device=device)
        groups = (torch.arange(p.parts * p.rank, device=device) % p.weights).to(torch.int32).repeat(p.adapters, 1)
    bias = normal(p.outer) if p.bias else None
    return Inputs(x, normal(p.outer, p.inner, fan=p.inner), bias, slots, a, b, scales, weights, groups)


def _tokens(count: int, device: torch.device) -> Tensor:
    """The first ones, the last ones and some between."""
    if count <= COMPARED:
        return torch.arange(count, device=device)
    third = COMPARED // 3
    between = torch.linspace(third, count - third - 1, third, device=device).long()
    ends = torch.arange(third, device=device), torch.arange(count - third, count, device=device)
    return torch.cat([ends[0], between, ends[1]])


def _fused(p: Problem, device: torch.device, *, odd: bool = False) -> Results:
    i = make_inputs(p, device, odd=odd)
    y = torch.full((p.rows, p.tokens, p.outer), float("nan"), dtype=p.dtype, device=device)
    fused_linear(*i[:7], y, i.token_weights, i.groups)
    if len(rank_chunks(p.rank, p.dtype, arch_of(device))) > 1:
        triton_add(y, i.x, *i[3:7], i.token_weights, i.groups, done=1)
    at = _tokens(p.tokens, device)
    return Results(y[:, at], linear_definition(*i.some(at)), linear_definition(*i.double(at)), y)


def _add(p: Problem, device: torch.device, *, odd: bool = False) -> Results:
    i = make_inputs(p, device, odd=odd)
    before = torch.randn((p.rows, p.tokens, p.outer), device=device).to(p.dtype)
    y, at = before.clone(), _tokens(p.tokens, device)
    triton_add(y, i.x, *i[3:7], i.token_weights, i.groups)
    low, exact = i.some(at), i.double(at)
    definition = add_definition(before[:, at], low.x, *low[3:])
    return Results(y[:, at], definition, add_definition(before[:, at].double(), exact.x, *exact[3:]), y)


def _merged(p: Problem, device: torch.device, *, odd: bool = False) -> Results:
    i, at = make_inputs(p, device, odd=odd), _tokens(p.tokens, device)
    bank = ck.merge_weights(i.weight, i.a, i.b, i.scales)
    y = ck.merged_linear(i.x, bank, i.bias, i.slots, "triton")
    low, exact = i.some(at), i.double(at)
    definition = ck.merged_linear(low.x, bank, low.bias, i.slots, "torch")
    return Results(y[:, at], definition, ck.merged_linear(exact.x, bank.double(), exact.bias, i.slots, "torch"), y)


def _conv(p: ConvProblem, device: torch.device, *, channels_last: bool = False) -> Results:
    g = torch.Generator(device.type).manual_seed(p.channels)
    fan = p.channels * p.kernel[0] * p.kernel[1]
    x = torch.randn(p.rows, p.channels, p.height, p.width, generator=g, device=device).to(p.dtype)
    a = torch.randn(p.adapters, p.rank, *p.kernel, p.channels, generator=g, device=device) / fan**0.5
    a = a.to(p.dtype).permute(0, 1, 4, 2, 3)  # channels innermost, as the adapter lays them
    b = (torch.randn(p.adapters, p.out, p.rank, generator=g, device=device) / p.rank**0.5).to(p.dtype)
    scales = torch.rand(p.adapters, 1, generator=g, device=device) + 0.5
    before = torch.randn(p.rows, p.out, *p.out_size(), generator=g, device=device).to(p.dtype)
    if channels_last:
        x, before = (t.contiguous(memory_format=torch.channels_last) for t in (x, before))
    slots = torch.arange(p.rows, device=device) % (p.adapters + 1) - 1
    how: dict[str, Any] = {"stride": p.stride, "padding": p.padding, "dilation": p.dilation}
    if p.weights:
        how["token_weights"] = torch.rand(p.rows, p.weights, *p.out_size(), generator=g, device=device)
        how["groups"] = (torch.arange(p.rank, device=device) % p.weights).to(torch.int32).repeat(p.adapters, 1)
    got = ck.multi_lora_conv2d_add_(before.clone(), x, slots, a, b, scales, backend="triton", **how)
    definition = ck.multi_lora_conv2d_add_(before.clone(), x, slots, a, b, scales, backend="torch", **how)
    wide = (before.double(), x.double(), slots, a.double(), b.double(), scales)
    return Results(got, definition, ck.multi_lora_conv2d_add_(*wide, backend="torch", **how), got)


LAYERS: dict[str, tuple[Callable[..., Results], Callable[[Problem, str], Launch]]] = {
    "fused": (_fused, linear_launch),
    "add": (_add, lambda p, target: add_launches(p, target)[0][1]),
    "merged": (_merged, merged_launch),
}


def variants_of(target: str, dtype: torch.dtype, ranks: Sequence[int]) -> list[Case]:
    """One case per compiled code of the layers of both models in one dtype: the one that moves least."""
    found: dict[Any, tuple[int, Case]] = {}

    def keep(kind: str, launch: Launch, run: Callable[[torch.device], Results]) -> None:
        key, name = (kind, code_key(launch)), f"{kind} {launch.name.partition(' ')[2]}"
        if kind.startswith("conv"):
            name = f"{launch.name} {kind.partition(' ')[2]}".strip()
        if key not in found or launch.bytes < found[key][0]:
            found[key] = (launch.bytes, Case(name, run))

    for unet in UNETS.values():
        for rows in (2, 10):
            for rank, weights in [(rank, 0) for rank in ranks] + [(80, 5)] * (16 in ranks):
                for tokens, inner, outer, bias, parts in linear_layers(unet):
                    p = Problem(rows, tokens, inner, outer, rank, parts, 2, dtype, bias, weights)
                    for kind, (run, launch) in LAYERS.items():
                        if kind != "merged" or (parts == 1 and not weights and rank == ranks[0]):
                            keep(kind, launch(p, target), _bound(run, p))
                for size, channels, outer, kernel, stride in conv_layers(unet):
                    sizes = (rows, channels, size, size, outer, rank, 2, dtype)
                    pair = (kernel // 2, kernel // 2)
                    conv = ConvProblem(*sizes, (kernel, kernel), (stride, stride), pair, (1, 1), weights)
                    launch_of = conv_add_launches(conv, target)[0][1]
                    keep("conv", launch_of, _bound(_conv, conv))
                    keep("conv channels_last", launch_of, _bound(_conv, conv, channels_last=True))
    return [case for _, case in sorted(found.values(), key=lambda pair: pair[0])]


def _bound(run: Callable[..., Results], p: Any, **how: Any) -> Callable[[torch.device], Results]:
    return lambda device: run(p, device, **how)


def small_layers(dtypes: Sequence[torch.dtype], ranks: Sequence[int], *, tokens: int = 33) -> Iterator[Case]:
    """Every layer kernel on small shapes that nothing divides and on aligned ones; a rank in two chunks."""
    for dtype in dtypes:
        word = str(dtype).removeprefix("torch.")
        for rank in ranks:
            sizes = {"aligned": (2, 64, 64, 96), "odd": (3, tokens, 70, 45)}
            for shape, (rows, count, inner, outer) in sizes.items():
                for kind, (run, _) in LAYERS.items():
                    p = Problem(rows, count, inner, outer, rank, 1, 2, dtype, True)
                    if kind != "merged" or rank == ranks[0]:
                        yield Case(f"{kind} {shape} r{rank} {word}", _bound(run, p, odd=shape == "odd"))
            for last in (False, True):
                conv = ConvProblem(2, 20, 7, 6, 24, rank, 2, dtype, (3, 3), (1, 1), (1, 1))
                name = f"conv3x3 odd r{rank} {word}" + (" channels_last" if last else "")
                yield Case(name, _bound(_conv, conv, channels_last=last))
        stacked = Problem(2, tokens, 64, 96, ranks[0], 3, 2, dtype, False)
        masked = Problem(2, tokens, 64, 48, 24, 1, 1, dtype, False, 3)
        for name, p in (("stacked", stacked), ("token weights", masked)):
            for kind in ("fused", "add"):
                yield Case(f"{kind} {name} {word}", _bound(LAYERS[kind][0], p))
