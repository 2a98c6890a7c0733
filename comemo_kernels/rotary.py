"""Rotary position embedding of queries and keys (RoPE-DHR): the operation and its gradient.

A rotation is orthogonal: the gradient is the same kernel with -sin, so that only the table and the
positions are saved for it, and it is differentiable to any order. `_rotary_kernel` has the
equations, traffic and sources.

Letters: B batch, N tokens, H query heads, G key heads, D head dimension, R rotated part of it,
P rows of the table, I images.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._op import documented, on_triton, padded, register
from comemo_kernels._rotary_kernel import rotary_kernel
from comemo_kernels.grids import ImageGrids
from comemo_kernels.reference.rotary import check_rotary, check_rotary_kernel

# --- operator ---


class _Plan(NamedTuple):
    """What shapes, strides and flags decide about a launch."""

    programs: int
    numbers: tuple[int, ...]  # strides and sizes, in the kernel's order
    constants: tuple[Any, ...]  # compile-time values, in the kernel's order


@functools.lru_cache(maxsize=1024)  # all layers of a model share the same few
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
        (kind, *flags, half, rest, aligned, padded(half), padded(rest)),
    )


def _batch_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of B and N of a tensor that may lack B or have one row for all prompts."""
    return (0, strides[-1]) if len(shape) == 1 or shape[0] == 1 else strides


def _launch_into(
    ys: list[Tensor],
    xs: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    side: int,
    *flags: bool,  # column, thumbnail, inverse, published
) -> None:
    """Rotate `xs`, one or two tensors, into `ys`, which may be the same tensors."""
    q, k, q_out, k_out = xs[0], xs[-1], ys[0], ys[-1]
    kind, ids = "grids" if side else "ids", positions
    if ids is None:
        kind, ids = "table", cos
    config = rotary_kernel.config
    plan = _plan(
        (config["BLOCK_T"], config["BLOCK_H"], config["STEPS"]),
        q.shape,
        k.shape[-2] if len(xs) == 2 else 0,
        (q_out.stride(), k_out.stride(), q.stride(), k.stride()),
        cos.shape,
        cos.stride(),
        ids.shape,
        ids.stride(),
        kind,
        q_out is q,
        (side, *flags),
    )
    tensors = (q_out, k_out, q, k, cos, sin, ids)
    rotary_kernel.launch(plan.programs, *tensors, *plan.numbers, *plan.constants)


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
    """The gradient is the inverse rotation, so it is differentiable to any order."""

    @staticmethod
    def forward(ctx, q, k, inplace, cos, sin, positions, *flags):
        # Tensors written in place come first: autograd expects the base of a view there.
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
            # torch.compile has no second-order gradients and cannot trace this within itself.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                found = _Rotary.apply(given[0], given[1] if len(given) > 1 else None, False, *table)
            else:
                found = _rotary(given, *table)
            for i, dx in zip(used, found, strict=True):
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
    check_rotary_kernel(q, k, cos, sin, positions)
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
            # One launch each: a function that writes into a view may return only that view.
            ys = [_Rotary.apply(x, None, True, *table)[0] for x in xs]
        else:
            ys = _Rotary.apply(q, k, False, *table)
    elif inplace:
        _rotary_(xs, cos, sin, positions, *options)
        ys = xs
    else:
        ys = _rotary(xs, cos, sin, positions, *options)
    return ys[0], None if k is None else ys[1]
