"""The GEMM of the memory build, with rotated keys and values in its epilogue.

    k, v = split(x W^T) * rstd;  k = rotate(k, id)          W [2 * G * D, d], keys first

One launch computes all layers, so that many tiles leave no multiprocessor idle at the end. A tile
holds the first and the second halves of its heads: each thread rotates what it has accumulated.
`_memory_build_tma` is the same with tensor descriptors.
FLOPs: 4 * M * d * G * D for each layer. Traffic: x and weights once, keys and values written once.
Source: CoMemo (arXiv:2506.06279).

Letters: M image tokens, d their width, L layers, G heads, D head dimension, P rows of the rotary
table.
"""

import triton.language as tl

from comemo_kernels._blocks import in_groups, offset_of
from comemo_kernels._blocks_memory_build import load_rotation, pointer_to, without_nan
from comemo_kernels._op import Kernel, jit

# --- kernel ---


@jit
def _project_kernel(
    x_ptr,  # [L, M, d]: normalised; or [M, d]: media
    rstd_ptr,  # [M]
    ids_ptr,  # [M] int32
    cos_ptr,  # [P, HALF]
    sin_ptr,
    address_ptr,  # [L, 4]: of W, norm weight, keys, values
    x_stride_l: tl.int64,
    x_stride_m: tl.int64,
    out_stride_m: tl.int64,
    out_stride_g: tl.int64,
    table_stride: tl.int64,
    num_rows,  # M
    width,  # d
    num_heads,  # G
    num_layers,
    num_positions,  # P
    out_row,  # where the first row goes
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides the width
    BLOCK_HALF: tl.constexpr,  # HALF rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of each half: BLOCK_C / BLOCK_HALF heads
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that follow each other on one block of columns
):
    """One program computes BLOCK_M keys, or values, of some heads of one layer."""
    HEADS: tl.constexpr = BLOCK_C // BLOCK_HALF
    blocks_m, blocks_h = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_heads, HEADS)
    pid_m, pid_c = in_groups(tl.program_id(0), blocks_m, num_layers * 2 * blocks_h, GROUP)
    layer, kind = pid_c // (2 * blocks_h), pid_c // blocks_h % 2
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    # Columns of a tile: the first halves of its heads, then their second halves.
    offs_n = tl.arange(0, 2 * BLOCK_C)
    head = pid_c % blocks_h * HEADS + offs_n % BLOCK_C // BLOCK_HALF
    element = offs_n % BLOCK_HALF
    mask_n = (head < num_heads) & (element < HALF)
    w_row = (kind * num_heads + head) * (2 * HALF) + offs_n // BLOCK_C * HALF + element

    table = address_ptr + layer * 4
    w_ptr = pointer_to(tl.load(table), x_ptr, ALIGNED)
    out_ptr = pointer_to(tl.load(table + 2 + kind), x_ptr, ALIGNED)
    x_rows = x_ptr + offset_of(layer, x_stride_l, ALIGNED) + offset_of(row, x_stride_m, ALIGNED)
    x_ptrs = x_rows[:, None] + offs_k[None, :]
    w_ptrs = w_ptr + offset_of(w_row, width, ALIGNED)[:, None] + offs_k[None, :]
    PRECISION: tl.constexpr = "ieee" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_C], tl.float32)
    for i in tl.range(0, tl.cdiv(width, BLOCK_K)):
        mask_x, mask_w = mask_m[:, None], mask_n[:, None]
        if not EVEN:
            mask_k = (i * BLOCK_K + offs_k < width)[None, :]
            mask_x, mask_w = mask_x & mask_k, mask_w & mask_k
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    if not EXACT:
        acc *= tl.load(rstd_ptr + row, mask=mask_m, other=0.0)[:, None]
    acc = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_C)), (0, 2, 1))
    acc1, acc2 = tl.split(acc)
    offs_c = tl.arange(0, BLOCK_C)
    head = pid_c % blocks_h * HEADS + offs_c // BLOCK_HALF
    element = offs_c % BLOCK_HALF
    mask_c = (head < num_heads) & (element < HALF)
    if kind == 0:
        rotary_table = (cos_ptr, sin_ptr, table_stride, num_positions)
        cos, sin = load_rotation(
            rotary_table, ids_ptr, row, mask_m, element, element < HALF, ALIGNED
        )
        turned = acc1 * cos - acc2 * sin
        acc2 = acc2 * cos + acc1 * sin
        acc1 = turned
    else:
        acc1, acc2 = without_nan(acc1), without_nan(acc2)
    out_rows = out_ptr + offset_of(row + out_row, out_stride_m, ALIGNED)[:, None]
    out_ptrs = out_rows + (offset_of(head, out_stride_g, ALIGNED) + element)[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(out_ptrs, acc1, mask=mask)
    tl.store(out_ptrs + HALF, acc2, mask=mask)


project_media = Kernel(
    _project_kernel,
    [
        {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": 64, "GROUP": 16, "num_warps": 8, "num_stages": n}
        for m, c, n in ((128, 64, 3), (128, 128, 3))
    ],
)
project_exact = Kernel(  # float32
    _project_kernel,
    [{"BLOCK_M": 64, "BLOCK_C": 64, "BLOCK_K": 16, "GROUP": 16, "num_warps": 8, "num_stages": 3}],
)
