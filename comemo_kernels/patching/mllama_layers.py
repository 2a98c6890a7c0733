"""The layers of Mllama's text model, in our operations."""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo_kernels import operations as ops
from comemo_kernels._op import on_triton
from comemo_kernels.patching.mllama_attention import attend, attend_and_add
from comemo_kernels.patching.mllama_mask import SEEN, Seen, cache_of, is_replaced
from comemo_kernels.patching.plain import is_plain, is_rms_norm, is_silu, is_untouched
from comemo_kernels.patching.replacement import Replacement

# Names in transformers of what computes plain attention. Others may compute something else.
IMPLEMENTATIONS = frozenset(("eager", "sdpa", "flex_attention"))
WIDEST = 256  # D of a head, on a GPU
_OF_CROSS_LAYERS = frozenset(
    ("cross_attention_states", "cross_attention_mask", "full_text_row_masked_out_mask", SEEN)
)
_OF_LAYERS = frozenset(
    (
        *_OF_CROSS_LAYERS,
        *("attention_mask", "position_ids", "past_key_values", "cache", "use_cache"),
        "position_embeddings",
    )
)
_OF_SELF_ATTENTION = frozenset(
    ("hidden_states", "attention_mask", "position_embeddings", "past_key_values", "cache")
)

# --- replaced functions ---


