"""From an image file to the tiles that the model sees.

An image is converted to RGB, resized to the grid of tiles whose aspect ratio is nearest to its own,
and cut row by row. A thumbnail of the whole image follows: `pixel_values` [tiles, 3, size, size].
"""

import functools
import math
import numbers
import operator
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image

from comemo.processing.image_files import Source, open_image, read_size
from comemo.processing.read_ahead import read_each
from comemo.processing.resizing import resize_to_tiles
from comemo.safety.settings import MAX_TILES

if TYPE_CHECKING:  # torch takes seconds to import, and grids and tiles do not need it
    from torch import Tensor

__all__ = [
    "MAX_TILES",
    "Source",
    "candidate_grids",
    "choose_grid",
    "load_image",
    "load_images",
    "normalise",
    "normalise_pixels",
    "open_image",
    "read_size",
    "split_tiles",
    "stack_tiles",
]

Grid: TypeAlias = tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = MAX_TILES * 448**2  # of all tiles of an image


def candidate_grids(min_num: int, max_num: int) -> tuple[Grid, ...]:
    """List the grids (cols, rows) of `min_num` to `max_num` tiles, smallest first.

    Args:
        min_num: fewest tiles, at least 1.
        max_num: most tiles, from `min_num` to `MAX_TILES`.

    Returns:
        Every grid once; grids of equal area are in the order of the published code.

    Raises:
        ValueError: a limit is not an integer or out of range.
    """
    return _grids(*_check_limits("candidate_grids", min_num, max_num))


def choose_grid(
    width: int, height: int, min_num: int = 1, max_num: int = 12, input_size: int = 448
) -> Grid:
    """Choose the grid whose aspect ratio is nearest to that of an image.

    Args:
        width, height: of the image, in pixels.
        min_num: fewest tiles, at least 1.
        max_num: most tiles, from `min_num` to `MAX_TILES`.
        input_size: pixels along the side of a tile.

    Returns:
        (cols, rows) with the least |width / height - cols / rows|, in float64. Of equally near
        grids a later candidate wins if the image has more than half as many pixels as its tiles.

    Raises:
        ValueError: an argument is not an integer or out of range.
    """
    named = {"width": width, "height": height, "input_size": input_size}
    width, height, input_size = (_check_count("choose_grid", *item) for item in named.items())
    limits = _check_limits("choose_grid", min_num, max_num)
    best, least = (1, 1), math.inf
    for cols, rows in _grids(*limits):
        distance = abs(width / height - cols / rows)
        fills = width * height > 0.5 * input_size**2 * cols * rows
        if distance < least or (distance == least and fills):
            best, least = (cols, rows), distance
    return best


def split_tiles(
    image: Image.Image,
    input_size: int = 448,
    min_num: int = 1,
    max_num: int = 12,
    use_thumbnail: bool = True,
    threads: int | None = None,
) -> tuple[list[Image.Image], Grid]:
    """Resize an image to its grid and cut it into tiles.

    Args:
        image: of mode RGB, as `open_image` returns it.
        input_size: pixels along the side of a tile.
        min_num: fewest tiles, at least 1.
        max_num: most tiles, from `min_num` to `MAX_TILES`.
        use_thumbnail: whether the whole image follows as one more tile if there are several.
        threads: that resize; None for `torch.get_num_threads()`. They change no pixel.

    Returns:
        The tiles, row by row, and the grid (cols, rows).

    Raises:
        ValueError: `image` is not an RGB image with pixels, tiles with more than `MAX_PIXELS` in
            total, or as `choose_grid`.
    """
    if not _describe(image).startswith("RGB (") or 0 in image.size:
        wanted = "image must be an RGB image with pixels"
        raise ValueError(f"split_tiles: {wanted}, got {_describe(image)}")
    cols, rows = choose_grid(*image.size, min_num, max_num, input_size)
    size = operator.index(input_size)
    _check_pixels("split_tiles", cols * rows, size)
    count = _check_threads("split_tiles", threads)
    thumbnail = use_thumbnail and cols * rows > 1
    return resize_to_tiles(image, size, (cols, rows), thumbnail, count), (cols, rows)


