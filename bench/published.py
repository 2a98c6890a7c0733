"""The mixin layer as published, one PyTorch operation at a time: the baseline."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo.mixin import EPS, MixinLayer
from comemo_kernels.reference.norms import rms_norm


class Block(NamedTuple):
    """Weights of a mixin layer, as inputs of a compiled function."""

    attn_norm: Tensor
    q: Tensor
    kv: Tensor
    o: Tensor
    attn_gate: Tensor
    mlp_norm: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    mlp_gate: Tensor

    @classmethod
    def of(cls, layer: MixinLayer) -> "Block":
        mlp = layer.mlp
        return cls(
            attn_norm=layer.attn_norm.weight,
            q=layer.q_proj.weight,
            kv=layer.kv_proj.weight,
            o=layer.o_proj.weight,
            attn_gate=layer.attn_gate,
            mlp_norm=layer.mlp_norm.weight,
            gate=mlp.gate_proj.weight,
            up=mlp.up_proj.weight,
            down=mlp.down_proj.weight,
            mlp_gate=layer.mlp_gate,
        )

    def double(self) -> "Block":
        return Block(*(t.double() for t in self))

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a layer with a built memory reads."""
        return sum(t.nbytes for t in self) - self.kv.nbytes


def widen(table: tuple[Tensor, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [P, D/2] repeated to [P, D], rounded to the activations' dtype."""
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in table)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, ids: Tensor) -> Tensor:
    """Rotate [..., H, D] by rows `ids` [...] of tables [P, D] of `widen`."""
    return rotate_by(x, cos[ids].unsqueeze(-2), sin[ids].unsqueeze(-2))


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of [..., H, D] by cos, sin [..., 1, D], in float32 at least."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = exact.chunk(2, dim=-1)
    return (exact * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def build(
    media: Tensor, norm: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values [..., M, G, D] of media [..., M, d]."""
    kv = F.linear(rms_norm(media, norm, EPS), weight)
    k, v = kv.unflatten(-1, (2, -1, cos.shape[-1])).unbind(-3)
    return rotate(k, cos, sin, ids), v


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q [B, N, H, D] on keys and values [B, M, G, D], by the backend that SDPA chooses."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def mix(
    x: Tensor, k: Tensor, v: Tensor, block: Block, cos: Tensor, sin: Tensor, ids: Tensor
) -> Tensor:
    """The layer on x [B, N, d]: it reads k, v [B, M, G, D]; `ids` [B, N] of the queries."""
    q = F.linear(rms_norm(x, block.attn_norm, EPS), block.q).unflatten(-1, (-1, k.shape[-1]))
    read = attend(rotate(q, cos, sin, ids), k, v).flatten(2)
    x = x + block.attn_gate.tanh() * F.linear(read, block.o)
    y = rms_norm(x, block.mlp_norm, EPS)
    y = F.silu(F.linear(y, block.gate)) * F.linear(y, block.up)
    return x + block.mlp_gate.tanh() * F.linear(y, block.down)
