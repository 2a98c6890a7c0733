"""The GEMM of the memory build with tensor descriptors (TMA), in persistent programs.

The same as `_memory_build_gemm`, for 16-bit dtypes on Hopper: one program for each multiprocessor
takes tile after tile of all layers. The compiler fuses its loop over tiles with the one over K, so
the first steps of a tile are loaded during the last products and the epilogue of the tile before.
Threads compute no addresses of operands: the registers that this saves hold 256 columns. With fewer
columns shared memory is the limit, whoever copies (bench/NOTES.md).
The layers' weights are separate tensors. One descriptor of three dimensions reads them all: its
first dimension steps by 16 bytes from the lowest address, and a layer's index in it is the distance
of its weight from there.
`memory_build.USE_TMA` enables it.

Letters: M image tokens, d their width, L layers, G heads, D head dimension, P rows of the rotary
table.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import _descriptors
from comemo_kernels._blocks import in_groups, offset_of
from comemo_kernels._blocks_memory_build import load_rotation, pointer_to, without_nan
from comemo_kernels._op import INTERPRET, Kernel, is_hopper, jit, multiprocessors

REACH = tl.constexpr(2**31 - 1)  # steps of 16 bytes that a descriptor can index

# --- kernel ---


@triton.jit
def _lowest(address_ptr, num_layers):
    """The lowest address of W."""
    lowest = tl.load(address_ptr)
    for layer in range(1, num_layers):
        lowest = tl.minimum(lowest, tl.load(address_ptr + layer * 4))
    return lowest


@triton.jit
def _weight_tiles(address, like_ptr, rows, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The weight [rows, width] at an address; index i of dimension 0 begins 16 * i bytes later."""
    first = pointer_to(address, like_ptr, True)
    return tl.make_tensor_descriptor(
        first, [REACH, rows, width], [8, width.to(tl.int64), 1], [1, BLOCK_N, BLOCK_K]
    )


@triton.jit
def _store_tile(
    out_ptr,  # [M, G, D]
    acc,  # [BLOCK_M, HEADS * D]
    row,  # [BLOCK_M]
    head,  # [HEADS]
    kind,
    rotary_table,
    rstd_ptr,
    ids_ptr,
    out_strides,  # of M and G
    sizes,  # M, G
    out_row,
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
):
    """Scale, rotate if they are keys, and store the rows of some heads."""
    num_rows, num_heads = sizes
    mask_m = row < num_rows
    if not EXACT:
        acc *= tl.load(rstd_ptr + row, mask=mask_m, other=0.0)[:, None]
    acc = tl.reshape(acc, (row.shape[0], head.shape[0], 2, HALF))
    acc1, acc2 = tl.split(tl.permute(acc, (0, 1, 3, 2)))
    element = tl.arange(0, HALF)
    if kind == 0:
        cos, sin = load_rotation(rotary_table, ids_ptr, row, mask_m, element, None, True)
        cos, sin = cos[:, None, :], sin[:, None, :]
        turned = acc1 * cos - acc2 * sin
        acc2 = acc2 * cos + acc1 * sin
        acc1 = turned
    else:
        acc1, acc2 = without_nan(acc1), without_nan(acc2)
    out_rows = out_ptr + offset_of(row + out_row, out_strides[0], True)[:, None, None]
    out_rows += offset_of(head, out_strides[1], True)[None, :, None]
    mask = mask_m[:, None, None] & (head < num_heads)[None, :, None]
    tl.store(out_rows + element[None, None, :], acc1, mask=mask)
    tl.store(out_rows + HALF + element[None, None, :], acc2, mask=mask)


