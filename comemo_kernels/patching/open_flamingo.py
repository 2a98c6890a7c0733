"""open_flamingo 2.0: Flamingo's gated cross-attention, in a whole Flamingo or in any model.

    x = x + tanh(attn_gate) * (a Wo)       a: each token reads the latest image, or all so far
    x = x + tanh(ff_gate) * ff(x)

Source: Flamingo (arXiv:2204.14198) and open_flamingo's `helpers.py`, whose rules are kept. Keys and
values are computed once for each tensor of image features, not in every decode step.

Letters: B batch, N tokens, d width, T images of a sample, n features of an image, M = T * n,
H heads, D head dimension.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comemo_kernels.operations import attend_gated, attend_spans, gated_residual
from comemo_kernels.patching.media import keep_while_alive
from comemo_kernels.patching.open_flamingo_likeness import Likeness, has_attention, has_block
from comemo_kernels.patching.open_flamingo_spans import find_spans
from comemo_kernels.patching.plain import is_plain, is_untouched
from comemo_kernels.patching.plan import Plan
from comemo_kernels.patching.replacement import Replacement

NAME = "open_flamingo (Flamingo, or a model with its GatedCrossAttentionBlock)"


def recognise(model: nn.Module) -> bool:
    """Whether a model is a Flamingo, its language model, or holds blocks and no such model."""
    if any(_is_flamingo(module) for module in model.modules()):
        return _is_flamingo(model)  # not a model around it
    likeness = Likeness(_prepare)
    return any(likeness.is_attention(module) for module in model.modules())


def _is_flamingo(model: nn.Module) -> bool:
    """Whether it is a Flamingo or a language model that `init_flamingo` has extended."""
    parts = vars(model)["_modules"]
    if {"vision_encoder", "perceiver", "lang_encoder"} <= parts.keys():
        model = parts["lang_encoder"]
    return {"gated_cross_attn_layers", "old_decoder_blocks"} <= vars(model)["_modules"].keys()


def make_plan(plan: Plan) -> None:
    """Plan all replacements in `plan.model`."""
    likeness = Likeness(_prepare)
    for module in plan.model.modules():
        if likeness.is_block(module):
            plan.replace(module, _run_block, "attend_gated, gated_residual")
        elif likeness.is_attention(module):
            plan.replace(module, _attend, "attend_spans, keys and values once for each image")
        elif has_block(module) or has_attention(module):
            plan.leave(module, f"{type(module).__name__} computes something else")
        elif type(module).__name__ == "PerceiverResampler":
            plan.leave(module, "runs once for each image, not for each token")


# --- attention ---


class _Read(NamedTuple):
    """The arguments of `attend_spans`."""

    q: Tensor  # [B, N, H, D]
    k: Tensor  # [B * M, H, D], or [M, H, D] where samples share their images
    v: Tensor
    spans: Tensor

    def attend(self) -> Tensor:
        """[B, N, H * D]"""
        found = attend_spans(*self)
        assert isinstance(found, Tensor)
        return found.flatten(2)


def _attend(
    call: Replacement,
    x: Tensor,
    media: Tensor,
    media_locations: Tensor | None = None,
    use_cached_media: bool = False,
) -> Tensor:
    given = (x, media, media_locations, use_cached_media)
    reason = _find_reason(call.module, x)
    if reason is not None:
        return call.refuse(reason, *given)
    read = _prepare(call.module, *given)
    return call.original(*given) if read is None else call.module.to_out(read.attend())


def _find_reason(own: nn.Module, x: Tensor) -> str | None:
    """Why the kernels cannot be used; None if they can."""
    if not x.is_cuda:
        return None
    if x.dtype == torch.float64:
        return "float64 has no kernel"
    wide = getattr(own.to_q, "out_features", 0) // own.heads
    return f"heads of {wide} have no kernel, at most 256" if wide > 256 else None


def _prepare(
    own: nn.Module, x: Tensor, media: Tensor, locations: Tensor | None, cached: bool
) -> _Read | None:
    """Queries, keys, values and spans; None for arguments that are wrong or rare."""
    if x.ndim != 3 or media.ndim != 4 or not x.numel() or not media.numel():
        return None
    (B, N), samples = x.shape[:2], media.shape[0]
    if samples not in (1, B) or _find_reason(own, x) is not None:
        return None
    if locations is None:
        if not cached:
            return None  # an error
    elif locations.ndim != 2 or locations.shape[0] not in (1, B):
        return None
    elif not cached and locations.shape[1] != N:
        return None  # an error
    latest = bool(own.only_attend_immediate_media)
    spans, blind = find_spans(x, media, locations, latest, bool(cached))
    q = own.to_q(own.norm(x)).unflatten(-1, (own.heads, -1))
    scale = own.scale * math.sqrt(q.shape[-1])  # beside that of `attend_spans`
    if not math.isclose(scale, 1):
        q = q * scale
    if blind is not None:
        q = q.masked_fill(blind, 0)
    k, v = _find_keys(own, media)
    return _Read(q, k, v, spans)


def _find_keys(own: nn.Module, media: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of all samples, one after the other, as views of one tensor."""
    to_kv = own.to_kv

    def compute() -> tuple[Tensor, Tensor]:
        both = to_kv(media.flatten(1, 2)).flatten(0, 1)  # [B * M, 2 * H * D]
        k, v = both.unflatten(-1, (2, own.heads, -1)).unbind(1)
        return k, v

    weight = vars(to_kv)["_parameters"].get("weight")
    known = weight is not None and is_plain(to_kv)
    return keep_while_alive(media, own, (weight,) if known else None, compute)


