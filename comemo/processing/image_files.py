"""From an image file in any form to an upright RGB image."""

import io
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias, Union, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from comemo.processing import base64_images as encoded
from comemo.safety.regular import check_regular

if TYPE_CHECKING:  # torch takes seconds to import, and files do not need it
    from torch import Tensor

Source: TypeAlias = Union[str, os.PathLike[str], bytes, BinaryIO, Image.Image, np.ndarray, "Tensor"]

# Longer text is not a path on any system, and may be the data of an image: it is not opened
LONGEST_NAME, LONGEST_PATH = 255, 4096

# What Pillow's decoders raise for damaged bytes, depending on the format and the position
_DAMAGE: tuple[type[Exception], ...] = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
)
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
_SIDEWAYS = (5, 6, 7, 8)
# where Pillow finds an orientation: an image must not be turned twice
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class ImageTooLargeError(ValueError):
    """An image with more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""


def open_image(source: Source, *, published: bool = False, convert_rgb: bool = True) -> Image.Image:
    """Read an image as upright 8-bit RGB.

    Of an animation, the first frame. Transparency is dropped and the stored colours are kept, as
    for the published checkpoints; if that matters, compose the image with a background first.

    Args:
        source: path, bytes of a file, binary file object (left open), Pillow image, uint8 array or
            tensor [height, width], [height, width, 3] or [3, height, width], or a file as text: a
            `data:` URL or plain base64. If a shape fits both orders, an array is read with its
            channels last, a tensor with its channels first. Mode `I` is read as 16-bit grey.
        published: exactly the pixels of the published code: the EXIF orientation is ignored, and
            16-bit grey is clipped at 255 (nearly white) instead of scaled to 8 bits.
        convert_rgb: False refuses images of another mode than RGB.

    Returns:
        A decoded image of mode RGB that holds no file. A Pillow image that is upright RGB already
        is returned itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a directory, pipe or device; a URL of any other kind (nothing is downloaded, and
            `file:` is not followed: pass the path); a wrong type; text longer than the bound of
            `base64_images`; not an image, damaged, without pixels, or larger than
            `PIL.Image.MAX_IMAGE_PIXELS` (refused before decoding); grey with an unknown white. No
            error repeats the data of an image.
    """
    if isinstance(source, Image.Image):
        name = f"the Pillow image ({source.mode}, {source.width} x {source.height})"
        return _decode(source, name, published, convert_rgb)
    if isinstance(source, np.ndarray) or is_tensor(source):
        name = "the tensor" if is_tensor(source) else "the array"
        return _decode(_from_array(source, name), name, published, convert_rgb)
    with _binary(source) as (stream, name):
        with _one_error(name):
            image = Image.open(stream)
        # leaving the block releases the stream; the pixels stay
        with image:
            return _decode(image, name, published, convert_rgb)


def read_size(
    source: str | os.PathLike[str] | bytes, *, published: bool = False
) -> tuple[int, int]:
    """Read the size that `open_image` gives an image, without decoding it.

    A PNG without EXIF data before its pixels is decoded, because they may follow.

    Args:
        source: path or bytes of a file.
        published: whether the EXIF orientation is ignored.

    Returns:
        (width, height) in pixels, upright.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as `open_image`, but for damage after the header.
    """
    with _binary(source) as (stream, name):
        with _one_error(name):
            image = Image.open(stream)
        with image:
            _check_header(image, name)
            width, height = image.size
            if published:
                return width, height
            try:
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            except _DAMAGE:
                return width, height
            return (height, width) if orientation in _SIDEWAYS else (width, height)


@contextmanager
def _binary(
    source: str | os.PathLike[str] | bytes | BinaryIO,
) -> Iterator[tuple[BinaryIO, str]]:
    """Yield a binary stream and its name for messages; close only what was opened here."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source), f"a file of {len(source)} bytes"
    elif isinstance(source, str) and (
        encoded.is_data_url(source) or encoded.is_base64_image(source)
    ):
        data = encoded.decode_base64(source, "open_image")
        yield io.BytesIO(data), f"a file of {len(data)} bytes, given as base64,"
    elif isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        name = repr(path)
        if re.match(r"(?:[A-Za-z][A-Za-z0-9+.-]*://|file:)", path):
            local = path[:5].lower() == "file:"
            advice = "pass the path alone" if local else "download the image"
            raise ValueError(f"open_image: reads no URL, {advice}: got {name:.80}")
        if len(os.path.basename(path)) > LONGEST_NAME or len(path) > LONGEST_PATH:
            got = f"{name:.40}... of {len(path)} characters"
            raise ValueError(f"open_image: wanted the path of an image file, got {got}")
        if "\0" in path or os.path.isdir(path):
            raise ValueError(f"open_image: wanted the path of an image file, got {name}")
        check_regular("open_image", path)
        with open(path, "rb") as stream:
            yield stream, name
    elif hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        yield source, f"the file object {getattr(source, 'name', '')!r}"
    else:
        wanted = "a path, bytes, a binary file object, a Pillow image or a uint8 array or tensor"
        raise ValueError(f"open_image: source must be {wanted}, got {type(source).__name__}")