@jit
def _project_tma_kernel(
    x_ptr,  # [L, M, d]: normalised, contiguous; or [M, d]: media
    rstd_ptr,  # [M]
    ids_ptr,  # [M] int32
    cos_ptr,  # [P, HALF]
    sin_ptr,
    address_ptr,  # [L, 4]: of W, norm weight, keys, values
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
    HALF: tl.constexpr,  # D / 2
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that follow each other on one block of columns
):
    """One program computes keys or values of BLOCK_M rows and some heads, tile after tile."""
    HEADS: tl.constexpr = BLOCK_N // (2 * HALF)
    tl.assume(width > 0)  # otherwise the compiler emits everything twice
    blocks_m, blocks_h = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_heads, HEADS)
    of_layer, w_rows = blocks_m * 2 * blocks_h, num_heads * 4 * HALF
    rows = num_rows * num_layers if EXACT else num_rows
    x_tiles = tl.make_tensor_descriptor(x_ptr, [rows, width], [x_stride_m, 1], [BLOCK_M, BLOCK_K])
    lowest = _lowest(address_ptr, num_layers)
    w_tiles = _weight_tiles(lowest, x_ptr, w_rows, width, BLOCK_N, BLOCK_K)
    rotary_table = (cos_ptr, sin_ptr, table_stride, num_positions)
    tiles = of_layer * num_layers
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        layer = tile // of_layer
        pid_m, pid_c = in_groups(tile % of_layer, blocks_m, 2 * blocks_h, GROUP)
        kind, first_head = pid_c // blocks_h, pid_c % blocks_h * HEADS
        table = address_ptr + layer * 4
        index = ((tl.load(table) - lowest) // 16).to(tl.int32)
        # Rows after the last of a layer, or of keys, belong to others: computed, not stored.
        w_row = (kind * num_heads + first_head) * (2 * HALF)
        x_row = pid_m * BLOCK_M
        if EXACT:
            x_row += layer * num_rows
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in tl.range(0, width, BLOCK_K):
            x = x_tiles.load([x_row, k])
            w = tl.reshape(w_tiles.load([index, w_row, k]), (BLOCK_N, BLOCK_K))
            acc = tl.dot(x, tl.trans(w), acc)
        out_ptr = pointer_to(tl.load(table + 2 + kind), x_ptr, True)
        _store_tile(
            out_ptr,
            acc,
            pid_m * BLOCK_M + tl.arange(0, BLOCK_M),
            first_head + tl.arange(0, HEADS),
            kind,
            rotary_table,
            rstd_ptr,
            ids_ptr,
            (out_stride_m, out_stride_g),
            (num_rows, num_heads),
            out_row,
            EXACT,
            HALF,
        )


project_tma = Kernel(
    _project_tma_kernel,
    [
        {
            "BLOCK_M": 128,
            "BLOCK_N": 256,
            "BLOCK_K": 64,
            "GROUP": 16,
            "num_warps": 8,
            "num_stages": 3,
        }
    ],
)

# --- launch ---


def fits(media: Tensor, weights: list[Tensor], D: int, aligned: bool) -> bool:
    """Whether this kernel supports the inputs, as far as the host knows.

    Args:
        media: [M, d].
        weights: L of [2 * G * D, d], contiguous.
        D: head dimension.
        aligned: whether 16 bytes divide the strides, and all addresses except that of media.
    """
    steps = [weight.data_ptr() // 16 for weight in weights]
    return (
        _descriptors.AVAILABLE
        and (INTERPRET or is_hopper(media.get_device()))
        and media.dtype in (torch.float16, torch.bfloat16)
        and D in (32, 64, 128)
        and aligned
        and media.data_ptr() % 16 == 0
        and media.stride(0) >= media.shape[1] > 0
        and max(steps) - min(steps) < REACH.value
    )


def launch(
    x: Tensor,  # [L, M or more, d], contiguous: normalised; or [M, d]: media
    rstd: Tensor,
    ids: Tensor,
    cos: Tensor,
    sin: Tensor,
    address: Tensor,
    out_strides: tuple[int, int],  # of M and G
    rows: int,  # M
    heads: tuple[int, int],  # G, D
    out_row: int,
) -> None:
    """Write keys and values of all layers to the addresses in `address`."""
    (G, D), L, config = heads, address.shape[0], project_tma.config
    tiles = -(-rows // config["BLOCK_M"]) * L * 2 * -(-G // (config["BLOCK_N"] // D))
    programs = min(tiles, multiprocessors(x.get_device()))
    tensors = (x, rstd, ids, cos, sin, address)
    strides = (x.stride(-2), *out_strides, cos.stride(0))
    sizes = (rows, x.shape[-1], G, L, cos.shape[0], out_row)
    exact = x.ndim == 3
    with _descriptors.allocated():
        project_tma.launch(programs, *tensors, *strides, *sizes, exact, D // 2)
