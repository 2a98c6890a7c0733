"""Block functions that several kernels share: blocks in, blocks out."""

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
    """Index of the last image that begins at or before each place; -1 before the first."""
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
    COLUMN: tl.constexpr,  # tiles take their cells column by column, as published
):
    """Thumbnail cell under each token of an image; see `comemo_kernels.grids`."""
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
    """Position id of each token of a sequence, as `ImageGrids.position_ids`."""
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
    """Elements from `index` steps of `stride`; multiples of WIDE, if ALIGNED.

    WIDE is 8, 128 bits of bf16, but for float8, of which 128 bits are 16.
    """
    offset = index.to(tl.int64) * stride
    if ALIGNED:
        offset = tl.multiple_of(offset, WIDE)
    return offset


@triton.jit
def in_groups(block, blocks_m, blocks_n, GROUP: tl.constexpr):
    """Row and column of a product's block: GROUP blocks of rows share the columns L2 holds."""
    first = block // (GROUP * blocks_n) * GROUP
    group = tl.minimum(blocks_m - first, GROUP)
    inside = block % (GROUP * blocks_n)
    return first + inside % group, inside // group


if INTERPRET or not NEW:

    @triton.jit
    def prefetch(ptrs, mask=None):
        """Nothing: what follows loads what it needs."""

    @triton.jit
    def let_next_begin():
        """Nothing: the next kernel begins when this one has ended."""

    @triton.jit
    def await_previous():
        """Nothing: the previous kernel has ended."""

else:

    @triton.jit
    def prefetch(ptrs, mask=None):
        """Let L2 fetch the lines of 128 bytes that pointers lie in; nothing waits for them.

        Each must be of memory that is there, or masked. Loads that come after find it in L2, and
        what is right does not depend on it.
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
        """Let the next kernel of the stream begin, if it is launched with `launch_pdl`.

        What this one writes is not there for it until it has waited: `await_previous`.
        """
        if cuda_capability_geq(9):
            gdc_launch_dependents()

    @triton.jit
    def await_previous():
        """Wait until the previous kernel of the stream has ended and all that it wrote is there."""
        if cuda_capability_geq(9):
            gdc_wait()
