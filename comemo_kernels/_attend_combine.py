"""Reduction of split-K attention: the outputs of all splits of a row become one.

    out = sum of exp(lse_i - lse) out_i,  lse = log sum of exp lse_i        over splits i, in order

Traffic: 4 * D + 4 bytes read for each row and split, out and lse written once.
Source: FlashAttention-2 (arXiv:2307.08691).

Letters: B batch, N tokens, H query heads, G key heads, D head dimension, R rows of one key head.
"""

import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import NEW, await_previous
from comemo_kernels._blocks_attention import combine_parts
from comemo_kernels._op import Kernel, jit, padded


@jit
def _combine_kernel(
    out_ptr,  # [B, N, H, D], contiguous
    lse_ptr,  # [B, N, H]
    part_ptr,  # [splits, G * R, D]
    part_lse_ptr,  # [splits, G * R]
    num_rows,  # R
    num_heads,  # G
    group,
    num_splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    EARLY: tl.constexpr,  # the launch starts before the parts are written
):
    """One program combines the parts of one row."""
    if EARLY:
        await_previous()
    LN2: tl.constexpr = 0.6931471805599453
    pid = tl.program_id(0)
    row, head = pid // num_heads, pid % num_heads
    parts = (part_ptr, part_lse_ptr)
    part, parts_apart = head * num_rows + row, num_heads * num_rows
    y, lse = combine_parts(parts, part, parts_apart, num_splits, D, BLOCK_D, BLOCK_S)
    offs = (row // group).to(tl.int64) * group * num_heads + head * group + row % group
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + offs * D + offs_d, y, mask=offs_d < D)
    tl.store(lse_ptr + offs, lse * LN2)


combine = Kernel(_combine_kernel, [{"BLOCK_S": 16, "EARLY": 0, "num_warps": 2}])
combine_early = combine
if NEW:
    combine_early = Kernel(
        _combine_kernel, [{"BLOCK_S": 16, "EARLY": 1, "num_warps": 2, "launch_pdl": True}]
    )


def launch_combine(
    kernel: Kernel,  # `combine` or `combine_early`
    out: Tensor,
    lse: Tensor,
    parts: Tensor,  # [splits, G, R, D]
    part_lse: Tensor,
    heads: int,  # H
) -> None:
    """Write `out` and `lse`."""
    splits, G, rows, D = parts.shape
    numbers = (rows, G, heads // G, splits)
    kernel.launch(rows * G, out, lse, parts, part_lse, *numbers, D, padded(D))
