"""The mixin layer: gated cross-attention over the image memory and a gated feed-forward network.

Source: CoMemo (arXiv:2506.06279), section on the memory path.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head
dimension, d width of the language model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import comemo_kernels as ops
from comemo.attention import attend_otherwise, attention_of
from comemo.config import MixinConfig
from comemo.config_parts import OWN_ATTENTION
from comemo.parallel.split import Split, enter, leave, shared
from comemo.weights.fusable import is_fusable
from comemo_kernels import ImageMemory, MemoryScales, QueryRotation

KeyAngles = tuple[Tensor, Tensor, Tensor]  # cos, sin [P, D/2]; ids [M] of the keys, rows of these
EPS = 1e-5  # of both norms


def on_device(
    device: torch.device, spans: Tensor | None, rotation: QueryRotation
) -> tuple[Tensor, QueryRotation]:
    """Spans and rotation on the device of a layer: layers may be on several devices."""
    if spans is None:
        raise ValueError("CoMemo: image_memory.spans must say which tokens read what, got None")
    moved = (None if t is None else t.to(device) for t in rotation)
    return spans.to(device), QueryRotation(*moved)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    mlp: nn.Module,
    gate: Tensor | None,
    eps: float,
    recompute: str,
    split: Split | None,
) -> Tensor:
    """x + tanh(gate) * the feed-forward network of x [B, N, d], which may be divided.

    Divided layers keep what the down projection reads, so `recompute` has no effect there.
    """
    wide: Any = (mlp.gate_proj.weight, mlp.up_proj.weight)
    down: Any = mlp.down_proj.weight
    if split is None:
        return ops.gated_swiglu(x, norm_weight, *wide, down, gate, eps, recompute)
    x, residual = enter(split, x)
    inner = ops.norm_swiglu(x, norm_weight, *wide, eps)
    return leave(split, ops.gated_residual(residual, inner, down, gate))


class MixinLayer(nn.Module):
    """Gated image cross-attention and a gated feed-forward network; identity if the gates are 0.

    The attention is the one that `config._attn_implementation` names, see `comemo.attention`.
    """

    folded = False  # whether norm weights and gates are folded into the projections
    split: Split | None = None  # the ranks that divide heads and columns; then its own are here
    # What functions of transformers' attention interface read.
    is_causal, num_key_value_groups = False, 1

    def __init__(self, config: MixinConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx  # of the decoder layer after it
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        width, inner = config.language_dim, config.num_heads * config.head_dim
        self.attn_norm = LlamaRMSNorm(width, eps=EPS)
        self.q_proj = nn.Linear(width, inner, bias=False)
        self.kv_proj = nn.Linear(config.vision_dim, 2 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.attn_gate = nn.Parameter(torch.zeros(1))
        self.mlp_norm = LlamaRMSNorm(width, eps=EPS)
        wide = config.intermediate_size
        self.mlp = LlamaMLP(  # has no heads; the default number might not divide the width
            LlamaConfig(hidden_size=width, intermediate_size=wide, num_attention_heads=1)
        )
        self.mlp_gate = nn.Parameter(torch.zeros(1))

    def build(self, media: Tensor, angles: KeyAngles) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [M, H, D] of `media` [M, d], which get the norm of the text."""
        cos, sin, ids = angles
        media = shared(self.split, media)
        if is_fusable(self.attn_norm, self.kv_proj):
            norms = None if self.folded else [self.attn_norm.weight]
            weights, eps = [self.kv_proj.weight], self.attn_norm.variance_epsilon
            keys, values = ops.project_memory(
                media, weights, norms, cos, sin, ids, self.num_heads, eps
            )
            return keys[0], values[0]
        kv = self.kv_proj(self.attn_norm(media)).unflatten(-1, (2, self.num_heads, self.head_dim))
        key, value = kv.unbind(1)
        cos, sin = ImageMemory(ids=ids, table=(cos, sin)).key_table()  # of each key
        # A view of `value` would keep the unrotated keys alive as long as the memory.
        return ops.apply_rotary(key[None], None, cos[None], sin[None])[0][0], value.contiguous()

    def forward(
        self,
        x: Tensor,
        media: Tensor | None,
        memory: ImageMemory,
        rotation: QueryRotation,
        angles: KeyAngles | None = None,
        keep: bool = False,
        recompute: str = "cheap",
    ) -> Tensor:
        """x [B, N, d] -> [B, N, d]; prompts without images are unchanged.

        Keys and values that the memory lacks are built here, not before the layers run: sharding
        and offloading hooks provide the whole weights of a module only during its forward.

        Args:
            x: [B, N, d].
            media: [M, d] of the memory as a separate argument, because gradient checkpointing
                ignores tensors inside objects; None to use the memory's own.
            memory: the image memory to read.
            rotation: of the queries.
            angles: of the keys; None if the keys are built already.
            keep: whether the memory keeps the new keys and values.
            recompute: what the backward pass computes again, see `CoMemoConfig`.

        Raises:
            ValueError: a memory with neither keys of this layer nor media to build them from.
        """
        scales = None
        if self.layer_idx in memory.keys:
            key, value = memory.keys[self.layer_idx], memory.values[self.layer_idx]
            scales = memory.scales.get(self.layer_idx)
        else:
            media = memory.media if media is None else media
            if media is None or angles is None:
                raise ValueError(
                    f"CoMemo: the image memory has neither keys of mixin layer {self.layer_idx}"
                    " nor the media to build them from"
                )
            key, value = self.build(media.to(x.device), angles)
            if keep:
                memory.update(self.layer_idx, key, value)
        return self._read(x, key, value, memory, rotation, scales, recompute)

    def _read(
        self,
        x: Tensor,
        key: Tensor,
        value: Tensor,
        memory: ImageMemory,
        rotation: QueryRotation,
        scales: MemoryScales | None,
        recompute: str,
    ) -> Tensor:
        fusable = is_fusable(self.attn_norm, self.q_proj, self.o_proj, self.mlp_norm, self.mlp)
        norms: tuple[Any, Any] = (self.attn_norm.weight, self.mlp_norm.weight)
        gates: tuple[Any, Any] = (self.attn_gate, self.mlp_gate)
        if self.folded:
            norms = gates = (None, None)
        spans, rotation = on_device(x.device, memory.spans, rotation)
        before = x
        x, residual = enter(self.split, x)
        if fusable:
            q = ops.norm_linear(x, norms[0], self.q_proj.weight, self.attn_norm.variance_epsilon)
        else:
            q = self.q_proj(self.attn_norm(x))
        q = q.unflatten(-1, (self.num_heads, self.head_dim))  # [B, N, H, D]
        own = attention_of(self.config) == OWN_ATTENTION
        if own and fusable:
            y = ops.attend_gated(
                residual, q, key, value, spans, self.o_proj.weight, gates[0], rotation, scales
            )
        else:
            if own:
                read = ops.attend_spans(q, key, value, spans, rotation, scales)
            else:
                M = len(memory) or len(key)  # spare rows may hold anything, NaN too
                read = attend_otherwise(self, q, key[:M], value[:M], spans, rotation, scales)
            read = read.flatten(2)
            if fusable:
                y = ops.gated_residual(residual, read, self.o_proj.weight, gates[0])
            else:
                y = residual + self.attn_gate.tanh() * self.o_proj(read)
        y = leave(self.split, y)
        if fusable:
            eps = self.mlp_norm.variance_epsilon
            y = feed_forward(y, norms[1], self.mlp, gates[1], eps, recompute, self.split)
        else:
            y, residual = enter(self.split, y)
            y = leave(self.split, residual + self.mlp_gate.tanh() * self.mlp(self.mlp_norm(y)))
        return y if memory.active is None else torch.where(memory.active.to(x.device), y, before)
