"""Vision tokens of ragged sets of tiles to image tokens, for the sequence and the image memory.

    x = norm(fold(tokens)) * norm_weight + norm_bias         fold: n x n neighbours into channels
    y = gelu(x weight1^T + bias1) weight2^T + bias2          gelu by the error function

One pass folds and norms the vision tower's output where it lies, class token and strides included;
each product ends in what follows it: bias and GELU, bias and both destinations. Three launches, and
one more for each product whose last wave is split (see _product.py).
Traffic: tokens once; x written and read once, the GELU's output likewise; weights once; y once for
each destination. In bfloat16, 13 tiles and the 2B model's d = 2048, W = 4096: 27, 55, 27, 25 and
twice 14 MB. FLOPs: 2 * R * d * (W + d), there 84 G.
Backward: a pass over the GELU and one over the norm; the products are PyTorch's, which has them.
Source: CoMemo (arXiv:2506.06279), the projector of InternVL.

Letters: T tiles, C channels of a vision token, n fold, W = C*n*n, R rows of image tokens, d width
of the language model, E rows of the sequence.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._gemm import multiply
from comemo_kernels._op import Kernel, documented, on_triton, register
from comemo_kernels._unshuffle_norm import WIDEST, fold_norm_gradient_op, launch_fold_norm, padded

# --- kernel ---


@triton.jit(do_not_specialize=["count"])
def _gelu_gradient_kernel(
    dx_ptr,  # [count], all contiguous
    y_ptr,  # gelu(x), for the gradient of the weight behind it
    dy_ptr,
    x_ptr,
    count,
    ALIGNED: tl.constexpr,  # count is a multiple of 8
    BLOCK: tl.constexpr,
):
    if ALIGNED:
        count = count // 8 * 8
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(dx_ptr + offs, (dy * slope).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offs, (x * below).to(y_ptr.dtype.element_ty), mask=mask)


gelu_gradient = Kernel(_gelu_gradient_kernel, [{"BLOCK": 2048, "num_warps": 8}])

# --- operator ---


def _launch_into(
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
    kept: tuple[Tensor, Tensor, Tensor] | None = None,  # normed, stats and before, to be written
) -> None:
    if kept is None:
        normed, stats, before = weight1.new_empty(len(media), weight1.shape[1]), None, None
    else:
        normed, stats, before = kept
    launch_fold_norm(normed, stats, tokens, norm_weight, norm_bias, n, transposed, eps)
    inner = weight1.new_empty(len(media), weight1.shape[0])
    multiply(inner, normed, weight1, bias1, gelu=True, before=before)
    multiply(media, inner, weight2, bias2, embeds=embeds, rows=rows)


def _launch(tokens: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = _fake(tokens, *rest)
    kept = found[1:] if rest[-1] else None
    _launch_into(*[found[0], None, None, tokens, *rest[:-1], kept])
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
    """media; what the gradient needs if `keep`, otherwise nothing: normed, stats, before."""
    R, (d, W) = tokens.shape[0] * ((tokens.shape[1] - 1) // (n * n)), weight1.shape
    media = weight1.new_empty(R, d)
    R = R if keep else 0
    stats = weight1.new_empty(R, 2, dtype=torch.float32)
    return media, weight1.new_empty(R, W), stats, weight1.new_empty(R, d)


def _launch_gelu_gradient(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dx, y = _fake_gelu_gradient(dy, x)
    count = x.numel()
    programs = -(-count // gelu_gradient.config["BLOCK"])
    gelu_gradient.launch(programs, dx, y, dy, x, count, count % 8 == 0)
    return dx, y


def _fake_gelu_gradient(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dy), torch.empty_like(x)


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
_gelu_gradient = register(
    "gelu_gradient(Tensor dy, Tensor x) -> (Tensor, Tensor)",
    _launch_gelu_gradient,
    _fake_gelu_gradient,
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
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        tokens, norm_weight, weight1, weight2, normed, stats, before = ctx.saved_tensors
        to_tokens, to_weight, to_bias, *wanted = ctx.needs_input_grad[:7]
        to_norm = to_weight or to_bias
        grads: list[Tensor | None] = [None] * 7
        dy = dy.contiguous()
        if wanted[3]:
            grads[6] = dy.sum(0)
        if to_tokens or to_norm or any(wanted[:3]):
            dz, inner = _gelu_gradient(dy @ weight2, before)
            if wanted[2]:
                grads[5] = dy.t() @ inner
            if wanted[1]:
                grads[4] = dz.sum(0)
            if wanted[0]:
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
    fold = reference.tiles.check_project(*inputs, ratio, version, activation, media, embeds, rows)
    _check_kernel(tokens, inputs[1:], fold.n, media, rows)
    if torch.is_autocast_enabled(tokens.device.type):
        dtype = torch.get_autocast_dtype(tokens.device.type)
        inputs = (*inputs[:3], *(t.to(dtype) for t in inputs[3:]))
    options, weight1 = (fold.n, version == "v1", eps), inputs[3]
    grad, shape = torch.is_grad_enabled(), (tokens.shape[0], fold.tokens, weight1.shape[0])
    # An embedding that learns must be told, though nothing else does.
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
        reference.tiles.place(found, embeds, rows)
    return found.view(shape)


def _check_kernel(
    tokens: Tensor,
    weights: tuple[Tensor, ...],
    n: int,
    media: Tensor | None,
    rows: Tensor | None,
) -> None:
    """Raise for what the reference can do and the kernels cannot, with every reason."""
    reasons = []
    if any(t.dtype == torch.float64 for t in (tokens, *weights)):
        reasons.append("float64 has no kernel")
    if tokens.stride(-1) != 1:
        reasons.append(f"C must be contiguous, got strides {tokens.stride()} of tokens")
    if not all(t.is_contiguous() for t in weights):
        reasons.append(f"weights must be contiguous, got strides {[t.stride() for t in weights]}")
    if media is not None and media.stride(-1) != 1:
        reasons.append(f"d must be contiguous, got strides {media.stride()} of media")
    if rows is not None and not rows.is_contiguous():
        reasons.append(f"rows must be contiguous, got strides {rows.stride()}")
    width = padded(n * n) * padded(tokens.shape[2])
    if width > WIDEST:
        reasons.append(f"n*n times C, rounded up, must be at most {WIDEST}, got {width}")
    if reasons:
        raise ValueError(
            f"project_tiles: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.project_tiles"
        )