def normalise(
    tiles: Sequence[Image.Image],
    scale: float | None = 1 / 255,
    mean: float | Sequence[float] | None = IMAGENET_MEAN,
    std: float | Sequence[float] | None = IMAGENET_STD,
) -> "Tensor":
    """Scale tiles to [0, 1] and normalise them with the mean and standard deviation of ImageNet.

    Args:
        tiles: square RGB images of one size.
        scale: factor for the values 0 to 255; None for no scaling.
        mean, std: of the scaled values, one number or one per channel. If either is None, values
            are not normalised.

    Returns:
        float32 [tiles, 3, size, size].

    Raises:
        ValueError: no tile, or tiles that are not square, not RGB, or of different sizes; `scale`
            is not a number, `mean` or `std` not one or three numbers; a `std` of 0.
    """
    import torch

    found = {_describe(tile) for tile in tiles}
    size = tiles[0].width if found and isinstance(tiles[0], Image.Image) else 0
    if found != {f"RGB {(size, size)}"}:
        got = ", ".join(sorted(found)) or "none"
        raise ValueError(f"normalise: tiles must be square RGB images of one size, got {got}")
    if scale is not None and not (isinstance(scale, numbers.Real) and abs(scale) < 1e38):
        raise ValueError(f"normalise: scale must be a finite number or None, got {scale!r}")
    shift = None if mean is None or std is None else _per_channel("mean", mean)
    spread = None if shift is None or std is None else _per_channel("std", std)
    if spread is not None and not spread.all():
        raise ValueError(f"normalise: std must not be 0, got {std}")
    pixels = torch.empty(len(tiles), 3, size, size, dtype=torch.float32)
    with np.errstate(all="ignore"):  # numbers of the caller may overflow
        # By NumPy: after an operation PyTorch's threads wait busily, on the cores of other readers.
        for out, tile in zip(pixels.numpy(), tiles, strict=True):
            out[...] = np.asarray(tile).transpose(2, 0, 1)
            if scale is not None:
                # the published code divides, which rounds differently
                rescale, by = (np.divide, 255) if scale == 1 / 255 else (np.multiply, scale)
                rescale(out, np.float32(by), out=out)
            if shift is not None and spread is not None:
                out -= shift.numpy()
                out /= spread.numpy()
    return pixels


def stack_tiles(tiles: Sequence[Image.Image]) -> np.ndarray:
    """The pixels of tiles before `normalise_pixels`, a quarter of the size.

    Args:
        tiles: RGB images of one size.

    Returns:
        uint8 [tiles, 3, size, size].
    """
    return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])


def normalise_pixels(pixels: "Tensor") -> "Tensor":
    """What `normalise` makes of tiles by default, bit by bit, on any device.

    Args:
        pixels: uint8 [tiles, 3, size, size], see `stack_tiles`.

    Returns:
        float32 of the same shape, on the same device.

    Raises:
        ValueError: pixels of another type or shape.
    """
    import torch

    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        got = f"{pixels.dtype} {tuple(pixels.shape)}"
        raise ValueError(f"normalise_pixels: pixels must be uint8 [T, 3, H, W], got {got}")
    # on a GPU a division by a number would be a multiplication, which rounds differently
    white, mean, std = (
        torch.tensor(values, device=pixels.device).view(-1, 1, 1)
        for values in ((255.0,), IMAGENET_MEAN, IMAGENET_STD)
    )
    return pixels.float().div_(white).sub_(mean).div_(std)


def load_image(
    source: Source,
    input_size: int = 448,
    max_num: int = 12,
    *,
    min_num: int = 1,
    use_thumbnail: bool = True,
    published: bool = False,
    convert_rgb: bool = True,
    scale: float | None = 1 / 255,
    mean: float | Sequence[float] | None = IMAGENET_MEAN,
    std: float | Sequence[float] | None = IMAGENET_STD,
    threads: int | None = None,
) -> "tuple[Tensor, Grid]":
    """Read an image into the form that the model needs.

    Args:
        source: anything that `open_image` reads.
        input_size: pixels along the side of a tile.
        max_num: most tiles, from `min_num` to `MAX_TILES`; the thumbnail is not counted.
        min_num: fewest tiles, at least 1.
        use_thumbnail: whether the whole image follows as one more tile if there are several.
        published: exactly the pixels of the published code; see `open_image`.
        convert_rgb: False refuses images of another mode than RGB.
        scale, mean, std: see `normalise`; the model needs the defaults.
        threads: that resize; None for `torch.get_num_threads()`. They change no pixel.

    Returns:
        `pixel_values` float32 [tiles, 3, input_size, input_size], the thumbnail last, and the grid
        (cols, rows), which `chat` calls `target_aspect_ratio`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `open_image`, `split_tiles` and `normalise`; or a limit is not an integer or
            out of range.
    """
    # checked here too, so that a wrong limit fails before decoding
    size = _check_count("load_image", "input_size", input_size)
    low, high = _check_limits("load_image", min_num, max_num)
    _check_pixels("load_image", low, size)
    count = _check_threads("load_image", threads)
    image = open_image(source, published=published, convert_rgb=convert_rgb)
    tiles, grid = split_tiles(image, size, low, high, use_thumbnail, count)
    return normalise(tiles, scale, mean, std), grid


