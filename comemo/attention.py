"""Which attention the mixin layers use: our kernels, or another one of transformers' interface.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head dimension.
"""

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward
from transformers.utils.generic import is_flash_attention_requested

import comemo_kernels as ops
from comemo.config import MixinConfig
from comemo.config_parts import OWN_ATTENTION, attention_by_part
from comemo_kernels import MemoryScales, QueryRotation

HALF = (torch.float16, torch.bfloat16)


def attend_memory(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    spans: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attend_spans` with the signature of transformers' attention interface.

    Args:
        module: not used.
        query: [B, H, N, D], rotated.
        key, value: [1, G, M, D], the image memory of all prompts; keys are rotated.
        attention_mask: None; spans are the only mask.
        spans: integers [B, N, 2] or [B, 1, 2], half-open in [0, M].
        kwargs: other arguments of the interface; dropout must be 0 and scaling 1 / sqrt(D).

    Returns:
        [B, N, H, D] and None.

    Raises:
        ValueError: no spans, as from a self-attention; a mask, dropout or another scaling.
    """
    if spans is None:
        raise ValueError(
            f"{OWN_ATTENTION}: spans must say which keys a query reads, got None: this attention is"
            " for an image memory, not for causal self-attention"
        )
    scaling, wanted = kwargs.get("scaling"), query.shape[-1] ** -0.5
    if attention_mask is not None or kwargs.get("dropout") or scaling not in (None, wanted):
        raise ValueError(
            f"{OWN_ATTENTION}: attention_mask must be None, dropout 0 and scaling {wanted}, got"
            f" {'a' if attention_mask is not None else 'no'} mask, {kwargs.get('dropout')} and"
            f" {scaling}"
        )
    if key.shape[0] != 1:
        raise ValueError(f"{OWN_ATTENTION}: key must be [1, G, M, D], got {tuple(key.shape)}")
    k, v = (t[0].transpose(0, 1) for t in (key, value))
    return cast(Tensor, ops.attend_spans(query.transpose(1, 2), k, v, spans)), None


ALL_ATTENTION_FUNCTIONS.register(OWN_ATTENTION, attend_memory)


def attention_of(config: MixinConfig) -> str:
    """Name of the attention of mixin layers with this config.

    The attribute `_attn_implementation` says the same, but a config looks it up in 10 us, which
    would count in each layer of each token.
    """
    if torch.compiler.is_compiling():
        return config._attn_implementation or OWN_ATTENTION
    return object.__getattribute__(config, "_attn_implementation_internal") or OWN_ATTENTION


class ChoosesAttention:
    """`set_attn_implementation` that also knows the mixin layers, for a `PreTrainedModel`."""

    config: Any

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers; mixin layers change only by their own key.

        Args:
            attn_implementation: a name for self-attention and vision tower, or names by the keys
                "", "text_config", "vision_config" and "mixin_config".
            args, kwargs: see transformers.

        Raises:
            ValueError: an unknown key or name, one whose package is not installed, or
                "comemo_kernels" for other layers than the mixin layers. Nothing is then changed in
                the mixin layers.
        """
        parts = dict(attention_by_part(attn_implementation))
        mixin = self.config.mixin_config
        chosen = parts.pop("mixin_config", mixin._attn_implementation)
        chosen = known_attention(self, chosen)
        super().set_attn_implementation(parts, *args, **kwargs)  # type: ignore[misc]
        mixin._attn_implementation_internal = chosen


def known_attention(model: Any, name: str | None, is_init_check: bool = False) -> str:
    """The attention of mixin layers that a name stands for.

    Args:
        model: a `PreTrainedModel`, for transformers' own checks of a name.
        name: None for our kernels.
        is_init_check: whether the weights do not exist yet.

    Raises:
        ValueError: an unknown name, or one whose package is not installed.
        ImportError: the same, as transformers raises it.
    """
    if name is None or name == OWN_ATTENTION:
        return OWN_ATTENTION
    if name.startswith("paged|"):
        raise ValueError(
            f"CoMemo: the attention of mixin_config must read a memory of its own, got {name!r},"
            " which reads pages of a KV cache"
        )
    return model._check_and_adjust_attn_implementation(name, is_init_check)


def attend_otherwise(
    layer: nn.Module,
    q: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Tensor,
    rotation: QueryRotation,
    scales: MemoryScales | None,
) -> Tensor:
    """`attend_spans` by the attention that the config of a mixin layer names.

    The function gets queries [B, H, N, D] and keys and values [B, H, M, D], all rotated. Flash
    attention gets the spans as bounds of samples (varlen), all others as the mask that is
    registered for their name, or as a bool mask [B, 1, N, M].

    Args:
        layer: the mixin layer, with `config`, `layer_idx`, `is_causal` and `num_key_value_groups`.
        q: [B, N, H, D], not rotated.
        key, value: [M, H, D], the whole memory without spare rows; no NaN in a row, because a mask
            does not keep it from other prompts.
        spans: integers [B, N, 2] or [B, 1, 2].
        rotation: of the queries.
        scales: must be None.

    Returns:
        [B, N, H, D]; zeros where a span is empty.

    Raises:
        ValueError: a float8 memory; for flash attention spans of tokens, or a dtype other than
            float16 and bfloat16.
    """
    config = cast(MixinConfig, layer.config)
    name = attention_of(config)
    if scales is not None:
        raise ValueError(
            f"CoMemo: a float8 memory is read by {OWN_ATTENTION!r} only, got {name!r} as the"
            " attention of mixin_config"
        )
    B, N, _, D = q.shape
    M = key.shape[0]
    if not (q.numel() and M):  # zeros, with gradients; others refuse empty tensors
        return cast(Tensor, ops.attend_spans(q, key, value, spans, rotation))
    start, end = spans[..., :1], spans[..., 1:]
    q, key = rotate_for_prompts(q, key, rotation)
    q, keys = q.transpose(1, 2), key.transpose(1, 2).expand(B, -1, -1, -1)  # [B, H, N or M, D]
    values = value.transpose(0, 1).expand(B, -1, -1, -1)
    mask, bounds = None, {}
    if is_flash_attention_requested(requested_attention_implementation=name):
        check_half(name, q)
        bounds = varlen_of_spans(name, spans, N, M)
    else:
        mask = mask_of_spans(config, spans, N, M, q)
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    out, _ = attend(
        layer, q, keys, values, mask, dropout=0.0, scaling=D**-0.5, is_causal=False, **bounds
    )
    return torch.where((start < end)[..., None], out, 0)


def rotate_for_prompts(q: Tensor, key: Tensor, rotation: QueryRotation) -> tuple[Tensor, Tensor]:
    """Queries [B, N, H, D] and keys [B or 1, M, H, D] whose products are those of a span.

    `attend_spans` rotates a query separately for each image that it reads. One query for all images
    needs keys that are rotated by the distance of their image from the first one.
    """
    cos, sin, positions, starts, biases = rotation
    distance, keys = positions.expand(q.shape[:2]).long(), key[None]
    if starts is not None and biases is not None and len(starts):
        distance = distance - biases[:, :1]
        if len(starts) > 1:
            place = torch.arange(len(key), device=key.device, dtype=starts.dtype)
            image = torch.searchsorted(starts, place, right=True) - 1
            shift = (biases - biases[:, :1])[:, image.clamp(min=0)].long()  # [B or 1, M]
            keys = keys.expand(len(shift), -1, -1, -1)
            keys = ops.apply_rotary(keys, None, *_rows(cos, sin, shift))[0]
    return ops.apply_rotary(q, None, *_rows(cos, sin, distance))[0], keys


def _rows(cos: Tensor, sin: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a table for distances of either sign, NaN beyond the table."""
    row, sign = distance.abs(), distance.sign()[..., None].to(sin.dtype)
    beyond = (row >= len(cos))[..., None]
    row = row.clamp(max=len(cos) - 1)
    nan = float("nan")
    return cos[row].masked_fill(beyond, nan), (sin[row] * sign).masked_fill(beyond, nan)


def mask_of_spans(config: Any, spans: Tensor, tokens: int, memory: int, like: Tensor) -> Any:
    """The spans as the mask of an implementation, in the form that transformers registers for it.

    A row without any key is undefined in a softmax, so tokens with an empty span read everything;
    their result has to be set to zero.

    Args:
        config: names the implementation.
        spans: [B, N, 2] or [B, 1, 2].
        tokens, memory: N and M.
        like: a tensor of the mask's dtype, if it is not bool, and device.

    Returns:
        For "eager" [B, 1, N, M] in the dtype of `like`, for "flex_attention" a `BlockMask`, for
        "sdpa" and for a name without a registered form a bool mask [B, 1, N, M].
    """
    starts, ends = (bound.expand(-1, tokens) for bound in spans.unbind(-1))  # [B, N]

    def reads(batch: Tensor, head: Tensor, token: Tensor, place: Tensor) -> Tensor:
        start, end = starts[batch, token], ends[batch, token]
        return ((place >= start) & (place < end)) | (start >= end)

    name, forms = config._attn_implementation, ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    return forms[name if name in forms else "sdpa"](
        batch_size=len(spans),
        q_length=tokens,
        kv_length=memory,
        q_offset=0,
        kv_offset=0,
        mask_function=reads,
        attention_mask=None,
        allow_is_causal_skip=False,
        dtype=like.dtype,
        config=config,
        use_vmap=False,
        device=like.device,
    )


def varlen_of_spans(name: str, spans: Tensor, tokens: int, memory: int) -> dict[str, Any]:
    """Arguments of flash attention for spans of prompts, over the keys of all B prompts, B * M.

    Samples of flash attention follow one another. So between the spans there are samples that have
    the keys that no token reads, and no token.

    Args:
        name: of the implementation, for the error.
        spans: [B, 1, 2].
        tokens, memory: N and M.

    Raises:
        ValueError: spans of tokens: their samples are not known without reading values.
    """
    B = len(spans)
    if spans.shape[1] != 1:
        raise ValueError(
            f"CoMemo: {name!r} reads one span of the image memory for each prompt, got a span for"
            " each token, as packed rows and images that only later tokens see have: choose"
            f" {OWN_ATTENTION!r} or 'sdpa' for mixin_config"
        )
    start = spans[:, 0, 0].clamp(0, memory)
    end = spans[:, 0, 1].clamp(0, memory).maximum(start)
    prompt = torch.arange(B, device=spans.device)
    edges = torch.stack([prompt, prompt + 1], 1) * tokens
    keys = torch.stack([start, end], 1) + prompt[:, None] * memory
    return {
        "cu_seq_lens_q": _bounds(edges, B * tokens),
        "cu_seq_lens_k": _bounds(keys, B * memory),
        "max_length_q": tokens,
        "max_length_k": memory,
    }


def _bounds(inner: Tensor, total: int) -> Tensor:
    """int32 [2 B + 2], from 0 over `inner` [B, 2] to `total`."""
    return nn.functional.pad(nn.functional.pad(inner.flatten(), (1, 0)), (0, 1), value=total).int()


def check_flash(name: str | None, x: Tensor, places: Tensor | None, cache: Any, mask: Any) -> None:
    """Refuse a self-attention that flash attention would compute wrongly without saying so.

    Args:
        name: the self-attention's implementation; others are not checked.
        x: the hidden states.
        places: of tokens in packed samples whose bounds are not known.
        cache: the KV cache or None.
        mask: the 2D attention_mask or None.

    Raises:
        ValueError: a dtype other than float16 and bfloat16; packed rows without bounds; a static
            cache without an attention_mask.
    """
    if name is None or not is_flash_attention_requested(requested_attention_implementation=name):
        return
    check_half(name, x)
    if places is not None:
        raise ValueError(
            f"CoMemo: {name!r} needs the bounds of samples on the host, which torch.compile does"
            " not have for position_ids without an attention_mask: pass attention_mask for rows"
            " that are not packed, or choose 'sdpa'"
        )
    if mask is None and getattr(cache, "is_compileable", False):
        raise ValueError(
            f"CoMemo: {name!r} with a static cache must get an attention_mask, which tells how much"
            " of the cache is filled, got None"
        )


def check_half(name: str, x: Tensor) -> None:
    """Refuse what flash attention cannot read.

    Args:
        name: of an implementation; others than flash attention are not checked.
        x: what it reads.

    Raises:
        ValueError: a dtype other than float16 and bfloat16, outside autocast.
    """
    if not re.search("flash.?att", name) or x.dtype in HALF:
        return
    if not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"CoMemo: {name!r} must get float16 or bfloat16, got {x.dtype}: load the model with"
            " dtype=torch.bfloat16, or choose 'sdpa'"
        )
