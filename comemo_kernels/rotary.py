"""Rotary position embedding of queries and keys in one launch (RoPE-DHR).

    y1 = x1 * cos[p] - x2 * sin[p]
    y2 = x2 * cos[p] + x1 * sin[p]        x = [x1, x2, rest] along D,  p = position of the token

A rotation is orthogonal: the gradient is the same kernel with -sin (INVERSE), and nothing but the
table has to be kept for it.
Traffic: q and k read once and written once, B * N * (H + G) * D * 2 elements (in place with
R < D only the rotated part), and per token its id of 4 or 8 bytes. Table rows are read once per
token and group of BLOCK_H heads; the rows of images, 256 whatever their tiles, stay in L2.
Source: CoMemo (arXiv:2506.06279); halves, not pairs, are rotated, as in Llama.

Letters: B batch, N tokens, H query heads, G key heads, D head dimension, R rotated part of it,
P rows of the table, I images.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._blocks import image_position, offset_of
from comemo_kernels._checks import check_rotary
from comemo_kernels._op import Kernel, documented, on_triton, register
from comemo_kernels.grids import ImageGrids

# --- kernel ---


@triton.jit
def _rotate_heads(
    y_ptr,  # [B, N, H, D]
    y_strides,  # of B, N, H; D is contiguous
    x_ptr,  # [B, N, H, D]
    x_strides,
    batch,
    token,  # [BLOCK_T * BLOCK_H]
    head,  # [BLOCK_T * BLOCK_H]
    mask_r,  # [BLOCK_T * BLOCK_H]
    cos,  # [BLOCK_T * BLOCK_H, BLOCK_D]
    sin,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    x_rows = (
        x_ptr + offset_of(batch, x_strides[0], ALIGNED) + offset_of(token, x_strides[1], ALIGNED)
    )
    y_rows = (
        y_ptr + offset_of(batch, y_strides[0], ALIGNED) + offset_of(token, y_strides[1], ALIGNED)
    )
    x_rows += offset_of(head, x_strides[2], ALIGNED)
    y_rows += offset_of(head, y_strides[2], ALIGNED)
    offs_d = tl.arange(0, BLOCK_D)
    mask = mask_r[:, None] & (offs_d < HALF)[None, :]
    x_ptrs, y_ptrs = x_rows[:, None] + offs_d[None, :], y_rows[:, None] + offs_d[None, :]
    x1 = tl.load(x_ptrs, mask=mask, other=0.0).to(cos.dtype)
    x2 = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(cos.dtype)
    tl.store(y_ptrs, x1 * cos - x2 * sin, mask=mask)
    tl.store(y_ptrs + HALF, x2 * cos + x1 * sin, mask=mask)
    if REST > 0:
        offs_rest = tl.arange(0, BLOCK_REST)
        mask = mask_r[:, None] & (offs_rest < REST)[None, :]
        offs = 2 * HALF + offs_rest[None, :]
        tl.store(y_rows[:, None] + offs, tl.load(x_rows[:, None] + offs, mask=mask), mask=mask)


@triton.jit
def _find_positions(
    ids_ptr,
    ids_strides,  # of B, N
    batch,
    token,
    num_tokens,
    num_images,
    num_steps,
    POSITIONS: tl.constexpr,
    SIDE: tl.constexpr,
    COLUMN: tl.constexpr,
    THUMBNAIL: tl.constexpr,
):
    """Position ids of tokens; of those behind the last, some number."""
    if POSITIONS == "table":
        position = token
    elif POSITIONS == "ids":
        ids_ptrs = ids_ptr + batch * ids_strides[0] + token * ids_strides[1]
        position = tl.load(ids_ptrs, mask=token < num_tokens, other=0)
    else:
        position = image_position(
            *(ids_ptr, batch * num_tokens + token, num_images, num_steps),
            *(SIDE, COLUMN, THUMBNAIL),
        )
    return position


@triton.jit
def _load_table(
    cos_ptr,
    sin_ptr,
    table_strides,  # of B, N
    batch,
    token,
    position,
    mask_t,
    num_rows,
    POSITIONS: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """cos and sin [BLOCK_T * BLOCK_H, BLOCK_D] of tokens."""
    known = mask_t
    if POSITIONS == "table":
        row = offset_of(batch, table_strides[0], ALIGNED)
        row = row + offset_of(token, table_strides[1], ALIGNED)
    else:
        known &= (position >= 0) & (position < num_rows)
        row = offset_of(position, table_strides[1], ALIGNED)
    offs_d = tl.arange(0, BLOCK_D)
    mask = known[:, None] & (offs_d < HALF)[None, :]
    offs = row[:, None] + offs_d[None, :]
    cos = tl.load(cos_ptr + offs, mask=mask, other=float("nan"))
    sin = tl.load(sin_ptr + offs, mask=mask, other=float("nan"))
    return cos, sin


# No number specialises: neither a new length nor a new layout compiles anything. (Strides in a
# tuple would specialise all the same.)
@triton.jit(
    do_not_specialize=[
        *("q_out_stride_b", "q_out_stride_n", "q_out_stride_h"),
        *("k_out_stride_b", "k_out_stride_n", "k_out_stride_h"),
        *("q_stride_b", "q_stride_n", "q_stride_h", "k_stride_b", "k_stride_n", "k_stride_h"),
        *("table_stride_b", "table_stride_n", "ids_stride_b", "ids_stride_n"),
        *("num_tokens", "num_rows", "num_images", "num_steps", "num_q_heads", "num_k_heads"),
    ]
)
def _rotary_kernel(
    q_out_ptr,  # [B, N, H, D], D contiguous
    k_out_ptr,  # [B, N, G, D]
    q_ptr,
    k_ptr,
    cos_ptr,  # [P, R/2] by id, [B, N, R/2] by token
    sin_ptr,
    ids_ptr,  # [B, N] ids, or [I, 4] grids
    q_out_stride_b: tl.int64,
    q_out_stride_n: tl.int64,
    q_out_stride_h: tl.int64,
    k_out_stride_b: tl.int64,
    k_out_stride_n: tl.int64,
    k_out_stride_h: tl.int64,
    q_stride_b: tl.int64,
    q_stride_n: tl.int64,
    q_stride_h: tl.int64,
    k_stride_b: tl.int64,
    k_stride_n: tl.int64,
    k_stride_h: tl.int64,
    table_stride_b: tl.int64,  # of B and N; by id 0 and that of P
    table_stride_n: tl.int64,
    ids_stride_b: tl.int64,
    ids_stride_n: tl.int64,
    num_tokens,  # N
    num_rows,  # P
    num_images,
    num_steps,  # bit length of num_images
    num_q_heads,
    num_k_heads,
    POSITIONS: tl.constexpr,  # "table": a row for each token; "ids"; "grids"
    SIDE: tl.constexpr,
    COLUMN: tl.constexpr,
    THUMBNAIL: tl.constexpr,
    INVERSE: tl.constexpr,
    ROUND: tl.constexpr,  # cos and sin to the dtype of q first
    HALF: tl.constexpr,  # R / 2
    REST: tl.constexpr,  # elements to copy behind the rotated ones
    ALIGNED: tl.constexpr,  # all strides but those of ids are multiples of 8
    BLOCK_D: tl.constexpr,  # HALF rounded up to a power of two
    BLOCK_REST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,  # blocks of tokens; ids of one are loaded before the one ahead is rotated
):
    """One program rotates BLOCK_H heads, of q or of k, of STEPS * BLOCK_T tokens of a batch row."""
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    pid = tl.program_id(0)
    # Groups of one token block lie side by side: its rows of the table are read from L2 once.
    q_groups = tl.cdiv(num_q_heads, BLOCK_H)
    groups = q_groups + tl.cdiv(num_k_heads, BLOCK_H)
    pid_h, pid_t = pid % groups, pid // groups
    blocks = tl.cdiv(num_tokens, BLOCK_T * STEPS)
    batch = pid_t // blocks
    # Token and head share an axis: a thread then holds 8 bf16, 128 bits, of each half.
    offs_r = tl.arange(0, BLOCK_T * BLOCK_H)
    first = (pid_t % blocks) * (BLOCK_T * STEPS)
    token = first + offs_r // BLOCK_H
    position = _find_positions(
        *(ids_ptr, (ids_stride_b, ids_stride_n), batch, token, num_tokens, num_images, num_steps),
        *(POSITIONS, SIDE, COLUMN, THUMBNAIL),
    )
    steps = 1 if STEPS == 1 else tl.minimum(STEPS, tl.cdiv(num_tokens - first, BLOCK_T))
    for _ in range(steps):
        following = position
        if STEPS > 1:
            following = _find_positions(
                *(ids_ptr, (ids_stride_b, ids_stride_n), batch, token + BLOCK_T, num_tokens),
                *(num_images, num_steps, POSITIONS, SIDE, COLUMN, THUMBNAIL),
            )
        mask_t = token < num_tokens
        cos, sin = _load_table(
            *(cos_ptr, sin_ptr, (table_stride_b, table_stride_n), batch, token, position, mask_t),
            *(num_rows, POSITIONS, HALF, ALIGNED, BLOCK_D),
        )
        if ROUND:
            cos = cos.to(q_ptr.dtype.element_ty)
            sin = sin.to(q_ptr.dtype.element_ty)
        cos = cos.to(ACC)
        sin = sin.to(ACC)
        if INVERSE:
            sin = -sin
        if pid_h < q_groups:
            head = pid_h * BLOCK_H + offs_r % BLOCK_H
            _rotate_heads(
                *(q_out_ptr, (q_out_stride_b, q_out_stride_n, q_out_stride_h)),
                *(q_ptr, (q_stride_b, q_stride_n, q_stride_h)),
                *(batch, token, head, mask_t & (head < num_q_heads), cos, sin),
                *(HALF, REST, ALIGNED, BLOCK_D, BLOCK_REST),
            )
        else:
            head = (pid_h - q_groups) * BLOCK_H + offs_r % BLOCK_H
            _rotate_heads(
                *(k_out_ptr, (k_out_stride_b, k_out_stride_n, k_out_stride_h)),
                *(k_ptr, (k_stride_b, k_stride_n, k_stride_h)),
                *(batch, token, head, mask_t & (head < num_k_heads), cos, sin),
                *(HALF, REST, ALIGNED, BLOCK_D, BLOCK_REST),
            )
        token += BLOCK_T
        position = following


rotary_kernel = Kernel(
    _rotary_kernel,
    [
        {"BLOCK_T": t, "BLOCK_H": h, "STEPS": steps, "num_warps": warps}
        for t, h, steps, warps in (
            # Rows of the table are read for each group of heads: few, large groups read them least.
            *((4, 8, 1, 4), (8, 4, 1, 4), (8, 8, 1, 8), (8, 8, 1, 4), (4, 4, 1, 4)),
            *((4, 8, 4, 8), (4, 8, 8, 8)),
        )
    ],
)

# --- operator ---


class _Plan(NamedTuple):
    """What layouts and flags decide of a launch."""

    programs: int
    runtime: tuple[int, ...]  # strides and sizes, in the kernel's order
    constants: tuple[Any, ...]  # compile-time values, likewise


@functools.lru_cache(maxsize=1024)  # the layers of a model ask for the same few, step by step
def _plan(
    blocks: tuple[int, int, int],  # BLOCK_T, BLOCK_H, STEPS
    q_shape: tuple[int, ...],
    num_k_heads: int,
    x_strides: tuple[tuple[int, ...], ...],  # of q_out, k_out, q, k
    table_shape: tuple[int, ...],
    table_strides: tuple[int, ...],
    ids_shape: tuple[int, ...],
    ids_strides: tuple[int, ...],
    kind: str,
    inplace: bool,
    flags: tuple[Any, ...],
) -> _Plan:
    (*batch, N, H, D), half = q_shape, table_shape[-1]
    rest = 0 if inplace else D - 2 * half
    groups = -(-H // blocks[1]) - (-num_k_heads // blocks[1])
    strides = [stride for s in x_strides for stride in (s[:3] if batch else (0, *s[:2]))]
    if kind == "table":
        strides += _batch_strides(table_shape[:-1], table_strides[:-1])
    else:
        strides += (0, table_strides[0])
    aligned = all(stride % 8 == 0 for stride in strides)
    strides += _batch_strides(ids_shape, ids_strides) if kind == "ids" else (0, 0)
    images = ids_shape[0] if kind == "grids" else 0
    return _Plan(
        groups * (batch[0] if batch else 1) * -(-N // (blocks[0] * blocks[2])),
        (*strides, N, table_shape[0], images, images.bit_length(), H, num_k_heads),
        (kind, *flags, half, rest, aligned, _power_of_two(half), _power_of_two(rest)),
    )


def _batch_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of B and N, of a tensor that may lack B or have one row for all."""
    return (0, strides[-1]) if len(shape) == 1 or shape[0] == 1 else strides


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _launch_into(
    ys: list[Tensor],
    xs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    side: int,
    *flags: bool,  # column, thumbnail, inverse, published
) -> None:
    """Rotate `xs`, one or two tensors, into `ys`, which may be the same."""
    q, k, q_out, k_out = xs[0], xs[-1], ys[0], ys[-1]
    kind, ids = "grids" if side else "ids", positions
    if ids is None:
        kind, ids = "table", cos
    config = rotary_kernel.config
    plan = _plan(
        (config["BLOCK_T"], config["BLOCK_H"], config["STEPS"]),
        *(q.shape, k.shape[-2] if len(xs) == 2 else 0),
        (q_out.stride(), k_out.stride(), q.stride(), k.stride()),
        *(cos.shape, cos.stride(), ids.shape, ids.stride(), kind, q_out is q, (side, *flags)),
    )
    rotary_kernel.launch(
        *(plan.programs, q_out, k_out, q, k, cos, sin, ids, *plan.runtime, *plan.constants)
    )


