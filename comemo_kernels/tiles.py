"""Vision tokens of any number of tiles to image tokens, for the sequence and the image memory.

    x = norm(fold(tokens)) * norm_weight + norm_bias         fold: n x n neighbours into channels
    y = gelu(x weight1^T + bias1) weight2^T + bias2          gelu by the error function

One pass folds and normalises the vision tower's output in place, class token and strides included
(`_unshuffle_norm`). Each GEMM has an epilogue: bias and GELU, bias and both destinations (`_gemm`).
Three launches, and one more for each GEMM whose last wave is split.
Traffic: tokens once; x written and read once, the GELU's output likewise; weights once; y once for
each destination. In bfloat16, 13 tiles and the 2B model's d = 2048, W = 4096: 27, 55, 27, 25 and
twice 14 MB. FLOPs: 2 * R * d * (W + d), there 84 G.
Backward: one pass over the GELU and one over the norm; the GEMMs are PyTorch's.
Source: CoMemo (arXiv:2506.06279), the projector of InternVL.

Letters: T tiles, C channels of a vision token, n fold, W = C*n*n, R rows of image tokens, d width
of the language model, E rows of the sequence.
"""

from typing import Any

import torch
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._gelu_gradient import gelu_gradient_op
from comemo_kernels._gemm import multiply
from comemo_kernels._once import once
from comemo_kernels._op import documented, on_triton, register
from comemo_kernels._unshuffle_norm import WIDEST, fold_norm_gradient_op, launch_fold_norm
from comemo_kernels.reference.tiles import check_project, check_project_kernel, place_rows

# --- operator ---


def _run(
    kept: tuple[Tensor, Tensor, Tensor] | None,  # also written: normed, stats and before
    media: Tensor,
    embeds: Tensor | None,
    rows: Tensor | None,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    n: int,
    transposed: bool,
    eps: float,
) -> None:
    if kept is None:
        normed, stats, before = weight1.new_empty(len(media), weight1.shape[1]), None, None
    else:
        normed, stats, before = kept
    launch_fold_norm(normed, stats, tokens, norm_weight, norm_bias, n, transposed, eps)
    inner = weight1.new_empty(len(media), weight1.shape[0])
    multiply(inner, normed, weight1, bias1, gelu=True, before=before)
    multiply(media, inner, weight2, bias2, embeds=embeds, rows=rows)


def _launch_into(media: Tensor, embeds: Tensor | None, rows: Tensor | None, *inputs: Any) -> None:
    _run(None, media, embeds, rows, *inputs)


def _launch(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found, keep = _fake(*inputs), inputs[-1]
    _run(found[1:] if keep else None, found[0], None, None, *inputs[:-1])
    return found


def _fake(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    n: int,
    transposed: bool,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """media; then normed, stats and before, which the gradient needs: empty unless `keep`."""
    R, (d, W) = tokens.shape[0] * ((tokens.shape[1] - 1) // (n * n)), weight1.shape
    media = weight1.new_empty(R, d)
    R = R if keep else 0
    stats = weight1.new_empty(R, 2, dtype=torch.float32)
    return media, weight1.new_empty(R, W), stats, weight1.new_empty(R, d)


_ARGUMENTS = (
    "Tensor tokens, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1,"
    " Tensor weight2, Tensor bias2, int n, bool transposed, float eps"
)
_project = register(
    f"project_tiles({_ARGUMENTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)", _launch, _fake
)
_project_ = register(
    f"project_tiles_(Tensor(a!) media, Tensor(b!)? embeds, Tensor? rows, {_ARGUMENTS}) -> ()",
    _launch_into,
    lambda *_: None,
)


class _ProjectTiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens, norm_weight, norm_bias, weight1, bias1, weight2, bias2, *fold):
        weights = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
        media, *kept = _project(tokens, *weights, *fold, True)
        ctx.save_for_backward(tokens, norm_weight, weight1, weight2, *kept)
        ctx.fold = fold[:2]
        return media

    @staticmethod
    @once("project_tiles")
    def backward(ctx, saved, dy):
        tokens, norm_weight, weight1, weight2, normed, stats, before = saved
        needed = ctx.needs_input_grad[:7]
        to_tokens, to_norm = needed[0], needed[1] or needed[2]
        grads: list[Tensor | None] = [None] * 7
        dy = dy.contiguous()
        if needed[6]:
            grads[6] = dy.sum(0)
        if any(needed[:6]):
            dz, inner = gelu_gradient_op(dy @ weight2, before)
            if needed[5]:
                grads[5] = dy.t() @ inner
            if needed[4]:
                grads[4] = dz.sum(0)
            if needed[3]:
                grads[3] = dz.t() @ normed
            if to_tokens or to_norm:
                dx, norm = fold_norm_gradient_op(
                    dz @ weight1, tokens, norm_weight, stats, *ctx.fold, to_tokens, to_norm
                )
                grads[0] = dx if to_tokens else None
                grads[1], grads[2] = (norm[0], norm[1]) if to_norm else (None, None)
        return *grads, None, None, None


# --- public ---


@documented(reference.project_tiles)
def project_tiles(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    ratio: float = 0.5,
    version: str = "v2",
    eps: float = 1e-5,
    activation: str = "gelu",
    media: Tensor | None = None,
    embeds: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    inputs = (tokens, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    if not on_triton(tokens):
        return reference.project_tiles(
            *inputs, ratio, version, eps, activation, media, embeds, rows
        )
    fold = check_project(*inputs, ratio, version, activation, media, embeds, rows)
    check_project_kernel(tokens, inputs[1:], fold.n, media, rows, WIDEST)
    if torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.get_autocast_dtype(tokens.device.type)
        inputs = (*inputs[:3], *(t.to(dtype) for t in inputs[3:]))
    options, weight1 = (fold.n, version == "v1", eps), inputs[3]
    grad, shape = torch.is_grad_enabled(), (tokens.shape[0], fold.tokens, weight1.shape[0])
    # Embeddings that require a gradient need it, even if nothing else does.
    place = embeds is not None and grad and any(t.requires_grad for t in (embeds, *inputs))
    if grad and any(t.requires_grad for t in inputs):
        found = _ProjectTiles.apply(*inputs, *options)
    elif media is None and (embeds is None or place):
        found = _project(*inputs, *options, False)[0]
    else:
        found = weight1.new_empty(shape[0] * shape[1], shape[2]) if media is None else media
        flat = None if embeds is None else embeds.view(-1, embeds.shape[-1])
        _project_(found, flat, rows, *inputs, *options)
    if place and embeds is not None and rows is not None:
        place_rows(found, embeds, rows)
    return found.view(shape)
