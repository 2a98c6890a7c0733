"""The vision tower's layers for inference, computed from their weights where they are plain.

The same operations as in transformers' InternVL. Its modules would multiply by PyTorch's own
product, which on a CPU is not the fastest, and write each result into new memory, which costs a
CPU more than the arithmetic.

Letters: T tiles, N tokens of a tile, C channels, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionAttention,
    InternVLVisionLayer,
    InternVLVisionMLP,
    InternVLVisionRMSNorm,
    eager_attention_forward,
)

import comemo_kernels as ops

_PARTS = (InternVLVisionLayer, InternVLVisionAttention, InternVLVisionMLP, InternVLVisionRMSNorm)
_PLAIN = frozenset((*_PARTS, nn.LayerNorm, nn.Linear, nn.Identity, nn.Dropout, GELUActivation))


def encode(layer: nn.Module, x: Tensor) -> Tensor:
    """One layer on x [T, N, C]; with gradients, in training or if it is not plain by calling it."""
    mixed = torch.is_autocast_enabled(x.device.type)
    if torch.is_grad_enabled() or mixed or layer.training or not _is_plain(layer):
        return layer(x)
    own: Any = layer
    y = _attend(own.attention, own.layernorm_before(x)).mul_(own.lambda_1).add_(x)
    mlp = own.mlp
    z = ops.linear(own.layernorm_after(y), mlp.fc1.weight, mlp.fc1.bias)
    z = torch.ops.aten.gelu_(z)
    z = ops.linear(z, mlp.fc2.weight, mlp.fc2.bias)
    return (z if own.lambda_2 is None else z.mul_(own.lambda_2)).add_(y)


def _is_plain(layer: nn.Module) -> bool:
    if type(layer) is not InternVLVisionLayer or not ops.is_plain(layer, kinds=_PLAIN, biased=True):
        return False
    return getattr(layer.mlp.activation_fn, "act", None) is F.gelu


def _attend(attention: Any, x: Tensor) -> Tensor:
    """Self-attention of x [T, N, C]."""
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (ops.linear(x, part.weight, part.bias) for part in parts)
    q, k = attention.q_norm(q), attention.k_norm(k)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        attention.config._attn_implementation, eager_attention_forward
    )
    read = attend(attention, q, k, v, None, dropout=0.0, scaling=attention.scale, is_causal=False)
    out = attention.projection_layer
    return ops.linear(read[0].flatten(2), out.weight, out.bias)
