"""An image resized and cut into tiles: the two resizes at the same time, in two threads.

Pillow releases the GIL while it resizes. A resize is not divided any further: whether Pillow scales
rows or columns first, with a rounding to 8 bits between, depends on its version and on the sizes.

Nothing cheaper has the same pixels: `draft`, which decodes a JPEG at a smaller scale, changed 40 %
to 71 % of the values of a photograph of 4000 x 3000, by up to 8 of 255, and `reducing_gap` 29 %.
"""

from concurrent.futures import ThreadPoolExecutor

from PIL import Image

WORTH_THREADS = 2**20  # pixels, read and written, that take much longer than starting a thread


def resize_to_tiles(
    image: Image.Image, side: int, grid: tuple[int, int], thumbnail: bool, threads: int = 1
) -> list[Image.Image]:
    """Resize an image to its grid and cut it.

    Args:
        image: of mode RGB, decoded.
        side: pixels along the side of a tile.
        grid: (cols, rows).
        thumbnail: whether the whole image follows as one more tile.
        threads: that may work at the same time; more than two are not used.

    Returns:
        The tiles, row by row, and the thumbnail.
    """
    cols, rows = grid
    whole, small = (side * cols, side * rows), (side, side)
    if not thumbnail:
        return _cut(image.resize(whole), side)
    pixels = image.width * image.height + cols * rows * side**2
    if threads == 1 or pixels < WORTH_THREADS:
        return [*_cut(image.resize(whole), side), image.resize(small)]
    with ThreadPoolExecutor(1, "comemo-resize") as pool:
        last = pool.submit(image.resize, small)
        return [*_cut(image.resize(whole), side), last.result()]


def _cut(image: Image.Image, side: int) -> list[Image.Image]:
    """Tiles of an image whose sides are multiples of `side`, row by row."""
    return [
        image.crop((left, top, left + side, top + side))
        for top in range(0, image.height, side)
        for left in range(0, image.width, side)
    ]