# --- block ---


def _run_block(
    call: Replacement,
    x: Tensor,
    media: Tensor,
    media_locations: Tensor | None = None,
    use_cached_media: bool = False,
) -> Tensor:
    own, attn = call.module, call.module.attn
    seen = (media_locations, use_cached_media)
    read = _prepare(attn, x, media, *seen) if _is_ours(attn) else None
    if read is None:
        added = attn(x, media, media_locations=seen[0], use_cached_media=seen[1])
        x = added * own.attn_gate.tanh() + x
    elif _can_fuse(x, read.q, attn.to_out, own.attn_gate):
        x = attend_gated(x, *read, attn.to_out.weight, own.attn_gate)
    else:
        x = attn.to_out(read.attend()) * own.attn_gate.tanh() + x
    return _feed_forward(own.ff, x, own.ff_gate)


def _is_ours(attn: nn.Module) -> bool:
    """Whether an attention, if it were called, would run `_attend` and nothing else."""
    forward = vars(attn).get("forward")
    return (
        type(forward) is Replacement
        and forward.active
        and forward.function is _attend
        and is_untouched(attn)
    )


def _can_fuse(x: Tensor, a: Tensor, linear: nn.Module, gate: Tensor) -> bool:
    """Whether `gated_residual` does what calling a linear layer and adding its output does."""
    return (
        is_plain(linear)
        and x.dtype == a.dtype == gate.dtype == linear.weight.dtype
        and x.stride(-1) == a.stride(-1) == linear.weight.stride(-1) == 1
        and gate.shape == (1,)
        and not torch.is_autocast_enabled(x.device.type)
    )


def _feed_forward(ff: nn.Module, x: Tensor, gate: Tensor) -> Tensor:
    """x + tanh(gate) * ff(x), of any modules in a sequence that ends with a linear layer."""
    if type(ff) is not nn.Sequential or not len(ff) or not is_untouched(ff):
        return ff(x) * gate.tanh() + x
    *inner, last = vars(ff)["_modules"].values()
    a = x
    for module in inner:
        a = module(a)
    if _can_fuse(x, a, last, gate):
        return gated_residual(x, a, last.weight, gate)
    return last(a) * gate.tanh() + x
