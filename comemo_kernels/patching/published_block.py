"""Mixin layers of the published code, on an image memory that is built once per `generate`.

A call of `generate` has a `Reading`, which only its own thread sees. Without one, in training, the
layers do what the published ones do: state that the model has set on them says what tokens read.

Letters: B batch, N tokens, M tokens of the image memory, H heads, D head dimension, d width.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from comemo_kernels import operations as ops
from comemo_kernels.attention_types import QueryRotation
from comemo_kernels.memory_tensors import memory_buffers
from comemo_kernels.patching.media import keep_while_alive
from comemo_kernels.patching.plain import (
    has_plain_weights,
    is_plain,
    is_rms_norm,
    is_silu,
    is_untouched,
)
from comemo_kernels.patching.published_attention import angles
from comemo_kernels.patching.replacement import Replacement
from comemo_kernels.spans import spans_from_cu_seqlens

Pair = tuple[Tensor, Tensor]


class Reading:
    """The image memory of one call of `generate`, and which ids its tokens have.

    Args:
        vision_x: [1, M, d], what the published layers project for every token; None for text.
        media_ids: [1, M] ids of the image tokens.
        text_ids: [1, N] ids of the prompt's tokens.
        blocks: all gated blocks of the model.
        decoding: the decode steps of the call.
    """

    def __init__(
        self,
        vision_x: Tensor | None,
        media_ids: Tensor | None,
        text_ids: Tensor | None,
        blocks: Sequence[nn.Module],
        decoding: Any = None,
    ) -> None:
        self.vision_x, self.media_ids, self.text_ids = vision_x, media_ids, text_ids
        self.blocks, self.decoding = blocks, decoding
        self.built: dict[nn.Module | None, Pair] = {}
        self._spans: dict[torch.device, Tensor] = {}
        self.ids = text_ids  # of the tokens of this forward
        self._length = 0

    def begin(self, length: int, tokens: int, device: torch.device) -> None:
        """The ids of a forward of `tokens` after `length` others: raw counts, as published."""
        if length == 0:
            self.ids = self.text_ids
        elif self._length != length or self.ids is None or self.ids.shape[1] != tokens:
            self.ids = torch.arange(length, length + tokens, device=device)[None]
        self._length = length

    def spans(self, x: Tensor) -> Tensor:
        """Spans [B, 1, 2] of tokens x [B, N, d]: all read the whole memory."""
        assert self.vision_x is not None
        if x.device not in self._spans:
            self._spans[x.device] = whole(1, self.vision_x.shape[1], x.device)
        return self._spans[x.device].expand(len(x), 1, 2)


def whole(B: int, M: int, device: torch.device) -> Tensor:
    """Spans [B, 1, 2] of prompts that each read M tokens of their own, made on the device."""
    start = torch.arange(0, B * M, max(M, 1), device=device)[:B]
    return torch.stack([start, start + M], -1)[:, None]


READING: ContextVar[Reading | None] = ContextVar("READING", default=None)


def reading_of(block: nn.Module | None) -> Reading | None:
    """What the call of `generate` that runs in this thread reads, if the block is of its model."""
    reading = READING.get()
    if reading is None or not any(own is block for own in reading.blocks):
        return None
    return reading


def is_known(block: nn.Module) -> bool:
    """Whether a gated block has the published structure."""
    parts = ("cross_attention_norm", "cross_attn", "attn_gate", "ffn_norm_2", "ffn_2", "ff_gate")
    attention = ("to_q", "to_kv", "to_out", "rotary_emb", "heads", "head_dim")
    return all(hasattr(block, part) for part in parts) and all(
        hasattr(block.cross_attn, part) for part in attention
    )


def run_layer(call: Replacement, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The wrapper of a decoder layer: its block first, on the memory of the call."""
    reading = reading_of(call.module.gated_cross_attn_layer)
    if reading is None:
        return call.original(hidden_states, *args, **kwargs)
    layer = call.module
    if reading.vision_x is not None:
        past = kwargs.get("past_key_value")
        length = 0 if past is None else past[0].shape[-2]
        reading.begin(length, hidden_states.shape[1], hidden_states.device)
        hidden_states = layer.gated_cross_attn_layer(
            hidden_states, reading.vision_x, use_cached_media=True
        )
    return layer.decoder_layer(hidden_states, *args, **kwargs)