def load_images(
    sources: Sequence[Source],
    input_size: int = 448,
    max_num: int = 12,
    *,
    min_num: int = 1,
    use_thumbnail: bool = True,
    published: bool = False,
    convert_rgb: bool = True,
    scale: float | None = 1 / 255,
    mean: float | Sequence[float] | None = IMAGENET_MEAN,
    std: float | Sequence[float] | None = IMAGENET_STD,
    threads: int | None = None,
) -> "Iterator[tuple[Tensor, Grid]]":
    """Read images one after another as `load_image` does, the next ones in threads meanwhile.

    Args:
        sources: of any number of images. Paths, bytes, text and arrays are read ahead.
        threads: of all reading together; None for `torch.get_num_threads()`.
        input_size, max_num, min_num, use_thumbnail, published, convert_rgb, scale, mean, std: see
            `load_image`.

    Returns:
        An iterator of what `load_image` returns, in order. At most five images are in memory before
        they are asked for. Its threads end with it, also after an exception.

    Raises:
        FileNotFoundError, ValueError: as `load_image`; of an image, when it is its turn.
    """
    size = _check_count("load_images", "input_size", input_size)
    low, high = _check_limits("load_images", min_num, max_num)
    _check_pixels("load_images", low, size)
    count = _check_threads("load_images", threads)

    def cut(source: Source, threads: int) -> tuple[list[Image.Image], Grid]:
        image = open_image(source, published=published, convert_rgb=convert_rgb)
        return split_tiles(image, size, low, high, use_thumbnail, threads)

    return ((normalise(t, scale, mean, std), grid) for t, grid in read_each(cut, sources, count))


@functools.lru_cache(maxsize=256)
def _grids(low: int, high: int) -> tuple[Grid, ...]:
    """List the grids of `low` to `high` tiles in the order of the published code."""
    columns = range(1, high + 1)
    grids = [(c, r) for c in columns for r in range(1, high // c + 1) if c * r >= low]
    # The published code fills a set of tuples, ring by ring, and sorts it by area alone. In CPython
    # the order of a set of integer tuples depends only on the order of insertion, repeated here.
    grids.sort(key=lambda grid: max(*grid, low))
    return tuple(sorted(set(grids), key=lambda grid: grid[0] * grid[1]))


def _check_limits(function: str, min_num: int, max_num: int) -> tuple[int, int]:
    low = _check_count(function, "min_num", min_num)
    high = _check_count(function, "max_num", max_num)
    if not low <= high <= MAX_TILES:
        wanted = f"min_num <= max_num <= {MAX_TILES}"
        raise ValueError(f"{function}: wanted {wanted}, got min_num {low}, max_num {high}")
    return low, high


def _check_count(function: str, name: str, value: int) -> int:
    try:
        count = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = 0
    if not 1 <= count < 2**31:
        wanted = "an integer of at least 1" + (" and below 2^31" if count > 1 else "")
        raise ValueError(f"{function}: {name} must be {wanted}, got {value!r}")
    return count


def _check_threads(function: str, threads: int | None) -> int:
    if threads is not None:
        return _check_count(function, "threads", threads)
    torch = sys.modules.get("torch")  # it is not imported for its number of threads
    return 1 if torch is None else torch.get_num_threads()


def _check_pixels(function: str, tiles: int, size: int) -> None:
    if tiles * size**2 > MAX_PIXELS:
        wanted = f"input_size must make {tiles} tiles of at most {MAX_PIXELS} pixels in total"
        raise ValueError(f"{function}: {wanted}, got {size}")


def _describe(value: object) -> str:
    return f"{value.mode} {value.size}" if isinstance(value, Image.Image) else type(value).__name__


def _per_channel(name: str, values: float | Sequence[float]) -> "Tensor":
    """[3, 1, 1] or [1, 1, 1]."""
    import torch

    try:
        found = torch.as_tensor(values, dtype=torch.float32).flatten()
    except (TypeError, ValueError, RuntimeError):  # not numbers, or ragged
        found = torch.empty(0)
    if found.numel() not in (1, 3) or not found.isfinite().all():
        raise ValueError(
            f"normalise: {name} must be one or three numbers, all finite, got {values!r}"
        )
    return found.view(-1, 1, 1)
