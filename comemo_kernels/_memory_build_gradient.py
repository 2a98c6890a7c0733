"""Kernel of the memory build's gradient: gradients of keys and values for the GEMMs after it.

    dy = [dk1 * cos + dk2 * sin, dk2 * cos - dk1 * sin, dv]         by the id of each image token

A rotation is orthogonal, so its gradient is the rotation by the negative id. The result is the
gradient of the product with a layer's weight, keys first: one operand of its GEMMs.
Traffic: 2 * M * G * D elements read and as many written, for each layer.
Source: CoMemo (arXiv:2506.06279).

Letters: M image tokens, G heads, D head dimension, P rows of the rotary table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import offset_of
from comemo_kernels._blocks_memory_build import load_rotation
from comemo_kernels._op import Kernel, jit, padded, register

# --- kernel ---


@triton.jit
def _load_halves(
    x_ptr,
    row,  # [rows]: token
    head,  # [rows]
    strides,  # of M and G
    mask,  # [rows, elements]
    element,  # [elements]
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Both halves [rows, elements] float32 of one head of one token in each row."""
    rows = x_ptr + offset_of(row, strides[0], ALIGNED) + offset_of(head, strides[1], ALIGNED)
    ptrs = rows[:, None] + element[None, :]
    x1 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    return x1, x2


@jit
def _turn_back_kernel(
    out_ptr,  # [M, 2, G, D], contiguous
    dk_ptr,  # [M, G, D], D contiguous
    dv_ptr,
    ids_ptr,  # [M] int32
    cos_ptr,  # [P, HALF]
    sin_ptr,
    dk_stride_m: tl.int64,
    dk_stride_g: tl.int64,
    dv_stride_m: tl.int64,
    dv_stride_g: tl.int64,
    table_stride: tl.int64,
    num_rows,  # M
    num_heads,  # G
    num_positions,  # P
    KEYS: tl.constexpr,  # whether there are gradients of keys; otherwise zeros are written
    VALUES: tl.constexpr,
    HALF: tl.constexpr,  # D / 2
    ALIGNED: tl.constexpr,  # strides and D are multiples of 8
    BLOCK_HALF: tl.constexpr,  # HALF rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One program writes BLOCK_G heads of keys and values of BLOCK_M image tokens."""
    blocks_g = tl.cdiv(num_heads, BLOCK_G)
    pid = tl.program_id(0)
    # Token and head share an axis: a thread then holds 8 bf16, 128 bits, of each half.
    offs_r = tl.arange(0, BLOCK_M * BLOCK_G)
    row = pid // blocks_g * BLOCK_M + offs_r // BLOCK_G
    head = pid % blocks_g * BLOCK_G + offs_r % BLOCK_G
    element = tl.arange(0, BLOCK_HALF)
    mask_r = (row < num_rows) & (head < num_heads)
    mask = mask_r[:, None] & (element < HALF)[None, :]
    out_rows = out_ptr + offset_of(row, num_heads * 4 * HALF, ALIGNED)
    out_rows += offset_of(head, 2 * HALF, ALIGNED)
    out_ptrs = out_rows[:, None] + element[None, :]
    zeros = tl.zeros([BLOCK_M * BLOCK_G, BLOCK_HALF], tl.float32)
    dk1, dk2, dv1, dv2 = zeros, zeros, zeros, zeros
    if KEYS:
        strides = (dk_stride_m, dk_stride_g)
        dy1, dy2 = _load_halves(dk_ptr, row, head, strides, mask, element, HALF, ALIGNED)
        table = (cos_ptr, sin_ptr, table_stride, num_positions)
        cos, sin = load_rotation(table, ids_ptr, row, mask_r, element, element < HALF, ALIGNED)
        dk1 = dy1 * cos + dy2 * sin
        dk2 = dy2 * cos - dy1 * sin
    if VALUES:
        strides = (dv_stride_m, dv_stride_g)
        dv1, dv2 = _load_halves(dv_ptr, row, head, strides, mask, element, HALF, ALIGNED)
    tl.store(out_ptrs, dk1, mask=mask)
    tl.store(out_ptrs + HALF, dk2, mask=mask)
    out_ptrs += offset_of(num_heads, 2 * HALF, ALIGNED)
    tl.store(out_ptrs, dv1, mask=mask)
    tl.store(out_ptrs + HALF, dv2, mask=mask)


turn_back = Kernel(_turn_back_kernel, [{"BLOCK_M": 4, "BLOCK_G": 8, "num_warps": 4}])

# --- operator ---


def launch_turn_back(
    cos: Tensor, sin: Tensor, ids: Tensor, dk: Tensor | None, dv: Tensor | None
) -> Tensor:
    """Gradients [M, G, D] of keys and values as one [M, 2 * G * D]; None gives zeros."""
    out = _fake(cos, sin, ids, dk, dv)
    keys, values = dv if dk is None else dk, dk if dv is None else dv
    assert keys is not None
    assert values is not None
    (M, G, D), config = keys.shape, turn_back.config
    strides = (*keys.stride()[:2], *values.stride()[:2], cos.stride(0))
    aligned = D % 8 == 0 and all(stride % 8 == 0 for stride in strides)
    programs = -(-M // config["BLOCK_M"]) * -(-G // config["BLOCK_G"])
    constants = (dk is not None, dv is not None, D // 2, aligned, padded(D // 2))
    tensors = (out, keys, values, ids, cos, sin)
    turn_back.launch(programs, *tensors, *strides, M, G, cos.shape[0], *constants)
    return out


def _fake(cos: Tensor, sin: Tensor, ids: Tensor, dk: Tensor | None, dv: Tensor | None) -> Tensor:
    like = dv if dk is None else dk
    assert like is not None
    M, G, D = like.shape
    return torch.empty((M, 2 * G * D), dtype=like.dtype, device=like.device)


turn_back_op = register(
    "turn_back(Tensor cos, Tensor sin, Tensor ids, Tensor? dk, Tensor? dv) -> Tensor",
    launch_turn_back,
    _fake,
)
