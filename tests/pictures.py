"""Photographs and files of pictures that several test files use."""

import io
from pathlib import Path

import numpy as np
import pytest

datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn ships the photographs")
skimage = pytest.importorskip("skimage", reason="scikit-image ships the photographs")

CHINA, FLOWER = (
    Path(datasets.__path__[0]) / "images" / name for name in ("china.jpg", "flower.jpg")
)
SKIMAGE = Path(skimage.__file__).parent / "data"


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(image):
    return np.asarray(image.convert("RGB"))