def cross_layer(call: Replacement, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """MllamaCrossAttentionDecoderLayer.forward."""
    layer, x, seen = call.module, hidden_states, kwargs.get(SEEN)
    if args:
        return call.original(hidden_states, *args, **_with_mask(kwargs, "cross_attention_mask"))
    attn, gate = layer.cross_attn, layer.cross_attn_attn_gate
    given = {
        "attention_mask": kwargs.get("cross_attention_mask"),
        "cross_attention_states": kwargs.get("cross_attention_states"),
        _cache_name(kwargs): cache_of(kwargs),
        **{name: value for name, value in kwargs.items() if name not in _OF_LAYERS},
    }
    if seen is not None:
        given[SEEN] = seen
    if is_replaced(attn) and is_untouched(attn) and _why_not(attn, x, given) is None:
        q = _project(layer.input_layernorm, attn.q_proj, x)
        q, k, v, spans = _read(attn, q, given)
        if is_plain(attn.o_proj) and _fits(x, attn.o_proj.weight, gate):
            x = attend_and_add(x, q, k, v, spans, attn.o_proj.weight, gate)
        else:
            x = x + gate.tanh() * attn.o_proj(attend(q, k, v, spans).flatten(2))
    else:
        if not is_replaced(attn):
            given = _with_mask(given, "attention_mask")
        read, _ = attn(hidden_states=layer.input_layernorm(x), **given)
        x = x + gate.tanh() * read
    rows = kwargs.get("full_text_row_masked_out_mask") if seen is None else seen.rows
    norm, gate = layer.post_attention_layernorm, layer.cross_attn_mlp_gate
    if seen is None and rows is not None:  # factors of transformers
        return x + gate.tanh() * (rows[:, 0] * layer.mlp(norm(x)))
    y = _feed_forward(norm, layer.mlp, x, gate)
    return y if rows is None else torch.where(rows, y, x)


def cross_attention(call: Replacement, *args: Any, **kwargs: Any) -> Any:
    """MllamaTextCrossAttention.forward, which the layer calls if it is hooked."""
    attn, x = call.module, kwargs.get("hidden_states")
    if args or x is None:
        return call.original(*args, **_with_mask(kwargs, "attention_mask"))
    reason = _why_not(attn, x, kwargs)
    if reason is None and _weights_are_read(attn, kwargs):
        reason = f"{attn.config._attn_implementation} attention returns weights, which are read"
    if reason is not None:
        return call.refuse(reason, **_with_mask(kwargs, "attention_mask"))
    q, k, v, spans = _read(attn, attn.q_proj(x), kwargs)
    return attn.o_proj(attend(q, k, v, spans).flatten(2)), None


def self_layer(call: Replacement, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """MllamaSelfAttentionDecoderLayer.forward."""
    kwargs.pop(SEEN, None)
    if args:
        return call.original(hidden_states, *args, **kwargs)
    layer, x = call.module, hidden_states
    given = {name: value for name, value in kwargs.items() if name not in _OF_CROSS_LAYERS}
    given = {"attention_mask": None, "position_embeddings": None, **given}
    read, _ = layer.self_attn(hidden_states=_norm(layer.input_layernorm, x), **given)
    return _feed_forward(layer.post_attention_layernorm, layer.mlp, x + read, None)


def self_attention(call: Replacement, *args: Any, **kwargs: Any) -> Any:
    """MllamaTextSelfAttention.forward, around the attention that transformers has chosen."""
    attn, x, table = call.module, kwargs.get("hidden_states"), kwargs.get("position_embeddings")
    if args or x is None or table is None or table[0].shape[-1] != attn.head_dim:
        return call.original(*args, **kwargs)
    heads = (-1, attn.head_dim)
    q, k = attn.q_proj(x).unflatten(2, heads), attn.k_proj(x).unflatten(2, heads)
    v = attn.v_proj(x).unflatten(2, heads).transpose(1, 2)
    q, k = ops.apply_rotary(q, k, *(half[..., : attn.head_dim // 2] for half in table))
    q, k, cache = q.transpose(1, 2), k.transpose(1, 2), cache_of(kwargs)
    rest = {name: value for name, value in kwargs.items() if name not in _OF_SELF_ATTENTION}
    if cache is not None:
        more = {"kwargs": rest} if "cache" in kwargs else {}
        k, v = cache.update(k, v, attn.layer_idx, **more)
    transformers = sys.modules[type(attn).__module__]
    read, weights = transformers.ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, transformers.eager_attention_forward
    )(
        attn,
        q,
        k,
        v,
        kwargs.get("attention_mask"),
        dropout=attn.dropout if attn.training else 0.0,
        scaling=attn.scaling,
        **rest,
    )
    return attn.o_proj(read.reshape(*x.shape[:2], -1)), weights


# --- attention ---


def _why_not(attn: nn.Module, x: Tensor, given: dict[str, Any]) -> str | None:
    """Why our attention cannot compute this call, or None; before a cache is written."""
    seen, cache = given.get(SEEN), cache_of(given)
    implementation = attn.config._attn_implementation
    if implementation not in IMPLEMENTATIONS:
        return f"its attention is {implementation}"
    if seen is None and given.get("attention_mask") is not None:
        return "it got a dense mask"
    if seen is None and x.shape[1] > 1:
        return "without cross_attention_mask the implementation decides what a token sees"
    if attn.training and attn.dropout:
        return "it is trained with dropout"
    if attn.scaling != attn.head_dim**-0.5:
        return "its scale is not 1 / sqrt(head_dim)"
    if on_triton(x) and (x.dtype == torch.float64 or attn.head_dim > WIDEST):
        return f"no kernel for {x.dtype} and heads of {attn.head_dim}"
    if given.get("cross_attention_states") is None:
        layers = getattr(cache, "layers", ())
        if attn.layer_idx >= len(layers) or not isinstance(layers[attn.layer_idx].keys, Tensor):
            return "there are no keys"
    return None


def _read(
    attn: nn.Module, q: Tensor, given: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Queries [B, N, H, D], keys and values [B, G, S, D], and the spans to read."""
    q = _norm(attn.q_norm, q.unflatten(2, (attn.num_heads, attn.head_dim)))
    states, cache, seen = given.get("cross_attention_states"), cache_of(given), given.get(SEEN)
    if states is None:
        held = cache.layers[attn.layer_idx]
        k, v = held.keys, held.values
    else:
        shape = (len(q), -1, attn.num_key_value_heads, attn.head_dim)
        k = _norm(attn.k_norm, attn.k_proj(states).view(shape)).transpose(1, 2)
        v = attn.v_proj(states).view(shape).transpose(1, 2)
        if cache is not None:
            more = {"kwargs": given} if "cache" in given else {}
            k, v = cache.update(k, v, attn.layer_idx, **more)
    if not q.dtype == k.dtype == v.dtype and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    S = k.shape[2]
    if seen is None:  # one token, which reads everything
        return q, k, v, ((S * torch.arange(2, device=q.device))[None, None],)
    if seen.keys != S:
        raise ValueError(
            f"MllamaTextCrossAttention: cross_attention_mask must be for {S} vision tokens, got"
            f" one for {seen.keys}"
        )
    return q, k, v, seen.spans


def _weights_are_read(attn: nn.Module, given: dict[str, Any]) -> bool:
    """Whether the second result of the attention may be used, which SDPA does not have.

    Once weights were asked for, transformers has a hook in the module, which does nothing else.
    """
    if attn.config._attn_implementation == "sdpa":
        return False
    if given.get("output_attentions", getattr(attn.config, "output_attentions", False)):
        return True
    hooks = vars(attn)["_forward_hooks"].values()
    return any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks)


# --- parts ---


def _fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether an operation takes these weights with x."""
    for weight in weights:
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return False
    return True


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if is_rms_norm(norm) and x.dtype == norm.weight.dtype:
        return norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.variance_epsilon)
    return norm(x)


def _project(norm: nn.Module, linear: nn.Module, x: Tensor) -> Tensor:
    if is_rms_norm(norm) and is_plain(linear) and _fits(x, norm.weight, linear.weight):
        return ops.norm_linear(x, norm.weight, linear.weight, norm.variance_epsilon)
    return linear(norm(x))


def _feed_forward(norm: nn.Module, mlp: nn.Module, x: Tensor, gate: Tensor | None) -> Tensor:
    """x + tanh(gate) * mlp(norm(x))."""
    weights: tuple[Tensor, ...]
    if not (
        type(mlp).__name__ == "MllamaTextMLP"
        and is_untouched(mlp)
        and is_silu(mlp.act_fn)
        and is_rms_norm(norm)
        and is_plain(mlp.gate_proj, mlp.up_proj)
        and _fits(x, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight)
    ):
        added = mlp(norm(x))
    elif is_plain(mlp.down_proj) and _fits(x, mlp.down_proj.weight):
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        return ops.gated_swiglu(x, norm.weight, *weights, gate, norm.variance_epsilon)
    else:
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight)
        added = mlp.down_proj(ops.norm_swiglu(x, norm.weight, *weights, norm.variance_epsilon))
    return x + (added if gate is None else gate.tanh() * added)


# --- arguments ---


def _cache_name(kwargs: dict[str, Any]) -> str:
    return "cache" if "cache" in kwargs else "past_key_values"


def _with_mask(kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments that transformers' own code expects: its masks, which the model left out."""
    kwargs = dict(kwargs)
    seen: Seen | None = kwargs.pop(SEEN, None)
    if seen is not None:
        kwargs[name], rows = seen.dense()
        if name == "cross_attention_mask":
            kwargs["full_text_row_masked_out_mask"] = rows
    return kwargs
