"""Gated cross-attention over images and a gated feed-forward network, as a module.

    h = norm(x);  k, v = split(norm(media) Wkv)
    y = x + tanh(attn_gate) * (attend(h Wq, k, v) Wo)
    z = y + tanh(mlp_gate) * mlp(norm(y))

Source: CoMemo (arXiv:2506.06279). Flamingo (arXiv:2204.14198) has a norm of its own for the media.

Letters: B samples, N tokens, M image tokens, H query heads, G key heads, D head dimension, d
width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import comemo_kernels as ops
from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count
from comemo_kernels.attention_types import MemoryScales, QueryRotation
from comemo_kernels.memory import ImageMemory
from comemo_kernels.memory_tensors import Table
from comemo_kernels.nn.feed_forward import OWN, FeedForward
from comemo_kernels.plain import is_plain
from comemo_kernels.reference.dtypes import DTYPES

NAME = "GatedCrossAttention"
VERB = f"{NAME}.forward"


class GatedCrossAttention(nn.Module):
    """Tokens read images by gated cross-attention, then a gated feed-forward network.

    A new layer is the identity: both gates are 0. Linear layers are initialised like `nn.Linear`,
    norms with 1. A submodule with hooks, adapters, quantised, sharded or offloaded weights is
    called; all others are computed from their weights, by `norm_linear`, `attend_gated`,
    `gated_swiglu` and `project_memory`.

    State dict:
        attn_norm.weight, mlp_norm.weight: [d].
        media_norm.weight: [media_dim]; absent with `shared_norm`.
        q_proj.weight: [H * D, d].
        kv_proj.weight: [2 * G * D, media_dim], the rows of keys first.
        o_proj.weight: [d, H * D].
        mlp.gate_proj.weight, mlp.up_proj.weight: [intermediate_size, d].
        mlp.down_proj.weight: [d, intermediate_size].
        attn_gate, mlp_gate: [1], before tanh.

    Args:
        dim: d.
        media_dim: width of the media.
        num_heads, head_dim: H and D; D even.
        intermediate_size: width of the feed-forward network.
        num_key_value_heads: G, a divisor of H; None for H.
        eps: of the norms.
        shared_norm: normalise the media by `attn_norm`, as in CoMemo, with `media_dim` = d. Then
            the state dict is that of a mixin layer of CoMemo.
        layer_idx: under which an `ImageMemory` holds this layer's keys and values; different for
            layers that share one.
        recompute: what the backward pass of the feed-forward network computes again, see
            `gated_swiglu`.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes below 1, an odd head_dim, G that does not divide H, a shared norm for
            media of another width, or an unknown `recompute`.
    """

    @public
    def __init__(
        self,
        dim: int,
        media_dim: int,
        num_heads: int,
        head_dim: int,
        intermediate_size: int,
        num_key_value_heads: int | None = None,
        eps: float = 1e-5,
        shared_norm: bool = False,
        layer_idx: int = 0,
        recompute: str = "cheap",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        heads = num_heads if num_key_value_heads is None else num_key_value_heads
        sizes = {"dim": dim, "media_dim": media_dim, "num_heads": num_heads, "head_dim": head_dim}
        sizes |= {"intermediate_size": intermediate_size, "num_key_value_heads": heads}
        for name, size in sizes.items():
            check_count(NAME, name, size, 1)
        check_count(NAME, "layer_idx", layer_idx)
        check(head_dim % 2 == 0, f"{NAME}: head_dim must be even, got {head_dim}")
        check(
            num_heads % heads == 0,
            f"{NAME}: num_key_value_heads must divide num_heads {num_heads}, got {heads}",
        )
        check(
            not shared_norm or media_dim == dim,
            f"{NAME}: media_dim must be dim {dim} with shared_norm, got {media_dim}",
        )
        check(
            recompute in ("cheap", "projections"),
            f"{NAME}: recompute must be 'cheap' or 'projections', got {recompute!r}",
        )
        self.dim, self.media_dim = dim, media_dim
        self.num_heads, self.num_key_value_heads, self.head_dim = num_heads, heads, head_dim
        self.layer_idx, self.recompute = layer_idx, recompute
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.attn_norm = nn.RMSNorm(dim, eps, **place)
        self.media_norm = None if shared_norm else nn.RMSNorm(media_dim, eps, **place)
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False, **place)
        self.kv_proj = nn.Linear(media_dim, 2 * heads * head_dim, bias=False, **place)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False, **place)
        self.attn_gate = nn.Parameter(torch.empty(1, **place))
        self.mlp_norm = nn.RMSNorm(dim, eps, **place)
        self.mlp = FeedForward(dim, intermediate_size, **place)
        self.mlp_gate = nn.Parameter(torch.empty(1, **place))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set both gates to 0; submodules have a `reset_parameters` of their own."""
        nn.init.zeros_(self.attn_gate)
        nn.init.zeros_(self.mlp_gate)

    @public
    def forward(
        self,
        x: Tensor,
        media: Tensor | ImageMemory,
        positions: Tensor | None = None,
        spans: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Let tokens read images.

        Args:
            x: [B, N, d].
            media: [B, M, media_dim], media of each sample; or [M, media_dim], of all samples. Then
                nothing is rotated. Or an `ImageMemory`, which several layers share: its keys and
                values of this layer are read, see `fill_memory`; if it has none they are built
                from its media, and not kept. Everything is differentiable in both cases.
            positions: integers [B or 1, N], ids of the tokens; for a memory with a table, and only
                then.
            spans: integers [B, N, 2] or [B, 1, 2], half-open rows of all media that each token
                reads. None: those of the memory; for [B, M, media_dim] the media of the sample, for
                [M, media_dim] all.
            active: bool [B, 1, 1] or [B, N, 1], False for what passes unchanged. None: that of the
                memory.

        Returns:
            [B, N, d] in the dtype of x.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; a memory without spans, or with
                neither keys of this layer nor media; positions without a table, or a table without
                positions; errors of the operations.
        """
        return read_images(self, x, media, positions, spans, active)


class _Reading(NamedTuple):
    """Media or a memory, and who reads what."""

    memory: ImageMemory
    spans: Tensor
    active: Tensor | None
    rotation: QueryRotation | None


def read_images(
    layer: Any,
    x: Tensor,
    media: Tensor | ImageMemory,
    positions: Tensor | None,
    spans: Tensor | None,
    active: Tensor | None,
) -> Tensor:
    """The forward of `GatedCrossAttention`, of any module with its submodules and settings."""
    reading = _prepare(layer, x, media, positions, spans, active)
    memory, index = reading.memory, layer.layer_idx
    scales: MemoryScales | None = None
    if index in memory.keys:
        key, value, scales = memory.keys[index], memory.values[index], memory.scales.get(index)
        wanted = (layer.num_key_value_heads, layer.head_dim)
        if key.shape[1:] != wanted:
            raise ValueError(
                f"{VERB}: keys of layer {index} must be [M, {wanted[0]}, {wanted[1]}], got"
                f" {tuple(key.shape)}: layers that share a memory need different layer_idx"
            )
    else:
        key, value = build_keys(layer, memory)
    norm, rotation = layer.attn_norm, reading.rotation
    if is_plain(norm, layer.q_proj):
        q = ops.norm_linear(x, norm.weight, layer.q_proj.weight, norm.eps)
    else:
        q = layer.q_proj(norm(x))
    q = q.unflatten(-1, (layer.num_heads, layer.head_dim))
    if is_plain(layer.o_proj):
        weight, gate = layer.o_proj.weight, layer.attn_gate
        y = ops.attend_gated(x, q, key, value, reading.spans, weight, gate, rotation, scales)
    else:
        read = ops.attend_spans(q, key, value, reading.spans, rotation, scales)
        y = x + layer.attn_gate.tanh() * layer.o_proj(read.flatten(2))
    norm, mlp = layer.mlp_norm, layer.mlp
    if is_plain(norm, mlp, kinds=OWN):
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        y = ops.gated_swiglu(y, norm.weight, *weights, layer.mlp_gate, norm.eps, layer.recompute)
    else:
        y = y + layer.mlp_gate.tanh() * mlp(norm(y))
    return y if reading.active is None else torch.where(reading.active, y, x)


def build_keys(layer: Any, memory: ImageMemory) -> tuple[Tensor, Tensor]:
    """Keys and values [M, G, D] of one layer, from the media of a memory."""
    media = memory.media
    if media is None:
        raise ValueError(
            f"{VERB}: the memory must hold keys of layer {layer.layer_idx}, or media to build them"
            f" from, got keys of layers {list(memory.keys)}"
        )
    norm, G = norm_of_media(layer), layer.num_key_value_heads
    ids, table = angles_of(memory, layer.head_dim)
    if is_plain(norm, layer.kv_proj):
        norms = None if norm.weight is None else [norm.weight]
        weights = [layer.kv_proj.weight]
        keys, values = ops.project_memory(media, weights, norms, *table, ids, G, norm.eps)
        return keys[0], values[0]
    kv = layer.kv_proj(norm(media)).unflatten(-1, (2, G, layer.head_dim))
    key, value = kv.unbind(1)
    cos, sin = ImageMemory(ids=ids, table=table).key_table()  # a row for each key
    rotated, _ = ops.apply_rotary(key[None], None, cos[None], sin[None])
    # A view of `value` would keep the unrotated keys alive as long as the memory.
    return rotated[0], value.contiguous()


def norm_of_media(layer: Any) -> Any:
    return layer.attn_norm if layer.media_norm is None else layer.media_norm


def angles_of(memory: ImageMemory, head_dim: int) -> tuple[Tensor, Table]:
    """Ids of the image tokens and a table of angles; all angles are 0 without a table."""
    media = memory.media
    assert media is not None
    if memory.table is not None and memory.ids is not None:
        return memory.ids, memory.table
    ids = torch.zeros(len(media), dtype=torch.int32, device=media.device)
    cos = torch.ones(1, head_dim // 2, device=media.device)
    return ids, (cos, torch.zeros_like(cos))


def _prepare(
    layer: Any,
    x: Tensor,
    media: Tensor | ImageMemory,
    positions: Tensor | None,
    spans: Tensor | None,
    active: Tensor | None,
) -> _Reading:
    """Check the arguments of a call."""
    fits = isinstance(x, Tensor) and x.ndim == 3 and x.shape[2] == layer.dim
    if not fits or x.dtype not in DTYPES:
        raise ValueError(f"{VERB}: x must be floats [B, N, {layer.dim}], got {_told(x)}")
    B, N, _ = x.shape
    if isinstance(media, ImageMemory):
        memory = media
        spans = memory.spans if spans is None else spans
        active = memory.active if active is None else active
    else:
        memory, own = _memory_of(x, media)
        spans = own if spans is None else spans
    check_media(VERB, layer, memory)
    if spans is None:
        raise ValueError(f"{VERB}: spans must be given, because the memory has none, got None")
    if (memory.table is None) != (positions is None):
        told = "without a table of angles" if memory.table is None else "with a table of angles"
        raise ValueError(
            f"{VERB}: positions must be given for a memory with a table of angles, and only then,"
            f" got {_told(positions)} for media {told}"
        )
    if active is not None and (
        active.dtype != torch.bool or active.shape not in ((B, 1, 1), (B, N, 1))
    ):
        raise ValueError(
            f"{VERB}: active must be bool {(B, 1, 1)} or {(B, N, 1)}, got"
            f" {active.dtype} {tuple(active.shape)}"
        )
    # Layers of one model may be on several devices.
    rotation = None
    if positions is not None:
        moved = (None if t is None else t.to(x.device) for t in memory.rotation(positions))
        rotation = QueryRotation(*moved)
    active = None if active is None else active.to(x.device)
    return _Reading(memory, spans.to(x.device), active, rotation)


def check_media(verb: str, layer: Any, memory: ImageMemory) -> None:
    """Raise unless the media and the table of a memory, if it has them, fit a layer."""
    media, table = memory.media, memory.table
    if media is not None and (
        media.ndim != 2 or media.shape[1] != layer.media_dim or media.dtype not in DTYPES
    ):
        raise ValueError(f"{verb}: media must be floats [M, {layer.media_dim}], got {_told(media)}")
    if table is not None and (table[0].ndim != 2 or 2 * table[0].shape[1] != layer.head_dim):
        raise ValueError(
            f"{verb}: the table of the memory must be [P, {layer.head_dim}/2], got"
            f" {tuple(table[0].shape)}"
        )
    if table is not None and media is not None and memory.ids is None:
        raise ValueError(
            f"{verb}: a memory with media and a table must have the ids of its tokens, got None"
        )


def _memory_of(x: Tensor, media: Tensor) -> tuple[ImageMemory, Tensor]:
    """Media tensors as a memory, and the spans of tokens that read all media of their sample."""
    B, fits = len(x), isinstance(media, Tensor) and media.ndim in (2, 3)
    if not fits or (media.ndim == 3 and len(media) != B):
        raise ValueError(
            f"{VERB}: media must be an ImageMemory, [{B}, M, media_dim] for x {tuple(x.shape)}, or"
            f" [M, media_dim], got {_told(media)}"
        )
    M = media.shape[-2]
    starts = torch.arange(B, device=x.device)[:, None, None]
    starts = starts * (M if media.ndim == 3 else 0)
    return ImageMemory(media=media.flatten(0, -2)), torch.cat([starts, starts + M], -1)


def _told(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {tuple(value.shape)}"