def _launch(xs: list[Tensor], *args: Any) -> list[Tensor]:
    ys = _fake(xs)
    _launch_into(ys, xs, *args)
    return ys


def _fake(xs: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in xs]


_ARGUMENTS = (
    "Tensor cos, Tensor sin, Tensor? positions, int side, bool column, bool thumbnail,"
    " bool inverse, bool published"
)
_rotary = register(f"rotary(Tensor[] xs, {_ARGUMENTS}) -> Tensor[]", _launch, _fake)
_rotary_ = register(
    f"rotary_(Tensor(a!)[] xs, {_ARGUMENTS}) -> ()",
    lambda xs, *args: _launch_into(xs, xs, *args),
    lambda *_: None,
)


class _Rotary(torch.autograd.Function):
    """Its gradient is itself, turned the other way: differentiable to any order."""

    @staticmethod
    def forward(ctx, q, k, inplace, cos, sin, positions, *flags):
        # What is written in place comes first: of a view, autograd takes that for its base.
        ctx.save_for_backward(cos, sin, positions)
        ctx.flags = flags
        ctx.set_materialize_grads(False)
        xs = [q] if k is None else [q, k]
        if inplace:
            ctx.mark_dirty(*xs)
            _rotary_(xs, cos, sin, positions, *flags)
            return tuple(xs)
        return tuple(_rotary(xs, cos, sin, positions, *flags))

    @staticmethod
    def backward(ctx, *dys):
        side, column, thumbnail, inverse, published = ctx.flags
        used = [i for i, dy in enumerate(dys) if dy is not None and ctx.needs_input_grad[i]]
        dxs: list[Tensor | None] = [None, None]
        if used:
            given = [dys[i] if dys[i].stride(-1) == 1 else dys[i].contiguous() for i in used]
            table = (*ctx.saved_tensors, side, column, thumbnail, not inverse, published)
            # torch.compile, which has no gradients of gradients, cannot trace this within itself.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                turned = _Rotary.apply(
                    given[0], given[1] if len(given) > 1 else None, False, *table
                )
            else:
                turned = _rotary(given, *table)
            for i, dx in zip(used, turned, strict=True):
                dxs[i] = dx
        return *dxs, None, None, None, None, *[None] * len(ctx.flags)


