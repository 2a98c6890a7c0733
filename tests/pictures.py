"""Photographs and files of pictures that several test files use."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest

SKIMAGE = importlib.util.find_spec("skimage")
if SKIMAGE is None or SKIMAGE.origin is None:
    pytest.skip("scikit-image ships the photographs", allow_module_level=True)

PHOTOGRAPHS = Path(SKIMAGE.origin).parent / "data"
COFFEE, ROCKET, CAT = (PHOTOGRAPHS / n for n in ("coffee.png", "rocket.jpg", "chelsea.png"))


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image.convert("RGB"))
