"""Block functions that several kernels share: they take blocks and return blocks."""

import triton
import triton.language as tl

from comemo_kernels._op import INTERPRET

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
    from triton.language.target_info import cuda_capability_geq, is_cuda

    NEW = True
except ImportError:  # triton below 3.6
    NEW = False


@triton.jit
def find_image(
    grids_ptr,  # [I, 4], contiguous: offset, bias, cols, rows
    places,  # any shape
    num_images,
    num_steps,  # bit length of num_images
):
    """Index of the last image that starts at or before each place; -1 ahead of the first image."""
    low = tl.zeros_like(places).to(tl.int32)
    high = low + num_images
    for _ in range(num_steps):
        middle = (low + high) // 2
        open = low < high
        offsets = tl.load(grids_ptr + middle * 4, mask=open, other=0)
        after = open & (offsets > places)
        low = tl.where(open & (offsets <= places), middle + 1, low)
        high = tl.where(after, middle, high)
    return low - 1


@triton.jit
def thumbnail_cell(
    place,  # of the token in its image
    cols,
    rows,
    SIDE: tl.constexpr,
    COLUMN: tl.constexpr,  # tiles are numbered column by column, as published
):
    """Thumbnail cell that covers each token of an image; see `comemo_kernels.grids`."""
    AREA: tl.constexpr = SIDE * SIDE
    tile, inside = place // AREA, place % AREA
    r, c = inside // SIDE, inside % SIDE
    if COLUMN:
        major = tl.maximum(rows, 1)
        i, j = tile // major, tile % major
    else:
        major = tl.maximum(cols, 1)
        i, j = tile % major, tile // major
    y = tl.maximum(SIDE * ((SIDE - 1) * j + r) - 1, 0) // tl.maximum((SIDE - 1) * rows, 1)
    x = tl.maximum(SIDE * ((SIDE - 1) * i + c) - 1, 0) // tl.maximum((SIDE - 1) * cols, 1)
    thumbnail = (tile >= cols * rows) | (cols * rows <= 1)
    return tl.where(thumbnail, inside, y * SIDE + x)


@triton.jit
def image_position(
    grids_ptr, token, num_images, num_steps, SIDE: tl.constexpr, COLUMN, THUMBNAIL: tl.constexpr
):
    """Position id of each token of a sequence; see `ImageGrids.position_ids`."""
    image = find_image(grids_ptr, token, num_images, num_steps)
    row = grids_ptr + image * 4
    inside = image >= 0
    offset = tl.load(row, mask=inside, other=0)
    bias = tl.load(row + 1, mask=inside, other=0)
    cols = tl.load(row + 2, mask=inside, other=-1)
    rows = tl.load(row + 3, mask=inside, other=-1)
    tiles = tl.maximum(cols * rows, 1)
    if THUMBNAIL:
        tiles = tl.where(tiles > 1, tiles + 1, tiles)
    spent = tl.where(cols < 0, 0, SIDE * SIDE)
    place = token - offset
    cell = thumbnail_cell(place, cols, rows, SIDE, COLUMN)
    return bias + tl.where(place < spent * tiles, cell, place + spent * (1 - tiles))


@triton.jit
def offset_of(index, stride, ALIGNED: tl.constexpr, WIDE: tl.constexpr = 8):
    """`index * stride` in elements, with the hint that WIDE divides it if ALIGNED.

    WIDE elements are 128 bits: 8 of a 16-bit dtype, 16 of float8.
    """
    offset = index.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, WIDE)
    return offset


@triton.jit
def tanh(x):
    """tanh of float32; Triton has none of its own on every chip."""
    square = x * x
    # 1 - 2 / (e^2x + 1) is right for any size of x but loses the digits of small ones.
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * 62 / 2835)))
    return tl.where(tl.abs(x) < 0.25, x * series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def in_groups(block, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row and column of a GEMM's output block: groups of GROUP block rows reuse columns in L2."""
    first = block // (GROUP * blocks_n) * GROUP
    group = tl.minimum(blocks_m - first, GROUP)
    inside = block % (GROUP * blocks_n)
    return first + inside % group, inside // group


if INTERPRET or not NEW:

    @triton.jit
    def prefetch(ptrs, mask=None):
        """Do nothing: a prefetch changes no result."""

    @triton.jit
    def let_next_begin():
        """Do nothing: the next kernel starts after this one has ended."""

    @triton.jit
    def await_previous():
        """Do nothing: the previous kernel has ended."""

else:

    @triton.jit
    def prefetch(ptrs, mask=None):
        """Prefetch into L2 the 128-byte lines that contain the pointers; nothing waits for them.

        Each pointer must be valid or masked. A prefetch changes no result.
        """
        if is_cuda():
            if mask is None:
                tl.inline_asm_elementwise(
                    "prefetch.global.L2 [$1]; // nothing for $0",
                    "=r,l",
                    [ptrs],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )
            else:
                tl.inline_asm_elementwise(
                    "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; }"
                    " // nothing for $0",
                    "=r,l,r",
                    [ptrs, mask.to(tl.int32)],
                    dtype=tl.int32,
                    is_pure=False,
                    pack=1,
                )

    @triton.jit
    def let_next_begin():
        """Let the next kernel of the stream start, if it is launched with `launch_pdl`.

        It sees what this kernel writes only after its own `await_previous`.
        """
        if cuda_capability_geq(9):
            gdc_launch_dependents()

    @triton.jit
    def await_previous():
        """Wait until the previous kernel of the stream has ended and its writes are visible."""
        if cuda_capability_geq(9):
            gdc_wait()
