"""Self-attention of the published code: one launch rotates q and k, and keys are not repeated.

Letters: B batch, N tokens, H query heads, G key heads, g = H / G, D head dimension.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from comemo_kernels.operations import apply_rotary
from comemo_kernels.patching.growing import append
from comemo_kernels.patching.plain import is_untouched
from comemo_kernels.patching.replacement import Replacement

_FLASH = "InternLM2FlashAttention2"


def is_known(module: nn.Module) -> bool:
    """Whether this is the published attention, in one of its two classes."""
    parts = ("wqkv", "wo", "rotary_emb", "num_key_value_groups", "num_heads", "head_dim")
    known = type(module).__name__ in ("InternLM2Attention", _FLASH)
    return known and all(hasattr(module, part) for part in parts)


def angles(rotary: nn.Module, like: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """cos, sin [P, D/2] for ids below `length`; the module's own tables grow as published."""
    if is_untouched(rotary) and length <= rotary.max_seq_len_cached:
        cos, sin = rotary.cos_cached, rotary.sin_cached
    else:
        cos, sin = rotary(like, seq_len=length)
    half = cos.shape[-1] // 2
    return cos[:, :half].to(like.device), sin[:, :half].to(like.device)


def run(
    call: Replacement,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_value: Any = None,
    output_attentions: bool = False,
    use_cache: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Any]:
    """The layer on hidden_states [B, N, d]; arguments and results as published."""
    module, flash = call.module, type(call.module).__name__ == _FLASH
    if position_ids is None or (output_attentions and not flash):
        reason = "no position_ids" if position_ids is None else "attention weights are asked for"
        return call.refuse(
            reason,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_value=past_key_value,
            output_attentions=output_attentions,
            use_cache=use_cache,
            **kwargs,
        )
    B, N, _ = hidden_states.shape
    g, D = module.num_key_value_groups, module.head_dim
    qkv = module.wqkv(hidden_states).unflatten(-1, (-1, g + 2, D))  # [B, N, G, g + 2, D]
    q, k = rotate(module, qkv, position_ids, past_key_value)
    k, v = k.transpose(1, 2), qkv[..., -1, :].transpose(1, 2)  # [B, G, N, D]
    if past_key_value is not None:
        k, v = append(past_key_value[0], k), append(past_key_value[1], v)
    past_key_value = (k, v) if use_cache else None
    if flash:
        rows = (q.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2))
        out = module._flash_attention_forward(*rows, attention_mask, N)
    else:
        out = attend(q, k, v, attention_mask)
    return module.wo(out.reshape(B, N, -1)), None, past_key_value


def rotate(
    module: nn.Module, qkv: Tensor, position_ids: Tensor, past: Any
) -> tuple[Tensor, Tensor]:
    """q [B, N, G, g, D] and k [B, N, G, D], rotated, of qkv [B, N, G, g + 2, D], which is a view.

    Each key head with its query heads is a token of its own, so that no head is copied first.
    """
    B, N, G, _, D = qkv.shape
    length = N + (0 if past is None else past[0].shape[-2])
    cos, sin = angles(module.rotary_emb, qkv, length)
    ids = position_ids.unsqueeze(-1).expand(-1, -1, G).flatten(1)  # [B or 1, N * G]
    heads = qkv.flatten(1, 2)  # [B, N * G, g + 2, D]
    q, k = apply_rotary(heads[..., :-2, :], heads[..., -2:-1, :], cos, sin, ids, published=True)
    assert k is not None
    return q.unflatten(1, (N, G)), k.view(B, N, G, D)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q [B, N, G, g, D] reads k, v [B, G, M, D] under an additive mask; [B, N, G * g, D]."""
    B, N, G, g, D = q.shape
    if N == 1:  # the query heads of a key head are its rows
        return F.scaled_dot_product_attention(q.view(B, G, g, D), k, v, mask)
    q = q.flatten(2, 3).transpose(1, 2)  # [B, H, N, D]
    k, v = (t.repeat_interleave(g, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)
