"""A resnet and a transformer over rows that share what they can: the modules' own arithmetic, in fewer launches.

Only for modules that `conditions.py` found plain; all others are called as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional as F

from cmlora.batch.rows import Rows, Shared, add, lift
from cmlora.lora.layers import MultiLoraLinear, forward_of
from cmlora.lora.plain import as_torch_wrote, unhooked, weights_alone
from cmlora.models.unet.conditions import UNetConditions
from cmlora_kernels import geglu, group_norm_silu
from cmlora_kernels.cpu_linear import linear
from cmlora_kernels.dispatch import Backend

LARGE, TOKENS = 2**23, 2048
"""On the CPU a feed-forward of more bytes than that goes through so many tokens at a time."""


def plain_resnet(module: Any, x: Shared, conditions: UNetConditions, bias: Tensor, rows: Rows) -> Shared:
    """ResnetBlock2D.forward, its time bias given: [1, channels], of own rows, or of all rows that x has."""
    x = lift(x, rows, by_prediction=module in conditions.carrying, by_half=bias.shape[0] > 1)
    hidden = module.conv1(norm_silu(module.norm1, module.nonlinearity, x.value, conditions.backend))
    if bias.shape[0] == 1:
        hidden = hidden + bias[:, :, None, None]
    else:
        hidden = (hidden.view(-1, bias.shape[0], *hidden.shape[1:]) + bias[:, :, None, None]).flatten(0, 1)
    hidden = norm_silu(module.norm2, module.nonlinearity, hidden, conditions.backend)
    hidden = module.conv2(module.dropout(hidden))
    shortcut = x.value if module.conv_shortcut is None else module.conv_shortcut(x.value)
    hidden = shortcut + hidden
    if module.output_scale_factor != 1:
        hidden = hidden / module.output_scale_factor
    return Shared(hidden, x.by_prediction, x.by_half)


def norm_silu(norm: Any, activation: Any, x: Tensor, backend: Backend) -> Tensor:
    """activation(norm(x)), as one kernel where kernels run and the two are torch's group norm and SiLU alone."""
    if not (_run_kernels(x, backend) and as_torch_wrote(activation, nn.SiLU) and _norms(norm, x)):
        whole: Tensor = activation(norm(x))
        return whole
    return group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, norm.eps, backend)


def _run_kernels(x: Tensor, backend: Backend) -> bool:
    """On the CPU modules are called, or computed in a way that suits it."""
    return x.device.type != "cpu" or backend == "triton"


def _norms(norm: Any, x: Tensor) -> bool:
    """Whether a norm is a group norm's arithmetic on weights of x's dtype."""
    if not weights_alone(norm, nn.GroupNorm) or norm.bias is None:
        return False
    dtypes: set[torch.dtype] = {norm.weight.dtype, norm.bias.dtype}
    return dtypes == {x.dtype}


def plain_transformer(module: Any, x: Shared, conditions: UNetConditions, rows: Rows, everyone: Rows) -> Shared:
    """Transformer2DModel.forward on a feature map [rows, channels, height, width]."""
    _, _, height, width = x.value.shape
    tokens = Shared(module.norm(x.value), x.by_prediction, x.by_half)
    if module.proj_in in conditions.carrying:
        tokens = lift(tokens, rows, by_prediction=True)
    if module.use_linear_projection:
        projected = module.proj_in(_to_tokens(tokens.value))
    else:
        projected = _to_tokens(module.proj_in(tokens.value))
    tokens = Shared(projected, tokens.by_prediction, tokens.by_half)
    for block in module.transformer_blocks:
        tokens = _block(block, tokens, conditions, rows, everyone)
    if module.proj_out in conditions.carrying:
        tokens = lift(tokens, rows, by_prediction=True)
    if module.use_linear_projection:
        out = _to_map(module.proj_out(tokens.value), height, width)
    else:
        out = module.proj_out(_to_map(tokens.value, height, width))
    return add(Shared(out, tokens.by_prediction, tokens.by_half), x, rows)


