"""A resnet and a transformer over rows that share what they can: the modules' own arithmetic, in fewer launches.

Only for modules that `conditions.py` found plain; all others are called as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cmlora.conditions import Conditions
from cmlora.layers import unhooked
from cmlora.rows import Rows, Shared, add, lift

FEW_PIXELS, LARGE_WEIGHT = 384, 2**20
"""On the CPU, where a convolution is a GEMM over patches: at most so many pixels, at least so many weights."""
SAME_SIZE = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
"""The geometry of a 3x3 convolution that keeps the size, as `_geometry` tells it."""


def plain_resnet(module: Any, x: Shared, conditions: Conditions, step: int, rows: Rows) -> Shared:
    """ResnetBlock2D.forward, its time bias from the run's table."""
    carrying = module in conditions.carrying
    bias = conditions.time(module, step)
    x = lift(x, rows, by_prediction=carrying, by_half=bias.shape[0] > 1)
    hidden = _convolve(module.conv1, module.nonlinearity(module.norm1(x.value)))
    if bias.shape[0] == 1:
        hidden = hidden + bias[:, :, None, None]
    else:
        hidden = (hidden.view(-1, bias.shape[0], *hidden.shape[1:]) + bias[:, :, None, None]).flatten(0, 1)
    hidden = _convolve(module.conv2, module.dropout(module.nonlinearity(module.norm2(hidden))))
    shortcut = x.value if module.conv_shortcut is None else module.conv_shortcut(x.value)
    hidden = shortcut + hidden
    if module.output_scale_factor != 1:
        hidden = hidden / module.output_scale_factor
    return Shared(hidden, x.by_prediction, x.by_half)


def _convolve(layer: Any, x: Tensor) -> Tensor:
    """A 3x3 convolution; on the CPU as one GEMM over patches where a weight is large beside the pixels.

    oneDNN lays a convolution's weight anew at every call, which takes longer than the convolution itself then.
    """
    rows, channels, height, width = x.shape
    few = x.device.type == "cpu" and rows * height * width <= FEW_PIXELS and layer.weight.numel() >= LARGE_WEIGHT
    if not few or type(layer) is not nn.Conv2d or not unhooked(layer) or _geometry(layer) != SAME_SIZE:
        out: Tensor = layer(x)
        return out
    patches = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)  # [rows, channels, height, width, 3, 3]
    flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(rows * height * width, channels * 9)
    tokens = F.linear(flat, layer.weight.flatten(1), layer.bias)
    return tokens.view(rows, height, width, -1).permute(0, 3, 1, 2)


def _geometry(layer: nn.Conv2d) -> tuple[object, ...]:
    return (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)


def plain_transformer(module: Any, x: Shared, conditions: Conditions, rows: Rows, everyone: Rows) -> Shared:
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


def _block(block: Any, tokens: Shared, conditions: Conditions, rows: Rows, everyone: Rows) -> Shared:
    """BasicTransformerBlock.forward with layer norms: self-attention, cross-attention, feed-forward."""
    x = Shared(block.norm1(tokens.value), tokens.by_prediction, tokens.by_half)
    tokens = add(_self_attention(block.attn1, x, conditions, rows), tokens, rows)

    x = Shared(block.norm2(tokens.value), tokens.by_prediction, tokens.by_half)
    tokens = add(_cross_attention(block.attn2, x, conditions, rows, everyone), tokens, rows)

    x = Shared(block.norm3(tokens.value), tokens.by_prediction, tokens.by_half)
    if block.ff in conditions.carrying:
        x = lift(x, rows, by_prediction=True)
    return add(Shared(block.ff(x.value), x.by_prediction, x.by_half), tokens, rows)


def _self_attention(attention: Any, x: Shared, conditions: Conditions, rows: Rows) -> Shared:
    if attention in conditions.carrying:
        x = lift(x, rows, by_prediction=True)
    stacked = conditions.stacked.get(attention)
    if stacked is not None:
        query, key, value = (_heads(part, attention.heads) for part in stacked(x.value).chunk(3, 2))
    else:
        query, key, value = (_heads(layer(x.value), attention.heads) for layer in _projections(attention))
    out = _out(attention, F.scaled_dot_product_attention(query, key, value))
    return Shared(out, x.by_prediction, x.by_half)


def _cross_attention(attention: Any, x: Shared, conditions: Conditions, rows: Rows, everyone: Rows) -> Shared:
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
