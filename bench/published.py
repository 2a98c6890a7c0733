"""The mixin layer as published, one PyTorch operation at a time: the baseline."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo.mixin import EPS, MixinLayer
from comemo_kernels.reference.norms import rms_norm

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


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


class Samples(NamedTuple):
    """Samples of a packed row: their queries and keys, and the bounds [S + 1] of both, int32."""

    counts: list[int]
    lengths: list[int]
    bounds: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, counts: list[int], lengths: list[int], device: str) -> "Samples":
        sums = ([0, *itertools.accumulate(sizes)] for sizes in (counts, lengths))
        first, second = (torch.tensor(t, dtype=torch.int32, device=device) for t in sums)
        return cls(counts, lengths, (first, second))


def attend_samples(q: Tensor, k: Tensor, v: Tensor, samples: Samples) -> Tensor:
    """Packed q [1, N, H, D] on k, v [1, M, G, D], each sample on its own keys; 0 without keys.

    By variable-length flash attention, as published, or where there is none sample by sample.
    """
    if not sum(samples.lengths):
        return torch.zeros_like(q)
    if varlen_attn is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        longest = max(samples.counts), max(samples.lengths)
        return varlen_attn(q[0], k[0], v[0], *samples.bounds, *longest)[None]
    if len(samples.counts) == 1:
        return attend(q, k, v)
    split = q.split(samples.counts, 1), *(t.split(samples.lengths, 1) for t in (k, v))
    pieces = [
        attend(*piece) if piece[1].shape[1] else torch.zeros_like(piece[0])
        for piece in zip(*split, strict=True)
    ]
    return torch.cat(pieces, 1)


def mix(
    x: Tensor,
    k: Tensor,
    v: Tensor,
    block: Block,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = attend,
) -> Tensor:
    """The layer on x [B, N, d]: it reads k, v [B, M, G, D]; `ids` [B, N] of the queries."""
    q = F.linear(rms_norm(x, block.attn_norm, EPS), block.q).unflatten(-1, (-1, k.shape[-1]))
    read = attend(rotate(q, cos, sin, ids), k, v).flatten(2)
    x = x + block.attn_gate.tanh() * F.linear(read, block.o)
    y = rms_norm(x, block.mlp_norm, EPS)
    y = F.silu(F.linear(y, block.gate)) * F.linear(y, block.up)
    return x + block.mlp_gate.tanh() * F.linear(y, block.down)


class Places(NamedTuple):
    """Where the tokens of a packed row are."""

    ids: Tensor  # [1, N] of the queries
    media_ids: Tensor  # [M] of the image tokens
    samples: Samples
    active: Tensor | None  # bool [1, N, 1], False for tokens without pictures, which pass unchanged


def step(
    x: Tensor, media: Tensor, block: Block, cos: Tensor, sin: Tensor, places: Places
) -> Tensor:
    """A training step's forward: the layer on x [1, N, d] and media [M, d], which it projects."""
    k, v = build(media[None], block.attn_norm, block.kv, cos, sin, places.media_ids[None])
    attend = functools.partial(attend_samples, samples=places.samples)
    y = mix(x, k, v, block, cos, sin, places.ids, attend)
    return y if places.active is None else torch.where(places.active, y, x)
