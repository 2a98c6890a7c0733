"""Keys and values of image tokens with gradients, in PyTorch; the algebra that kernels share.

With x the media normalised without weight, g and W a layer's norm and projection weights, and
dy [M, 2 * G * D] the gradient of its product, that of the keys rotated back:

    A = dy^T x;  dW = A * g;  dg = sum over the rows of W * A;  dx = sum over the layers of dy (W g)

So no layer's own normalised media are needed, and x is computed again from the media.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._once import once
from comemo_kernels.reference.attention_groups import rotate_by_distance
from comemo_kernels.reference.memory_build import project_layers
from comemo_kernels.reference.memory_build_checks import check_projection
from comemo_kernels.reference.norms import rms_norm, rms_norm_gradient

Layers = tuple[Tensor, ...]


@public
def project_memory(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
    eps: float = 1e-5,
) -> tuple[Layers, Layers]:
    """Keys and values of image tokens, for every layer, with gradients: for training.

    The numbers are those that `build_memory` writes. For the gradients only the arguments are kept:
    they take one matrix product for each layer's weights, and one for the media.
    Source: CoMemo (arXiv:2506.06279).

    Args:
        media: [M, d] projected image tokens; float16, bfloat16 or float32, on a CPU also float64.
        kv_weights: of each layer [2 * G * D, d], the rows of keys first; on a GPU contiguous.
        norm_weights: of each layer [d]; None if they are folded into `kv_weights`.
        cos, sin: [P, D/2], a row for each id from 0 to P - 1. A larger id gives NaN.
        ids: int32 [M], of any sign: index of each token in its image, or in its prompt.
        heads: G.
        eps: of the norm.

    Returns:
        Keys and values, of each layer [M, G, D] in the dtype of media, new tensors. Under autocast
        media and weights, unless float64, are converted first. Differentiable once in media and
        weights.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; a table that requires grad; on a GPU
            layouts, float64 or a D above 128, which the kernels do not support.
    """
    inputs = autocast(media, kv_weights, norm_weights)
    check_projection(*inputs, cos, sin, ids, heads)
    return project(STEPS, *inputs, cos, sin, ids, heads, eps)


def autocast(
    media: Tensor, kv_weights: Sequence[Tensor], norm_weights: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor], list[Tensor] | None]:
    """Media and weights in the dtype of autocast, if it is on."""
    kind = media.device.type
    if not torch.is_autocast_enabled(kind):
        return media, list(kv_weights), None if norm_weights is None else list(norm_weights)
    dtype = torch.get_autocast_dtype(kind)

    def convert(x: Tensor) -> Tensor:
        return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x

    norms = None if norm_weights is None else [convert(x) for x in norm_weights]
    return convert(media), [convert(x) for x in kv_weights], norms


class Steps(NamedTuple):
    """What kernels compute on a GPU, and PyTorch elsewhere."""

    forward: Callable[..., list[Tensor]]  # keys of all layers, then values
    normalise: Callable[[Tensor, float], Tensor]  # media without a weight
    turn_back: Callable[..., Tensor]  # gradients of keys and values as one [M, 2 * G * D]
    norm_gradient: Callable[..., tuple[Tensor, Tensor]]


def project(
    steps: Steps,
    media: Tensor,
    kv_weights: list[Tensor],
    norm_weights: list[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
    eps: float,
) -> tuple[Layers, Layers]:
    """`project_memory` by these steps."""
    L, weights = len(kv_weights), (*kv_weights, *(norm_weights or ()))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (media, *weights)):
        found = _ProjectMemory.apply(steps, heads, eps, L, media, cos, sin, ids, *weights)
    else:
        found = tuple(steps.forward(media, kv_weights, norm_weights, cos, sin, ids, heads, eps))
    return found[:L], found[L:]


class _ProjectMemory(torch.autograd.Function):
    @staticmethod
    def forward(ctx, steps, heads, eps, layers, media, cos, sin, ids, *weights):
        ctx.save_for_backward(media, cos, sin, ids, *weights)
        ctx.steps, ctx.eps = steps, eps
        ctx.set_materialize_grads(False)
        norms = list(weights[layers:]) or None
        kv = list(weights[:layers])
        return tuple(steps.forward(media, kv, norms, cos, sin, ids, heads, eps))

    @staticmethod
    @once("project_memory")
    def backward(ctx, saved, *dys):
        media, cos, sin, ids, *weights = saved
        to_media, needed = ctx.needs_input_grad[4], ctx.needs_input_grad[8:]
        dmedia, dweights = project_gradient(
            ctx.steps, dys, media, (cos, sin, ids), weights, ctx.eps, to_media, needed
        )
        return None, None, None, None, dmedia, None, None, None, *dweights


def project_gradient(
    steps: Steps,
    dys: Sequence[Tensor | None],  # of the keys of all layers, then of the values
    media: Tensor,
    table: Sequence[Tensor],  # cos, sin, ids
    weights: Sequence[Tensor],  # kv_weights of all layers, then norm_weights, if not folded
    eps: float,
    to_media: bool,
    needed: Sequence[bool],  # for each weight
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of media and weights; what is not needed is not computed.

    One layer after the other: beside the results there are two [M, d], x and dx, the gradient
    [M, 2 * G * D] of one layer, and that of its weight.
    """
    grads: list[Tensor | None] = [None] * len(weights)
    x, dx, L = None, None, len(dys) // 2
    for layer in range(L):
        dk, dv, weight = dys[layer], dys[L + layer], weights[layer]
        norm = weights[L + layer] if len(weights) > L else None
        to_norm = norm is not None and needed[L + layer]
        if (dk is None and dv is None) or not (to_media or to_norm or needed[layer]):
            continue
        dy = steps.turn_back(*table, dk, dv)
        if needed[layer] or to_norm:
            x = steps.normalise(media, eps) if x is None else x
            product = dy.t() @ x  # A
            if to_norm:
                exact = torch.promote_types(product.dtype, torch.float32)
                grads[L + layer] = (weight * product.to(exact)).sum(0).to(product.dtype)
            if needed[layer]:
                grads[layer] = product if norm is None else product.mul_(norm)
        if to_media:
            weight = weight if norm is None else weight * norm
            dx = dy @ weight if dx is None else torch.addmm(dx, dy, weight)
    dmedia = None
    if dx is not None:
        dmedia = steps.norm_gradient(dx, media, None, None, eps, True, False)[0]
    return dmedia, grads


def _forward(media: Tensor, *inputs: Any) -> list[Tensor]:
    keys, values = zip(*project_layers(media, *inputs), strict=True)
    return [*keys, *values]


def _normalise(media: Tensor, eps: float) -> Tensor:
    return rms_norm(media, None, eps)


def _turn_back(
    cos: Tensor, sin: Tensor, ids: Tensor, dk: Tensor | None, dv: Tensor | None
) -> Tensor:
    parts = [torch.zeros_like(dv) if dk is None else rotate_by_distance(dk, -ids, cos, sin)]
    parts.append(torch.zeros_like(dk) if dv is None else dv)
    return torch.stack(parts, 1).flatten(1)


STEPS = Steps(
    _forward, lambda media, eps: rms_norm(media, None, eps), _turn_back, rms_norm_gradient
)
