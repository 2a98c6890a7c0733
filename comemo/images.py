"""From a file to the tiles that the model sees.

A picture becomes RGB, is stretched to the grid of tiles whose shape is nearest to its own, is cut
row by row, and is followed by a thumbnail of the whole: `pixel_values` [tiles, 3, size, size].
"""

import functools
import io
import math
import operator
import os
import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO, TypeAlias, cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor

Source: TypeAlias = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray
Grid: TypeAlias = tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# 1024 tiles are 262,144 tokens: past any context, and a bound on the list of candidates
MAX_TILES = 1024

# What Pillow's decoders raise on damaged bytes; which one depends on the format and on the place
_DAMAGE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, TypeError)
_DAMAGE += (LookupError, ArithmeticError, RuntimeError, struct.error, zlib.error)
_GREY_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# where Pillow finds an orientation: a picture turned upright must not be turned again
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


def open_image(source: Source, *, published: bool = False) -> Image.Image:
    """Read a picture as upright 8-bit RGB.

    Of an animation, the first frame. Transparency is dropped and the stored colours are kept, which
    is what the published checkpoints saw; lay a picture over a background first if that matters.

    Args:
        source: path, bytes of a file, binary file object (left open), Pillow picture, or uint8
            array [height, width] or [height, width, 3]. Mode `I` is read as 16-bit grey.
        published: exactly the pixels of the published code: the EXIF orientation is ignored, and
            16-bit grey is clipped at 255 (nearly white) where it is scaled to 8 bits otherwise.

    Returns:
        A decoded picture of mode RGB that holds no file. A Pillow picture that is upright RGB
        already is returned itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a folder, a URL, a wrong type; not a picture, damaged, without pixels, or larger
            than `PIL.Image.MAX_IMAGE_PIXELS` (refused undecoded); grey whose white is unknown.
    """
    if isinstance(source, Image.Image):
        name = f"the Pillow picture ({source.mode}, {source.width} x {source.height})"
        return _decode(source, name, published)
    if isinstance(source, np.ndarray):
        return _decode(_from_array(source), "the array", published)
    with _binary(source) as (stream, name):
        with _one_error(name):
            image = Image.open(stream)
        # leaving the block drops the image's hold on the stream; its pixels stay
        with image:
            return _decode(image, name, published)


def candidate_grids(min_num: int, max_num: int) -> tuple[Grid, ...]:
    """List the grids (cols, rows) of `min_num` to `max_num` tiles, smallest first.

    Args:
        min_num: fewest tiles, at least 1.
        max_num: most tiles, from `min_num` to `MAX_TILES`.

    Returns:
        Every grid once; grids of equal area stand in the order of the published code.

    Raises:
        ValueError: a limit is no integer or out of range.
    """
    return _grids(*_check_limits("candidate_grids", min_num, max_num))