def _block(block: Any, tokens: Shared, conditions: UNetConditions, rows: Rows, everyone: Rows) -> Shared:
    """BasicTransformerBlock.forward with layer norms: self-attention, cross-attention, feed-forward."""
    x = Shared(block.norm1(tokens.value), tokens.by_prediction, tokens.by_half)
    tokens = add(_self_attention(block.attn1, x, conditions, rows), tokens, rows)

    x = Shared(block.norm2(tokens.value), tokens.by_prediction, tokens.by_half)
    tokens = add(_cross_attention(block.attn2, x, conditions, rows, everyone), tokens, rows)

    x = Shared(block.norm3(tokens.value), tokens.by_prediction, tokens.by_half)
    if block.ff in conditions.carrying:
        x = lift(x, rows, by_prediction=True)
    changed = _feed_forward(block.ff, x.value, conditions.backend)
    return add(Shared(changed, x.by_prediction, x.by_half), tokens, rows)


def _feed_forward(module: Any, x: Tensor, backend: Backend) -> Tensor:
    """FeedForward.forward, its gate as one kernel where kernels run.

    On the CPU in parts where x is large: what lies between its layers is eight times as wide, and the C library's
    allocator hands large blocks back at once, and the next one's pages are then made anew.
    """
    kernels = _run_kernels(x, backend)
    if kernels and _is_gated(module):
        first, *rest = module.net
        forward = forward_of(first.proj)
        changed = forward.through_gate(x) if isinstance(forward, MultiLoraLinear) else None
        changed = geglu(first.proj(x), backend) if changed is None else changed
        for layer in rest:
            changed = layer(changed)
        return changed
    if kernels or not _is_plain(module):
        whole: Tensor = module(x)
        return whole
    if x.nbytes <= LARGE:
        return _geglu(module, x)
    tokens, out = x.flatten(0, 1), torch.empty_like(x)
    for part, into in zip(torch.split(tokens, TOKENS), torch.split(out.flatten(0, 1), TOKENS), strict=True):
        into.copy_(_geglu(module, part))
    return out


def _is_gated(module: Any) -> bool:
    """Whether a feed-forward's first layer is a projection and its gate, and nothing sits around the two."""
    return type(module) is FeedForward and type(module.net[0]) is GEGLU and all(map(unhooked, (module, module.net[0])))


def _is_plain(module: Any) -> bool:
    """Whether a feed-forward is what `_geglu` computes: linear, GEGLU, no dropout in force, linear, nothing around."""
    if not _is_gated(module):
        return False
    first, dropout, *last = module.net
    layers = (first.proj, *last)
    return (
        [type(layer) for layer in layers] == [nn.Linear, nn.Linear]
        and (not dropout.training or dropout.p == 0)
        and all(map(unhooked, (dropout, *layers)))
    )


def _geglu(module: Any, x: Tensor) -> Tensor:
    first, _, last = module.net
    hidden, gate = linear(x, first.proj.weight, first.proj.bias).chunk(2, -1)
    return linear(hidden * F.gelu(gate), last.weight, last.bias)


def _self_attention(attention: Any, x: Shared, conditions: UNetConditions, rows: Rows) -> Shared:
    if attention in conditions.carrying:
        x = lift(x, rows, by_prediction=True)
    stacked = conditions.stacked.get(attention)
    if stacked is not None and stacked.holds():
        query, key, value = (_heads(part, attention.heads) for part in stacked(x.value).chunk(3, 2))
    else:
        query, key, value = (_heads(layer(x.value), attention.heads) for layer in _projections(attention))
    out = _out(attention, F.scaled_dot_product_attention(query, key, value))
    return Shared(out, x.by_prediction, x.by_half)


def _cross_attention(attention: Any, x: Shared, conditions: UNetConditions, rows: Rows, everyone: Rows) -> Shared:
    if attention in conditions.carrying:
        x = lift(x, rows, by_prediction=True)
    query = lift(Shared(attention.to_q(x.value), x.by_prediction, x.by_half), rows, by_prediction=True, by_half=True)
    key, value = conditions.keys_values(attention, rows, everyone).unbind(1)
    out = _out(attention, F.scaled_dot_product_attention(_heads(query.value, attention.heads), key, value))
    return Shared(out, True, True)


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    return attention.to_q, attention.to_k, attention.to_v


def _heads(x: Tensor, heads: int) -> Tensor:
    """[rows, tokens, channels] -> [rows, heads, tokens, channels / heads]; a view."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _out(attention: Any, attended: Tensor) -> Tensor:
    out: Tensor = attention.to_out[1](attention.to_out[0](attended.transpose(1, 2).flatten(2)))
    return out


def _to_tokens(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _to_map(x: Tensor, height: int, width: int) -> Tensor:
    out = x.view(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
    return out if x.device.type == "cpu" else out.contiguous()
