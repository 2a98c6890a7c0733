"""GEMM with an epilogue: bias, GELU, one destination or two; split-K for its last wave.

    out = act(x weight^T + bias);  embeds[rows] = out

The blocks of a GEMM seldom fill the multiprocessors a whole number of times. Those of the last,
partial wave are split along K, and a second, small launch adds their parts, always in one order.
13 tiles are 416 blocks in the 2B model's GEMMs: on 132 multiprocessors 3.2 waves instead of 4.

Traffic: x, weight and every destination once; the parts, which L2 holds, 4 bytes an element of a
split block and part, twice. FLOPs: 2 * R * O * K.

Letters: R rows, K elements of the reduction, O outputs of a row, E rows of embeds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import in_groups, offset_of
from comemo_kernels._op import Kernel, jit, multiprocessors

# --- kernel ---


@triton.jit
def _store(
    acc,  # [rows, columns] float32
    row,
    column,
    pointers,  # out, before, embeds, rows and bias, see _product_kernel
    sizes,  # stride of out, R, O, E
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The epilogue: bias, GELU, every destination."""
    out_ptr, before_ptr, embeds_ptr, rows_ptr, bias_ptr = pointers
    out_stride, num_rows, num_outputs, num_embeds = sizes
    if ALIGNED:  # unchanged; the compiler learns that masks are of 8 elements
        num_outputs = num_outputs // 8 * 8
    mask_m, mask_n = row < num_rows, column < num_outputs
    mask = mask_m[:, None] & mask_n[None, :]
    acc += tl.load(bias_ptr + column, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        before = before_ptr + offset_of(row, num_outputs, ALIGNED)[:, None] + column[None, :]
        tl.store(before, acc.to(before_ptr.dtype.element_ty), mask=mask)
    if GELU:
        acc = 0.5 * acc * (1.0 + tl.erf(acc * 0.7071067811865476))
    y = acc.to(out_ptr.dtype.element_ty)
    out = out_ptr + offset_of(row, out_stride, ALIGNED)[:, None] + column[None, :]
    tl.store(out, y, mask=mask)
    if PLACE:
        at = tl.load(rows_ptr + row, mask=mask_m, other=-1)
        mask &= ((at >= 0) & (at < num_embeds))[:, None]
        embeds = embeds_ptr + offset_of(at, num_outputs, ALIGNED)[:, None] + column[None, :]
        tl.store(embeds, y.to(embeds_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finish(
    acc,  # [rows, COLUMNS] float32
    row,
    first,  # column
    pointers,
    sizes,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Half a block after the other: the GELU of a whole block would spill."""
    HALF: tl.constexpr = acc.shape[1] // 2
    halves = tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1))
    acc1, acc2 = tl.split(halves)
    column = first + tl.arange(0, HALF)
    _store(acc1, row, column, pointers, sizes, GELU, KEEP, PLACE, ALIGNED)
    _store(acc2, row, column + HALF, pointers, sizes, GELU, KEEP, PLACE, ALIGNED)


@jit
def _product_kernel(
    out_ptr,  # [R, O], O contiguous
    before_ptr,  # [R, O], contiguous: the input of the GELU
    embeds_ptr,  # [E, O], contiguous
    rows_ptr,  # [R] int64, of embeds
    parts_ptr,  # [parts of split blocks, BLOCK_M, BLOCK_N] float32
    bias_ptr,  # [O]
    x_ptr,  # [R, K], contiguous
    weight_ptr,  # [O, K], contiguous
    out_stride: tl.int64,
    num_rows,  # R
    num_outputs,  # O
    num_inner,  # K
    num_embeds,  # E
    whole,  # blocks that are not split, the first ones
    splits,  # parts of each other block
    GELU: tl.constexpr,
    KEEP: tl.constexpr,  # write before
    PLACE: tl.constexpr,  # write embeds
    ALIGNED: tl.constexpr,  # O, K and stride are multiples of 8
    EVEN: tl.constexpr,  # BLOCK_K divides K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that follow each other on one block of columns
):
    """One program computes a block of outputs, or a part of its sums."""
    pid = tl.program_id(0)
    part = tl.maximum(pid - whole, 0)
    steps = tl.cdiv(num_inner, BLOCK_K)
    share = tl.where(pid < whole, steps, tl.cdiv(steps, splits))
    first = tl.where(pid < whole, 0, part % splits * share)
    last = tl.minimum(first + share, steps)
    block = tl.where(pid < whole, pid, whole + part // splits)
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    pid_m, pid_n = in_groups(block, blocks_m, blocks_n, GROUP)
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    if ALIGNED:  # unchanged; the compiler learns that masks are of 8 elements
        num_inner = num_inner // 8 * 8
    # Rows after the last one read the last one: no mask on the loads that count.
    x_row, w_row = tl.minimum(row, num_rows - 1), tl.minimum(column, num_outputs - 1)
    start = (first * BLOCK_K + offs_k)[None, :]
    x_ptrs = x_ptr + offset_of(x_row, num_inner, ALIGNED)[:, None] + start
    w_ptrs = weight_ptr + offset_of(w_row, num_inner, ALIGNED)[:, None] + start
    PRECISION: tl.constexpr = "ieee" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in tl.range(first, last):
        if EVEN:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask = (offs_k < num_inner - i * BLOCK_K)[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0)
            w = tl.load(w_ptrs, mask=mask, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    pointers = (out_ptr, before_ptr, embeds_ptr, rows_ptr, bias_ptr)
    sizes = (out_stride, num_rows, num_outputs, num_embeds)
    if pid < whole:
        _finish(acc, row, pid_n * BLOCK_N, pointers, sizes, GELU, KEEP, PLACE, ALIGNED)
    else:
        offs_m, offs_n = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        tl.store(parts_ptr + (part.to(tl.int64) * BLOCK_M + offs_m) * BLOCK_N + offs_n, acc)


@jit
def _sum_kernel(
    out_ptr,  # arguments as in _product_kernel
    before_ptr,
    embeds_ptr,
    rows_ptr,
    parts_ptr,
    bias_ptr,
    out_stride: tl.int64,
    num_rows,
    num_outputs,
    num_embeds,
    whole,
    splits,
    GELU: tl.constexpr,
    KEEP: tl.constexpr,
    PLACE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a program
):
    """One program adds the parts of BLOCK_R rows of a split block, and runs their epilogue."""
    pid = tl.program_id(0)
    split = pid // (BLOCK_M // BLOCK_R)
    inside = pid % (BLOCK_M // BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
    blocks_m, blocks_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_outputs, BLOCK_N)
    pid_m, pid_n = in_groups(whole + split, blocks_m, blocks_n, GROUP)
    offs = inside[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    parts = parts_ptr + split.to(tl.int64) * splits * BLOCK_M * BLOCK_N + offs
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for _ in range(splits):
        acc += tl.load(parts)
        parts += BLOCK_M * BLOCK_N
    row = pid_m * BLOCK_M + inside
    pointers = (out_ptr, before_ptr, embeds_ptr, rows_ptr, bias_ptr)
    sizes = (out_stride, num_rows, num_outputs, num_embeds)
    _finish(acc, row, pid_n * BLOCK_N, pointers, sizes, GELU, KEEP, PLACE, ALIGNED)


product = Kernel(
    _product_kernel,
    [
        {"BLOCK_M": 128, "BLOCK_N": n, "BLOCK_K": 64, "GROUP": 16, "num_warps": 8, "num_stages": 3}
        for n in (128, 256)
    ],
)
product_exact = Kernel(  # float32
    _product_kernel,
    [{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 16, "num_warps": 8, "num_stages": 2}],
)
add_parts = Kernel(_sum_kernel, [{"BLOCK_R": 16, "num_warps": 4}])

# --- launch ---

STEPS = 8  # of a part at least: a shorter one mostly waits for its first loads
MAX_SPLITS = 16


def choose_splits(blocks: int, steps: int, slots: int) -> tuple[int, int]:
    """How many blocks stay whole, and how many parts each other block has.

    Args:
        blocks: of the GEMM; those of a last wave that is at most half full are split.
        steps: along K.
        slots: blocks that run at a time.
    """
    tail = blocks % slots
    splits = min(slots // tail if tail else 1, steps // STEPS, MAX_SPLITS)
    return (blocks - tail, splits) if splits > 1 else (blocks, 1)


def multiply(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    gelu: bool = False,
    before: Tensor | None = None,
    embeds: Tensor | None = None,
    rows: Tensor | None = None,
) -> None:
    """Compute out [R, O] of x [R, K]; also write before [R, O], or embeds [E, O] at rows [R]."""
    (R, K), outputs = x.shape, weight.shape[0]
    kernel = product_exact if x.dtype == torch.float32 else product
    m, n, k, group = (kernel.config[c] for c in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP"))
    blocks = -(-R // m) * -(-outputs // n)
    whole, splits = choose_splits(blocks, -(-K // k), multiprocessors(x.get_device()))
    split = blocks - whole
    parts = torch.empty((split * splits, m, n), dtype=torch.float32, device=x.device)
    keep, place = before is not None, embeds is not None
    before, embeds, rows = (out if t is None else t for t in (before, embeds, rows))
    tensors = (out, before, embeds, rows, parts, bias)
    sizes, E = (out.stride(0), R, outputs), embeds.shape[0] if place else 0
    aligned = all(size % 8 == 0 for size in (out.stride(0), outputs, K))
    constants = (gelu, keep, place, aligned)
    numbers = (*sizes, K, E, whole, splits)
    programs = whole + split * splits
    kernel.launch(programs, *tensors, x, weight, *numbers, *constants, K % k == 0)
    programs = split * m // add_parts.config["BLOCK_R"]
    add_parts.launch(programs, *tensors, *sizes, E, whole, splits, *constants, m, n, group)
