"""A colour scale for heat maps, and a heat map painted over a picture.

The scale is viridis (Stefan van der Walt and Nathaniel Smith, in the public domain by CC0): equal
steps look equally large, also in grey and to people who see colours otherwise.
"""

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

# Equally far apart, from the least to the most; between them colours are mixed.
VIRIDIS = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 144, 141),
    (39, 173, 129),
    (93, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
# How much of a colour is the scale's; the rest is the picture's in grey, of less contrast, so that
# a level has about the same colour everywhere.
OPACITY, CONTRAST = 0.72, 0.8


def on_grey(levels: np.ndarray, grey: np.ndarray) -> Image.Image:
    """The colours of levels, mixed with grey.

    Args:
        levels: floating point [height, width], from 0 to 1; others are cut off.
        grey: [height, width], from 0 to 255.

    Returns:
        An image of mode RGB.
    """
    stops = np.linspace(0, 1, len(VIRIDIS))
    channels = [np.interp(levels, stops, channel) for channel in zip(*VIRIDIS, strict=True)]
    mixed = OPACITY * np.stack(channels, -1) + (1 - OPACITY) * (
        128 + CONTRAST * (grey[..., None] - 128)
    )
    return Image.fromarray(mixed.round().astype(np.uint8))


def paint_heat(
    picture: Image.Image, cells: Tensor, top: float, size: tuple[int, int] | None = None
) -> Image.Image:
    """Paint a heat map over a picture, which shows through in grey.

    Args:
        picture: of mode RGB.
        cells: floating point [height, width], at least 0, over the whole picture.
        top: the heat that has the last colour, above 0; more has it too.
        size: width and height in pixels; None for the picture's own.

    Returns:
        An image of mode RGB. Between the middles of cells heat is interpolated.

    Raises:
        ValueError: cells that are not [height, width], or a top that is not above 0.
    """
    if cells.ndim != 2 or not cells.numel() or not top > 0:
        raise ValueError(
            "paint_heat: cells must be [height, width], not empty, and top above 0, got"
            f" {tuple(cells.shape)} and {top}"
        )
    size = picture.size if size is None else size
    heat = Image.fromarray(cells.detach().cpu().float().numpy() / top)
    levels = np.asarray(heat.resize(size, Image.Resampling.BILINEAR))
    return on_grey(levels, np.asarray(ImageOps.grayscale(picture).resize(size), float))