def run_block(
    call: Replacement, x: Tensor, media: Tensor, use_cached_media: bool = False
) -> Tensor:
    """x [B, N, d] + gated attention, then + gated network; arguments as published."""
    block, reading = call.module, reading_of(call.module)
    if reading is None and use_cached_media:
        return call.refuse("cached media without generate", x, media, use_cached_media)
    attention, norm = block.cross_attn, block.cross_attention_norm
    gates = has_plain_weights(block)
    if not (gates and is_untouched(attention) and is_rms_norm(norm)):
        normed = norm(media) if reading is None or block not in reading.built else None
        read = attention(norm(x), normed, use_cached_media=use_cached_media, **_ids(block))
        x = read * block.attn_gate.tanh() + x
    else:
        q = project_query(attention, x, norm)
        k, v = memory_of(block, media, reading)
        places = places_of(block, x, media, k, reading)
        if is_plain(attention.to_out):
            x = ops.attend_gated(
                x, q, k, v, places[0], attention.to_out.weight, block.attn_gate, places[1]
            )
        else:
            read = ops.attend_spans(q, k, v, *places)
            assert isinstance(read, Tensor)
            x = attention.to_out(read.flatten(2)) * block.attn_gate.tanh() + x
    network, norm = block.ffn_2, block.ffn_norm_2
    if gates and is_rms_norm(norm) and is_known_network(network):
        weights = (network.w1.weight, network.w3.weight, network.w2.weight)
        return ops.gated_swiglu(x, norm.weight, *weights, block.ff_gate, norm.variance_epsilon)
    return network(norm(x)) * block.ff_gate.tanh() + x


def is_known_network(network: nn.Module) -> bool:
    """Whether a feed-forward network is w2(silu(w1 x) * w3 x) and may be computed from weights."""
    children = vars(network)["_modules"]
    return (
        is_untouched(network)
        and set(children) == {"w1", "w2", "w3", "act_fn"}
        and is_silu(children["act_fn"])
        and is_plain(children["w1"], children["w2"], children["w3"])
    )


def run_attention(
    call: Replacement,
    x: Tensor,
    media: Tensor | None,
    use_cached_media: bool = False,
    media_position_ids: Tensor | None = None,
    text_position_ids: Tensor | None = None,
    text_time: Tensor | None = None,
) -> Tensor:
    """Attention of normed x [B, N, d] on normed media [B, M, d], with its projections.

    The block computes it itself where it can; hooks and adapters of this module need the call.
    """
    attention, reading = call.module, READING.get()
    block = None if reading is None else _block_of(attention, reading.blocks)
    reading = None if block is None else reading
    if text_time is not None or (use_cached_media and block is None):
        return call.original(
            x, media, use_cached_media, media_position_ids, text_position_ids, text_time
        )
    q = attention.to_q(x).unflatten(-1, (attention.heads, attention.head_dim))
    built = {} if reading is None else reading.built
    if block not in built:
        assert media is not None
        built[block] = project_keys(attention, attention.to_kv(media), media_position_ids)
    k, v = built[block]
    ids = text_position_ids if reading is None else reading.ids
    spans = spans_of(attention, x, k, reading)
    read = ops.attend_spans(q, k, v, spans, rotation_of(attention, ids, x))
    assert isinstance(read, Tensor)
    return attention.to_out(read.flatten(2))


def _block_of(attention: nn.Module, blocks: Sequence[nn.Module]) -> nn.Module | None:
    return next((block for block in blocks if block.cross_attn is attention), None)


def _ids(block: nn.Module) -> dict[str, Any]:
    return {
        "media_position_ids": media_ids_of(block, reading_of(block)),
        "text_position_ids": getattr(block, "cross_attn_text_position_ids", None),
    }


def media_ids_of(block: nn.Module, reading: Reading | None) -> Tensor | None:
    """Ids [1, M] of the image tokens: of the call, or what the published model set on the block."""
    if reading is not None:
        return reading.media_ids
    return getattr(block, "cross_attn_media_position_ids", None)


def project_query(attention: nn.Module, x: Tensor, norm: nn.Module) -> Tensor:
    """q [B, N, H, D] of x [B, N, d], not rotated yet."""
    if is_plain(attention.to_q):
        q = ops.norm_linear(x, norm.weight, attention.to_q.weight, norm.variance_epsilon)
    else:
        q = attention.to_q(norm(x))
    return q.unflatten(-1, (attention.heads, attention.head_dim))


def project_keys(attention: nn.Module, kv: Tensor, ids: Tensor | None) -> Pair:
    """Rotated keys and values [B * M, H, D] of kv [B, M, 2 * H * D] with ids [B or 1, M]."""
    assert ids is not None
    k, v = kv.unflatten(-1, (2, attention.heads, attention.head_dim)).unbind(2)
    cos, sin = table_of(attention, kv)
    k, _ = ops.apply_rotary(k, None, cos, sin, ids.to(kv.device), published=True)
    return k.flatten(0, 1), v.flatten(0, 1)


def table_of(attention: nn.Module, like: Tensor) -> Pair:
    """cos, sin [P, D/2] of all ids, in the dtype that the module keeps."""
    return angles(attention.rotary_emb, like, attention.rotary_emb.max_seq_len_cached)


def rotation_of(attention: nn.Module, ids: Tensor | None, x: Tensor) -> QueryRotation:
    """The rotation of queries with ids [B or 1, N]."""
    assert ids is not None
    positions = ids.to(x.device).expand(x.shape[0], -1)
    return QueryRotation(*table_of(attention, x), positions)


