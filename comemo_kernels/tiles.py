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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._blocks import offset_of
from comemo_kernels._op import Kernel, documented, multiprocessors, on_triton, register
from comemo_kernels._product import key_of, multiply

# --- kernel ---


@triton.jit
def _raster_offset(
    row,  # an image token
    f,  # [F] places of its neighbourhood
    side,  # image tokens along the side of a tile
    stride_t,
    stride_s,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """[F, 1] elements from the first token to those that are folded into an image token."""
    tile, place = row // (side * side), row % (side * side)
    if TRANSPOSED:
        i, j = place % side, place // side
    else:
        i, j = place // side, place % side
    token = 1 + (i * N + f // N) * (side * N) + j * N + f % N
    return (offset_of(tile, stride_t, ALIGNED) + offset_of(token, stride_s, ALIGNED))[:, None]


@triton.jit(do_not_specialize=["stride_t", "stride_s", "side", "channels"])
def _fold_norm_kernel(
    out_ptr,  # [R, W], contiguous
    stats_ptr,  # [R, 2] float32: mean, 1 / deviation
    x_ptr,  # [T, 1 + (side*n)**2, C], C contiguous
    weight_ptr,  # [W]
    bias_ptr,  # [W]
    stride_t: tl.int64,
    stride_s: tl.int64,
    side,
    channels,  # C
    eps,
    KEEP: tl.constexpr,  # write stats
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # the raster of image tokens is transposed
    ALIGNED: tl.constexpr,  # strides and C are multiples of 8
    BLOCK_F: tl.constexpr,  # N*N and C, rounded up to powers of two
    BLOCK_C: tl.constexpr,
):
    """One program folds and norms one image token."""
    row = tl.program_id(0)
    offs_f, c = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)[None, :]
    f = offs_f[:, None]
    if ALIGNED:  # the same number, and a mask of 8 elements that the compiler sees is one
        channels = channels // 8 * 8
    mask, width = (f < N * N) & (c < channels), N * N * channels
    offs = _raster_offset(row, offs_f, side, stride_t, stride_s, N, TRANSPOSED, ALIGNED) + c
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, 1), 0) / width
    x = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(tl.sum(x * x, 1), 0) / width + eps)
    if KEEP:
        tl.store(stats_ptr + row * 2, mean)
        tl.store(stats_ptr + row * 2 + 1, rstd)
    offs = f * channels + c
    w = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    y = (x * rstd * w + b).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset_of(row, width, ALIGNED) + offs, y, mask=mask)


