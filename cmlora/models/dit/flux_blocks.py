"""Flux's blocks over rows that share what they can: the modules' own arithmetic, in fewer launches.

Only for blocks that `is_plain` found to be what diffusers wrote; all others are called as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.normalization import AdaLayerNormZero, AdaLayerNormZeroSingle
from diffusers.models.transformers import transformer_flux
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn

from cmlora.batch.rows import Shared, lift
from cmlora.lora.plain import PLAIN, origin, unhooked
from cmlora.models.dit.step import State, TransformerPart, alike, fused
from cmlora_kernels import modulated_norm, rotary_norm

LARGEST = 65504
"""Of float16, in which diffusers clips what the blocks hand on."""


def is_plain(block: Any) -> bool:
    """Whether a block is diffusers' own, nothing around it or what is not called as a module."""
    if not all(origin(call).startswith(("diffusers.", "torch.")) for call in _calls()):
        return False  # of a class whose method was replaced, as recipes for faster or other attention do
    norms: tuple[Any, ...]
    names: tuple[str, ...]
    kind: type[nn.Module]
    if type(block) is FluxTransformerBlock:
        norms, kind = (block.norm1, block.norm1_context), AdaLayerNormZero
        layer_norms, names = [block.norm2, block.norm2_context], ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    elif type(block) is FluxSingleTransformerBlock:
        norms, kind = (block.norm,), AdaLayerNormZeroSingle
        layer_norms, names = [], ("norm_q", "norm_k")
    else:
        return False
    attn = block.attn
    if type(attn) is not FluxAttention or not all(type(norm) is kind for norm in norms):
        return False
    layer_norms += [norm.norm for norm in norms]
    head_norms = [getattr(attn, name) for name in names]
    return (
        type(attn.processor) is FluxAttnProcessor
        and all(type(norm.silu) is nn.SiLU for norm in norms)
        and all(type(norm) is nn.LayerNorm and norm.weight is None for norm in layer_norms)
        and all(type(norm) is nn.RMSNorm for norm in head_norms)
        and all(type(norm.weight) in PLAIN and norm.eps is not None for norm in head_norms)
        and all(map(unhooked, (block, attn, *norms, *(norm.silu for norm in norms), *layer_norms, *head_norms)))
    )


def _calls() -> Iterator[Any]:
    """What the functions below stand for."""
    yield from (FluxAttnProcessor.__call__, transformer_flux.apply_rotary_emb)
    blocks, norms = (FluxTransformerBlock, FluxSingleTransformerBlock), (AdaLayerNormZero, AdaLayerNormZeroSingle)
    yield from (kind.forward for kind in (*blocks, FluxAttention, *norms, nn.LayerNorm, nn.RMSNorm, nn.SiLU))


def double_block(block: Any, part: TransformerPart, text: Shared, image: Shared) -> State:
    """FluxTransformerBlock.forward."""
    of_image, of_text = (_modulation(norm, part, 6) for norm in (block.norm1, block.norm1_context))
    x, y = (
        _modulated(norm.norm, part, stream, *m[:2])
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
    """Shift, scale, gate, ... of a norm [rows, 1, width], of own rows where no adapter changes it."""
    given = part.run(norm.linear, part.activated)
    values = given.value.view(given.value.shape[0], count, -1)
    return [Shared(m, given.by_prediction, given.by_half) for m in values.chunk(count, 1)]


def _modulated(norm: Any, part: TransformerPart, x: Shared, shift: Shared, scale: Shared) -> Shared:
    if x.by_prediction or shift.by_prediction:  # rows repeat by predictions alone
        x, shift, scale = (lift(t, part.rows, by_half=x.by_half or shift.by_half) for t in (x, shift, scale))
    dtype = torch.promote_types(x.value.dtype, shift.value.dtype)  # some layers quantised, others not
    y = modulated_norm(x.value.to(dtype), shift.value.to(dtype), scale.value.to(dtype), norm.eps, part.batched.backend)
    return Shared(y, x.by_prediction or shift.by_prediction, x.by_half or shift.by_half)


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
    turns, how = part.conditions.positions[2], part.batched.backend
    if text is None:
        query = rotary_norm(query, attn.norm_q.weight, turns, attn.norm_q.eps, backend=how)
        key = rotary_norm(key, attn.norm_k.weight, turns, attn.norm_k.eps, backend=how)
    else:
        of_query, of_key = attn.norm_added_q, attn.norm_added_k
        query = rotary_norm(query, attn.norm_q.weight, turns, attn.norm_q.eps, of_text[0], of_query.weight, how)
        key = rotary_norm(key, attn.norm_k.weight, turns, attn.norm_k.eps, of_text[1], of_key.weight, how)
        value = torch.cat([of_text[2], value], 1)
    out = dispatch_attention_fn(query, key, value, backend=attn.processor._attention_backend)
    return Shared(out.flatten(2, 3).to(query.dtype), given[0].by_prediction, given[0].by_half)
