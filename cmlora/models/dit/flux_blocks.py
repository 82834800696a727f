"""Flux's blocks over rows that share what they can: the modules' own arithmetic, in fewer launches.

Only for blocks that `is_plain` found to be what diffusers wrote; all others are called as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from cmlora.batch.rows import Shared
from cmlora.lora.plain import unhooked
from cmlora.models.dit.step import State, TransformerPart, alike, fused

LARGEST = 65504
"""Of float16, in which diffusers clips what the blocks hand on."""


def is_plain(block: Any) -> bool:
    """Whether a block is diffusers' own, nothing around it or what is not called as a module."""
    norms: tuple[Any, ...]
    kind: type[nn.Module]
    if type(block) is FluxTransformerBlock:
        norms, kind = (block.norm1, block.norm1_context), AdaLayerNormZero
    elif type(block) is FluxSingleTransformerBlock:
        norms, kind = (block.norm,), AdaLayerNormZeroSingle
    else:
        return False
    attn = block.attn
    return (
        type(attn) is FluxAttention
        and type(attn.processor) is FluxAttnProcessor
        and all(type(norm) is kind and type(norm.silu) is nn.SiLU for norm in norms)
        and all(map(unhooked, (block, attn, *norms, *(norm.silu for norm in norms))))
    )


def double_block(block: Any, part: TransformerPart, text: Shared, image: Shared) -> State:
    """FluxTransformerBlock.forward."""
    of_image, of_text = (_modulation(norm, part, 6) for norm in (block.norm1, block.norm1_context))
    x, y = (
        _modulated(norm.norm, part, stream, m[0], m[1])
        for norm, stream, m in ((block.norm1, image, of_image), (block.norm1_context, text, of_text))
    )
    attended = _attention(block.attn, part, x, y)
    to_text, to_image = part.apart((attended,))
    image = _gated(part, image, of_image[2], part.run(block.attn.to_out[1], part.run(block.attn.to_out[0], to_image)))
    image = _feed_forward(block.norm2, block.ff, part, image, of_image)
    text = _gated(part, text, of_text[2], part.run(block.attn.to_add_out, to_text))
    text = _feed_forward(block.norm2_context, block.ff_context, part, text, of_text)
    return _clipped(text), image


def single_block(block: Any, part: TransformerPart, state: State) -> State:
    """FluxSingleTransformerBlock.forward, text and image as one sequence."""
    x = part.joined(state)
    shift, scale, gate = _modulation(block.norm, part, 3)
    normed = _modulated(block.norm.norm, part, x, shift, scale)
    wide = part.run(block.act_mlp, part.run(block.proj_mlp, normed))
    attended, wide = alike(part.rows, _attention(block.attn, part, normed), wide)
    both = Shared(torch.cat([attended.value, wide.value], 2), wide.by_prediction, wide.by_half)
    return (_clipped(_gated(part, x, gate, part.run(block.proj_out, both))),)


def _modulation(norm: Any, part: TransformerPart, count: int) -> list[Shared]:
    """Shift, 1 + scale, gate, ... of a norm [rows, 1, width], of own rows where no adapter changes it."""
    given = part.run(norm.linear, part.activated)
    offsets = part.conditions.positions[3][: count // 3].view(1, count, 1)
    values = given.value.view(given.value.shape[0], count, -1) + offsets
    return [Shared(m, given.by_prediction, given.by_half) for m in values.chunk(count, 1)]


def _modulated(norm: Any, part: TransformerPart, x: Shared, shift: Shared, scale: Shared) -> Shared:
    """`scale` is 1 + scale."""
    return fused(part.rows, torch.addcmul, shift, part.run(norm, x), scale)


def _gated(part: TransformerPart, x: Shared, gate: Shared, change: Shared) -> Shared:
    return fused(part.rows, torch.addcmul, x, gate, change)


def _feed_forward(norm: Any, layers: Any, part: TransformerPart, x: Shared, modulation: list[Shared]) -> Shared:
    shift, scale, gate = modulation[3:]
    return _gated(part, x, gate, part.run(layers, _modulated(norm, part, x, shift, scale)))


def _clipped(x: Shared) -> Shared:
    if x.value.dtype != torch.float16:
        return x
    return Shared(x.value.clip(-LARGEST, LARGEST), x.by_prediction, x.by_half)


def _attention(attn: Any, part: TransformerPart, x: Shared, text: Shared | None = None) -> Shared:
    """[rows, tokens, width] behind the attention, before it is projected; text before the image."""
    given = [part.run(layer, x) for layer in (attn.to_q, attn.to_k, attn.to_v)]
    if text is not None:
        given += [part.run(layer, text) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    given = alike(part.rows, *given)
    query, key, value, *of_text = (g.value.view(*g.value.shape[:2], -1, attn.head_dim) for g in given)
    query, key = attn.norm_q(query), attn.norm_k(key)
    if text is not None:
        query = torch.cat([attn.norm_added_q(of_text[0]), query], 1)
        key = torch.cat([attn.norm_added_k(of_text[1]), key], 1)
        value = torch.cat([of_text[2], value], 1)
    turns = part.conditions.positions[2]
    backend = attn.processor._attention_backend
    out = dispatch_attention_fn(_turned(query, turns), _turned(key, turns), value, backend=backend)
    return Shared(out.flatten(2, 3).to(query.dtype), given[0].by_prediction, given[0].by_half)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions: pairs of x [rows, tokens, heads, width] as complex numbers, times turns [tokens, width / 2]."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)