def memory_of(block: nn.Module, media: Tensor, reading: Reading | None) -> Pair:
    """Keys and values [B * M, H, D] of a block; in a call of `generate` all blocks' at once."""
    if reading is None:
        return build(block, media, media_ids_of(block, None))
    if block not in reading.built and not build_all(reading):
        reading.built[block] = build(block, media, reading.media_ids)
    return reading.built[block]


def build(block: nn.Module, media: Tensor, ids: Tensor | None) -> Pair:
    """Keys and values [B * M, H, D] of media [B, M, d], with gradients."""
    attention, norm = block.cross_attn, block.cross_attention_norm
    if not (is_plain(attention.to_kv) and is_rms_norm(norm)):
        return project_keys(attention, attention.to_kv(norm(media)), ids)
    assert ids is not None
    cos, sin = table_of(attention, media)
    row_ids = ids.to(media.device).expand(media.shape[0], -1).flatten().int()
    weights, norms = [attention.to_kv.weight], [norm.weight]
    keys, values = ops.project_memory(
        media.flatten(0, 1),
        weights,
        norms,
        cos,
        sin,
        row_ids,
        attention.heads,
        norm.variance_epsilon,
    )
    return keys[0], values[0]


def build_all(reading: Reading) -> bool:
    """Build the memory of all blocks by one call, if their weights may be read together."""
    first, media, ids = reading.blocks[0], reading.vision_x, reading.media_ids
    assert media is not None
    assert ids is not None
    norms = [block.cross_attention_norm for block in reading.blocks]
    attentions = [block.cross_attn for block in reading.blocks]
    if not all(
        is_untouched(block)
        and is_untouched(block.cross_attn)
        and is_plain(block.cross_attn.to_kv)
        and is_rms_norm(block.cross_attention_norm)
        for block in reading.blocks
    ):
        return False
    weights = [attention.to_kv.weight for attention in attentions]
    kinds = {(t.device, t.dtype) for t in (media, *weights)}
    alike = {(a.heads, a.head_dim) for a in attentions}
    eps = {norm.variance_epsilon for norm in norms}
    if len(kinds) != 1 or len(alike) != 1 or len(eps) != 1 or torch.is_grad_enabled():
        return False
    shape = (len(weights), media.shape[1], *alike.pop())
    keys, values = memory_buffers(*shape, media.dtype, media.device).unbind(0)
    ops.build_memory(
        media[0],
        weights,
        [norm.weight for norm in norms],
        *table_of(first.cross_attn, media),
        ids[0].to(media.device).int(),
        list(keys.unbind(0)),
        list(values.unbind(0)),
        eps=eps.pop(),
    )
    pairs = zip(keys.unbind(0), values.unbind(0), strict=True)
    reading.built.update(zip(reading.blocks, pairs, strict=True))
    return True


def places_of(
    block: nn.Module, x: Tensor, media: Tensor, keys: Tensor, reading: Reading | None
) -> tuple[Tensor, QueryRotation]:
    """What each token of x [B, N, d] reads, and how its query is rotated."""
    ids = reading.ids if reading is not None else block.cross_attn_text_position_ids
    spans = spans_of(block.cross_attn, x, keys, reading)
    return spans, rotation_of(block.cross_attn, ids, x)


def spans_of(attention: nn.Module, x: Tensor, keys: Tensor, reading: Reading | None) -> Tensor:
    """Spans [B, N or 1, 2] of tokens x [B, N, d] in keys [B * M, H, D] or [M, H, D]."""
    B, N, _ = x.shape
    if reading is not None:
        return reading.spans(x)
    bounds = attention.cu_seqlens_q, attention.cu_seqlens_k
    if all(t is not None for t in bounds):
        queries, memory = (t.flatten().to(x.device).int() for t in bounds)
        return spans_from_cu_seqlens(queries, memory, N)
    mask = attention.media_attn_mask
    M = len(keys) // B
    rows = whole(B, M, x.device)
    if mask is None:
        return rows
    return keep_while_alive(mask, spans_of_mask, (), lambda: spans_of_mask(mask)) + rows[..., :1]


def spans_of_mask(mask: Tensor) -> Tensor:
    """Spans [B, N, 2] of a mask bool [B, 1, N, M] whose rows are each one interval.

    Once per mask, with one sync.

    Raises:
        ValueError: a row with a hole.
    """
    seen = mask[:, 0]
    count = seen.sum(-1)
    start = seen.int().argmax(-1)
    end = seen.shape[-1] - seen.flip(-1).int().argmax(-1)
    if not bool(((end - start == count) | (count == 0)).all()):
        raise ValueError(
            "patched: media_attn_mask must let each token see one interval of the image tokens"
        )
    return torch.stack([start, start + count], -1)