@contextmanager
def _one_error(name: str) -> Iterator[None]:
    """Turn every error that Pillow raises for an image into a ValueError."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(f"open_image: {name} is too large: {error}") from error
    except UnidentifiedImageError as error:
        reason = "is not an image that Pillow can read, or its header is damaged"
        raise ValueError(f"open_image: {name} {reason}") from error
    except _DAMAGE as error:
        # an error with an errno comes from the disk, not from the image
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = "cannot be decoded, it may be cut off or damaged"
        raise ValueError(f"open_image: {name} {reason}: {error}") from error


def is_tensor(value: object) -> bool:
    """Whether it is a tensor: without torch there is none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _from_array(array: Any, name: str) -> Image.Image:
    """View an array or a tensor as an image."""
    shape = tuple(array.shape)
    kind = str(array.dtype).removeprefix("torch.")
    axis = _channels_axis(array) if len(shape) in (2, 3) else None
    if kind != "uint8" or 0 in shape or axis is None:
        wanted = "uint8 [height, width] or, with colours, [height, width, 3] or [3, height, width]"
        raise ValueError(
            f"open_image: {name} must be {wanted}, with pixels, got {kind} {list(shape)}"
        )
    pixels = array.detach().cpu().numpy() if is_tensor(array) else array
    return Image.fromarray(pixels if axis == 2 else pixels.transpose(1, 2, 0))


def _channels_axis(array: Any) -> int | None:
    """The axis of the three channels: 0 or 2; 2 for grey without channels; None if none fits."""
    if array.ndim == 2:
        return 2
    axes = (0, 2) if is_tensor(array) else (2, 0)
    return next((axis for axis in axes if array.shape[axis] == 3), None)


def _decode(image: Image.Image, name: str, published: bool, convert_rgb: bool) -> Image.Image:
    """Decode the pixels and turn them into upright RGB."""
    _check_header(image, name)
    with _one_error(name):
        image.load()
    if image.mode != "RGB" and not convert_rgb:
        wanted = "wanted mode RGB, because convert_rgb is False"
        raise ValueError(f"open_image: {name}: {wanted}, got mode {image.mode}")
    if not published:
        image = _turn_upright(image)
        if image.mode in _GREY_16:
            image = _grey_8_bit(image, name)
        elif image.mode == "F":
            raise ValueError(f"open_image: {name} has floating-point pixels: scale them to 8 bits")
    # by way of RGBA the colours are the same, and Pillow does not warn
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    with _one_error(name):
        return image if image.mode == "RGB" else image.convert("RGB")


def _check_header(image: Image.Image, name: str) -> None:
    if 0 in image.size:
        raise ValueError(f"open_image: {name} has no pixels: {image.width} x {image.height}")
    if isinstance(image, ImageFile.ImageFile):
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            wanted = (
                f"wanted at most PIL.Image.MAX_IMAGE_PIXELS = {limit} (raise it for a trusted file)"
            )
            got = f"{image.width} x {image.height}"
            raise ImageTooLargeError(f"open_image: {name} is too large: {wanted}, got {got}")
        if image.format == "EPS":
            raise ValueError(f"open_image: {name} is PostScript, a program and not an image")


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
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