def choose_grid(
    width: int, height: int, min_num: int = 1, max_num: int = 12, input_size: int = 448
) -> Grid:
    """Choose the grid whose shape is nearest to that of a picture.

    Args:
        width, height: of the picture, in pixels.
        min_num: fewest tiles, at least 1.
        max_num: most tiles, from `min_num` to `MAX_TILES`.
        input_size: pixels along the side of a tile.

    Returns:
        (cols, rows) with the least |width / height - cols / rows|, in float64. Of equally near
        grids a later candidate wins if the picture has more than half as many pixels as its tiles.

    Raises:
        ValueError: an argument is no integer or out of range.
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
) -> tuple[list[Image.Image], Grid]:
    """Stretch a picture to its grid and cut it.

    Args:
        image: of mode RGB, as `open_image` returns it.
        input_size: pixels along the side of a tile.
        min_num: fewest tiles, at least 1.
        max_num: most tiles, from `min_num` to `MAX_TILES`.
        use_thumbnail: whether more than one tile is followed by the whole picture as one more.

    Returns:
        The tiles, row by row, and the grid (cols, rows).

    Raises:
        ValueError: `image` is not an RGB picture with pixels, or as `choose_grid`.
    """
    if not _describe(image).startswith("RGB (") or 0 in image.size:
        wanted = "image must be an RGB picture with pixels"
        raise ValueError(f"split_tiles: {wanted}, got {_describe(image)}")
    cols, rows = choose_grid(*image.size, min_num, max_num, input_size)
    size = operator.index(input_size)
    stretched = image.resize((size * cols, size * rows))
    tiles = [
        stretched.crop((size * col, size * row, size * (col + 1), size * (row + 1)))
        for row in range(rows)
        for col in range(cols)
    ]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((size, size)))
    return tiles, (cols, rows)


def normalise(tiles: Sequence[Image.Image]) -> Tensor:
    """Scale tiles to [0, 1] and normalise them with the mean and deviation of ImageNet.

    Args:
        tiles: square RGB pictures of one size.

    Returns:
        float32 [tiles, 3, size, size].

    Raises:
        ValueError: no tile, or tiles that are not square, not RGB, or of different sizes.
    """
    found = {_describe(tile) for tile in tiles}
    size = tiles[0].width if found and isinstance(tiles[0], Image.Image) else 0
    if found != {f"RGB {(size, size)}"}:
        got = ", ".join(sorted(found)) or "none"
        raise ValueError(f"normalise: tiles must be square RGB pictures of one size, got {got}")
    pixels = torch.empty(len(tiles), 3, size, size)
    for out, tile in zip(pixels, tiles, strict=True):
        out.copy_(torch.from_numpy(np.array(tile)).permute(2, 0, 1))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return pixels.div_(255).sub_(mean).div_(std)


def load_image(
    source: Source,
    input_size: int = 448,
    max_num: int = 12,
    *,
    min_num: int = 1,
    use_thumbnail: bool = True,
    published: bool = False,
) -> tuple[Tensor, Grid]:
    """Read a picture as the model wants it.

    Args:
        source: anything that `open_image` reads.
        input_size: pixels along the side of a tile.
        max_num: most tiles, from `min_num` to `MAX_TILES`; the thumbnail is not counted.
        min_num: fewest tiles, at least 1.
        use_thumbnail: whether more than one tile is followed by the whole picture as one more.
        published: exactly the pixels of the published code; see `open_image`.

    Returns:
        `pixel_values` float32 [tiles, 3, input_size, input_size], the thumbnail last, and the grid
        (cols, rows), which `chat` calls `target_aspect_ratio`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `open_image`; or a limit is no integer or out of range.
    """
    # checked here too, so that a wrong limit costs no decoding
    size = _check_count("load_image", "input_size", input_size)
    low, high = _check_limits("load_image", min_num, max_num)
    tiles, grid = split_tiles(
        open_image(source, published=published), size, low, high, use_thumbnail
    )
    return normalise(tiles), grid


@functools.lru_cache(maxsize=256)
def _grids(low: int, high: int) -> tuple[Grid, ...]:
    """List the grids of `low` to `high` tiles in the order of the published code."""
    columns = range(1, high + 1)
    grids = [(c, r) for c in columns for r in range(1, high // c + 1) if c * r >= low]
    # The published code fills a set of tuples, ring by ring, and sorts it by area alone. CPython's
    # order of a set of integer tuples depends on the order of insertion only, so it is repeated.
    grids.sort(key=lambda grid: max(*grid, low))
    return tuple(sorted(set(grids), key=lambda grid: grid[0] * grid[1]))


@contextmanager
def _binary(source: str | os.PathLike[str] | bytes | BinaryIO) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a binary stream and its name for messages; close only what was opened here."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source), f"a file of {len(source)} bytes"
    elif isinstance(source, (str, os.PathLike)):
        path = os.fspath(source)
        name = repr(path)
        if isinstance(path, str) and re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|data:)", path):
            raise ValueError(f"open_image: reads no URL, download the picture: got {name:.80}")
        if "\0" in os.fsdecode(path) or os.path.isdir(path):
            raise ValueError(f"open_image: wanted the path of a picture file, got {name}")
        with open(path, "rb") as stream:
            yield stream, name
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        yield source, f"the file object {getattr(source, 'name', '')!r}"
    else:
        wanted = "a path, bytes, a binary file object, a Pillow picture or a uint8 array"
        raise ValueError(f"open_image: source must be {wanted}, got {type(source).__name__}")


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn what Pillow raises about a picture into one ValueError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"open_image: {name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        reason = "is not a picture that Pillow can read, or its header is damaged"
        raise ValueError(f"open_image: {name} {reason}") from error
    except _DAMAGE as error:
        # with an errno it comes from the disk, not from the picture
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = "cannot be decoded, it may be cut off or damaged"
        raise ValueError(f"open_image: {name} {reason}: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    """View an array as a picture."""
    shape = array.shape
    if array.dtype != np.uint8 or 0 in shape or not (len(shape) == 2 or shape[2:] == (3,)):
        wanted = "an array must be uint8 [height, width] or [height, width, 3] with pixels"
        raise ValueError(f"open_image: {wanted}, got {array.dtype} {list(shape)}")
    return Image.fromarray(array)


def _decode(image: Image.Image, name: str, published: bool) -> Image.Image:
    """Decode the pixels and turn them into upright RGB."""
    if 0 in image.size:
        raise ValueError(f"open_image: {name} has no pixels: {image.width} x {image.height}")
    if isinstance(image, ImageFile.ImageFile):
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            wanted = f"at most PIL.Image.MAX_IMAGE_PIXELS = {limit} (raise it for a trusted file)"
            got = f"{image.width} x {image.height}"
            raise ValueError(f"open_image: {name} is too large: wanted {wanted}, got {got}")
        if image.format == "EPS":
            raise ValueError(f"open_image: {name} is PostScript, a program and not a picture")
    with _one_error(name):
        image.load()
    if not published:
        image = _turn_upright(image)
        if image.mode in _GREY_16:
            image = _grey_8_bit(image, name)
        elif image.mode == "F":
            raise ValueError(f"open_image: {name} has floating-point pixels: scale them to 8 bits")
    # the colours by way of RGBA are the same, and Pillow does not warn
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    with _one_error(name):
        return image if image.mode == "RGB" else image.convert("RGB")


def _turn_upright(image: Image.Image) -> Image.Image:
    """Follow the EXIF orientation."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DAMAGE:
        # a photograph with broken metadata is still a photograph
        return image
    if orientation not in _UPRIGHT:
        return image
    image = image.transpose(_UPRIGHT[orientation])
    for key in _ORIENTATION_KEYS:
        image.info.pop(key, None)
    return image


def _grey_8_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale 16-bit grey to 8 bits, rounding to nearest."""
    image = image.convert("I")
    low, high = cast(tuple[int, int], image.getextrema())
    if low < 0 or high > 65535:
        raise ValueError(f"open_image: {name} has grey {low} to {high}, wanted 0 to 65535")
    return image.point([(value + 128) // 257 for value in range(65536)], "L")


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
    if count < 1:
        raise ValueError(f"{function}: {name} must be an integer of at least 1, got {value!r}")
    return count


def _describe(value: object) -> str:
    return f"{value.mode} {value.size}" if isinstance(value, Image.Image) else type(value).__name__