# --- public ---


@documented(reference.apply_rotary)
def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | ImageGrids | None = None,
    inplace: bool = False,
    published: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    if not on_triton(q):
        return reference.apply_rotary(q, k, cos, sin, positions, inplace, published, validate)
    check_rotary(q, k, cos, sin, positions, inplace, validate)
    _check_strides(q, k, cos, sin, positions)
    side, column, thumbnail = 0, False, False
    if isinstance(positions, ImageGrids):
        side, column = positions.side, positions.tile_order == "column"
        positions, thumbnail = positions.table, positions.thumbnail
    xs = [q] if k is None else [q, k]
    options = (side, column, thumbnail, False, published)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*xs, cos, sin)):
        if cos.requires_grad or sin.requires_grad:
            raise ValueError(
                "apply_rotary: on a GPU cos and sin must not require grad, the kernel has no"
                " gradient for them: use comemo_kernels.reference.apply_rotary"
            )
        table = (cos, sin, positions, *options)
        if inplace:
            # A launch each: autograd lets a function that writes into a view return only that.
            ys = [_Rotary.apply(x, None, True, *table)[0] for x in xs]
        else:
            ys = _Rotary.apply(q, k, False, *table)
    elif inplace:
        _rotary_(xs, cos, sin, positions, *options)
        ys = xs
    else:
        ys = _rotary(xs, cos, sin, positions, *options)
    return ys[0], None if k is None else ys[1]


def _check_strides(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | ImageGrids | None
) -> None:
    k = q if k is None else k
    if q.stride(-1) != 1 or k.stride(-1) != 1 or cos.stride(-1) != 1:
        raise ValueError(
            "apply_rotary: the last dimension must be contiguous, got strides"
            f" {q.stride()} of q, {k.stride()} of k, {cos.stride()} of cos"
        )
    if cos.stride() != sin.stride():
        raise ValueError(
            f"apply_rotary: cos and sin must have one layout, got strides {cos.stride()} and"
            f" {sin.stride()}"
        )
    if isinstance(positions, ImageGrids) and not positions.table.is_contiguous():
        raise ValueError(
            "apply_rotary: the table of ImageGrids must be contiguous, got strides"
            f" {positions.table.stride()}"
        )
