"""Frames of a video: of a list of files, a folder, an animated image, or a video file (PyAV)."""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from comemo.images import open_image
from comemo.safety.regular import check_regular
from comemo.train.data.faults import BadSample, is_of_machine

KIND = "video unreadable"


class Video:
    """A video whose frames can be counted before they are decoded.

    Args:
        path: of a folder, whose visible files are frames in natural order, of an animated image
            that Pillow reads, or of a video file; or a list of paths of frames.
        clip: seconds from and to, of a video file.
        published: see `open_image`.

    Attributes:
        length: number of frames.

    Raises:
        BadSample: it cannot be read, or only with PyAV, which is not installed.
    """

    def __init__(
        self,
        path: str | list[str],
        clip: tuple[float, float] | None = None,
        published: bool = False,
    ):
        self.path, self.published = path, published
        self.files: list[str] = []
        self.first = 0
        with _readable(path):
            self._read = self._choose_reader(path, clip)
        if self.length < 1:
            raise BadSample(KIND, f"wanted a video with frames, got none in {path!r}")

    def read(self, indices: list[int]) -> list[Image.Image]:
        """Decode frames.

        Args:
            indices: ascending, below `length`.

        Returns:
            RGB images, one per index.

        Raises:
            BadSample: a frame that cannot be decoded.
        """
        with _readable(self.path):
            return self._read(indices)

    def _choose_reader(
        self, path: str | list[str], clip: tuple[float, float] | None
    ) -> Callable[[list[int]], list[Image.Image]]:
        if isinstance(path, list) or os.path.isdir(path):
            self.files = path if isinstance(path, list) else _frames_of(path)
            self.length = len(self.files)
            reader = self._read_files
        else:
            check_regular("video", path)
            count = _count_animation(path)
            if count is None:
                self.first, self.length = _count_video(path, clip)
                return self._read_video
            self.length, reader = count, self._read_animation
        if clip is not None:
            raise BadSample(KIND, f"clip needs a video file, got {path!r}")
        return reader

    def _read_files(self, indices: list[int]) -> list[Image.Image]:
        return [open_image(self.files[index], published=self.published) for index in indices]

    def _read_animation(self, indices: list[int]) -> list[Image.Image]:
        frames = []
        with Image.open(str(self.path)) as image:
            for index in indices:
                image.seek(index)
                image.load()
                frames.append(image.convert("RGB"))
        return frames

    def _read_video(self, indices: list[int]) -> list[Image.Image]:
        wanted, frames = {self.first + index for index in indices}, []
        with _open_video(str(self.path)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number in wanted:
                    frames.append(frame.to_image())
                if number >= self.first + indices[-1]:
                    break
        if len(frames) != len(indices):
            got = f"{len(frames)} of {len(indices)} frames"
            raise BadSample(KIND, f"wanted a whole video, got {got} from {self.path!r}")
        return frames


def choose_frames(length: int, rng: np.random.Generator | None, low: int, high: int) -> list[int]:
    """Choose frames as the published code does.

    Args:
        length: frames of the video.
        rng: draws how many frames, and one of each interval; None takes the most, and the middle
            of each.
        low, high: fewest and most frames; a shorter video gives all its frames.

    Returns:
        Ascending indices.
    """
    number = high if rng is None else int(rng.integers(low, high + 1))
    if length <= number:
        return list(range(length))
    bounds = np.linspace(0, length, number + 1).astype(int)
    first, last = bounds[:-1], bounds[1:] - 1
    if rng is None:
        return ((first + last) // 2).tolist()
    if (first == last).any():  # published: no last frame of an interval, so these have none
        return sorted(rng.permutation(length)[:number].tolist())
    return [int(rng.integers(low, high)) for low, high in zip(first, last, strict=True)]


class _readable:
    """Every error of a decoder becomes a `BadSample`."""

    def __init__(self, path: Any):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BadSample) or is_of_machine(error):
            return
        if isinstance(error, Exception):
            got = f"{self.path!r}: {type(error).__name__}: {error}"
            raise BadSample(KIND, f"wanted a video, got {got}") from error


def _frames_of(folder: str) -> list[str]:
    names = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]

    def natural(name: str) -> list[Any]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    return [os.path.join(folder, name) for name in sorted(names, key=natural)]


def _count_animation(path: str) -> int | None:
    """Frames of an image file; None if Pillow cannot read it."""
    with suppress(UnidentifiedImageError), Image.open(path) as image:
        return getattr(image, "n_frames", 1)
    return None


def _count_video(path: str, clip: tuple[float, float] | None) -> tuple[int, int]:
    """First frame and number of frames; packets are counted, nothing is decoded."""
    with _open_video(path) as container:
        stream = container.streams.video[0]
        length = sum(packet.size > 0 for packet in container.demux(stream))
        if clip is None:
            return 0, length
        rate = float(stream.average_rate)
    first = int(clip[0] * rate)
    return first, min(int((clip[1] - clip[0]) * rate), length - first)


def _open_video(path: str) -> Any:
    try:
        import av
    except ImportError:
        wanted = "an image that Pillow reads, or PyAV installed (pip install av)"
        raise BadSample(KIND, f"wanted {wanted}, got {path!r}") from None
    return av.open(path)