@triton.jit(do_not_specialize=["stride_t", "stride_s", "side", "channels", "num_rows", "programs"])
def _fold_norm_gradient_kernel(
    dx_ptr,  # [T, 1 + (side*n)**2, C], contiguous
    dweight_ptr,  # [programs, W] float32
    dbias_ptr,  # [programs, W] float32
    dy_ptr,  # [R, W], contiguous
    stats_ptr,  # [R, 2]
    x_ptr,
    weight_ptr,
    stride_t: tl.int64,
    stride_s: tl.int64,
    side,
    channels,
    num_rows,  # R
    programs,
    TOKENS: tl.constexpr,  # write dx
    NORM: tl.constexpr,  # write dweight and dbias
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program takes every `programs`-th image token, and sums what weight and bias get."""
    pid = tl.program_id(0)
    offs_f, c = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_C)[None, :]
    f = offs_f[:, None]
    if ALIGNED:
        channels = channels // 8 * 8
    mask, width = (f < N * N) & (c < channels), N * N * channels
    inside = f * channels + c
    dweight = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_F, BLOCK_C], tl.float32)
    tokens = side * side
    dx_stride = (tokens * N * N + 1) * channels  # of a tile
    for i in range(tl.cdiv(num_rows - pid, programs)):
        row = pid + i * programs
        offs = _raster_offset(row, offs_f, side, stride_t, stride_s, N, TRANSPOSED, ALIGNED) + c
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offset_of(row, width, ALIGNED) + inside, mask=mask, other=0.0)
        dy = dy.to(tl.float32)
        mean, rstd = tl.load(stats_ptr + row * 2), tl.load(stats_ptr + row * 2 + 1)
        x = tl.where(mask, (x - mean) * rstd, 0.0)
        if NORM:
            dweight += dy * x
            dbias += dy
        if TOKENS:
            # Once for each row, from the nearest cache: held, it would cost registers.
            dy *= tl.load(weight_ptr + inside, mask=mask, other=0.0).to(tl.float32)
            along = tl.sum(tl.sum(dy * x, 1), 0) / width
            dx = (dy - tl.sum(tl.sum(dy, 1), 0) / width - x * along) * rstd
            dx = dx.to(dx_ptr.dtype.element_ty)
            offs = (
                _raster_offset(row, offs_f, side, dx_stride, channels, N, TRANSPOSED, ALIGNED) + c
            )
            tl.store(dx_ptr + offs, dx, mask=mask)
            # A tile's first program clears its class token.
            first = dx_ptr + offset_of(row // tokens, dx_stride, ALIGNED) + c
            cleared = mask & (f + row % tokens == 0)
            tl.store(first + f * 0, tl.zeros_like(dx), mask=cleared)
    if NORM:
        sums = offset_of(pid, width, ALIGNED) + inside
        tl.store(dweight_ptr + sums, dweight, mask=mask)
        tl.store(dbias_ptr + sums, dbias, mask=mask)


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


# A program holds a row: of more than NARROW elements by more warps. The widest InternViT's 3,200
# channels are 16,384 once folded by two and rounded up: its gradient spills up to 96 bytes of a
# thread, and what is wider still spills more. Beyond WIDEST no kernel is compiled.
NARROW, WIDEST = 8192, 65536
fold_norm = Kernel(_fold_norm_kernel, [{"num_warps": 4}, {"num_warps": 8}])
fold_norm_wide = Kernel(_fold_norm_kernel, [{"num_warps": 16}])
fold_norm_gradient = Kernel(_fold_norm_gradient_kernel, [{"num_warps": 8}, {"num_warps": 4}])
fold_norm_gradient_wide = Kernel(_fold_norm_gradient_kernel, [{"num_warps": 16}])
gelu_gradient = Kernel(_gelu_gradient_kernel, [{"BLOCK": 2048, "num_warps": 8}])

# --- operator ---


class _Plan(NamedTuple):
    """What a fold's kernels are told of it."""

    rows: int  # R
    wide: bool
    numbers: tuple[int, int, int, int]  # strides, side, channels
    constants: tuple[int, bool, bool, int, int]  # N, TRANSPOSED, ALIGNED, BLOCK_F, BLOCK_C

    @classmethod
    def of(cls, tokens: Tensor, n: int, transposed: bool) -> "_Plan":
        T, count, C = tokens.shape
        side = round((count - 1) ** 0.5) // n
        blocks = _padded(n * n), _padded(C)
        aligned = all(size % 8 == 0 for size in (*tokens.stride()[:2], C))
        return cls(
            rows=T * side * side,
            wide=blocks[0] * blocks[1] > NARROW,
            numbers=(*tokens.stride()[:2], side, C),
            constants=(n, transposed, aligned, *blocks),
        )


def _padded(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def launch_fold_norm(
    normed: Tensor,
    stats: Tensor | None,
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    n: int,
    transposed: bool,
    eps: float,
) -> None:
    """Write normed [R, W], and stats [R, 2] if they are wanted."""
    plan = _Plan.of(tokens, n, transposed)
    tensors = (normed, normed if stats is None else stats, tokens, norm_weight, norm_bias)
    constants = (stats is not None, *plan.constants)
    kernel = fold_norm_wide if plan.wide else fold_norm
    kernel.launch(
        *(plan.rows, key_of(tensors, *constants), *tensors, *plan.numbers, eps, *constants)
    )


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


def _launch_fold_norm_gradient(
    dy: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    stats: Tensor,
    n: int,
    transposed: bool,
    to_tokens: bool,
    to_norm: bool,
) -> tuple[Tensor, Tensor]:
    plan = _Plan.of(tokens, n, transposed)
    # Two on a multiprocessor keep its memory busy; each leaves a row of sums to be read again.
    programs = min(plan.rows, 2 * multiprocessors(dy.get_device()))
    T = tokens.shape[0] if to_tokens else 0
    dx = tokens.new_empty(T, *tokens.shape[1:])
    sums = dy.new_empty(2, programs if to_norm else 0, dy.shape[1], dtype=torch.float32)
    tensors = (dx, *sums.unbind(0), dy, stats, tokens, norm_weight)
    kernel = fold_norm_gradient_wide if plan.wide else fold_norm_gradient
    passes = [(to_tokens, to_norm)]
    if plan.wide and to_tokens and to_norm:  # both at once would spill
        passes = [(True, False), (False, True)]
    for flags in passes:
        constants = (*flags, *plan.constants)
        kernel.launch(
            *(programs, key_of(tensors, *constants), *tensors),
            *(*plan.numbers, plan.rows, programs, *constants),
        )
    return dx, sums.sum(1).to(norm_weight.dtype)


def _fake_fold_norm_gradient(
    dy: Tensor,
    tokens: Tensor,
    norm_weight: Tensor,
    stats: Tensor,
    n: int,
    transposed: bool,
    to_tokens: bool,
    to_norm: bool,
) -> tuple[Tensor, Tensor]:
    T = tokens.shape[0] if to_tokens else 0
    return tokens.new_empty(T, *tokens.shape[1:]), norm_weight.new_empty(2, dy.shape[1])


def _launch_gelu_gradient(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dx, y = _fake_gelu_gradient(dy, x)
    tensors, count = (dx, y, dy, x), x.numel()
    programs = -(-count // gelu_gradient.config["BLOCK"])
    aligned = count % 8 == 0
    gelu_gradient.launch(programs, key_of(tensors, aligned), *tensors, count, aligned)
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
_fold_norm_gradient = register(
    "fold_norm_gradient(Tensor dy, Tensor tokens, Tensor norm_weight, Tensor stats, int n,"
    " bool transposed, bool to_tokens, bool to_norm) -> (Tensor, Tensor)",
    _launch_fold_norm_gradient,
    _fake_fold_norm_gradient,
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
                dx, norm = _fold_norm_gradient(
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
    _check_kernel(tokens, inputs[1:], fold.n, media)
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
    tokens: Tensor, weights: tuple[Tensor, ...], n: int, media: Tensor | None
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
    width = _padded(n * n) * _padded(tokens.shape[2])
    if width > WIDEST:
        reasons.append(f"n*n times C, rounded up, must be at most {WIDEST}, got {width}")
    if reasons:
        raise ValueError(
            f"project_tiles: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.project_tiles"
        )
