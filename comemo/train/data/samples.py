"""From a JSON line to a sample: ids, labels, positions and tiles."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

import comemo_kernels as ops
from comemo.config import CoMemoConfig
from comemo.images import (
    MAX_TILES,
    Grid,
    choose_grid,
    open_image,
    read_size,
    split_tiles,
    stack_tiles,
)
from comemo.loss import IGNORED
from comemo.prompts import IMAGE_MARK
from comemo.train.data.encode import PromptEncoder
from comemo.train.data.faults import BadSample, is_of_machine
from comemo.train.data.frames import Video, choose_frames
from comemo.train.data.meta import Collection
from comemo.train.data.turns import Talk, read_talk, with_frames
from comemo.train.settings import DataSettings

QUALITIES = (75, 100)  # of JPEG, both included


@dataclass
class Sample:
    """One sample.

    Attributes:
        ids, labels, positions: int64 [N]; labels are not shifted, and -100 where nothing is learnt.
        weight: of each label in the loss.
        tiles: uint8 [T, 3, side, side], or None without images.
        grids: (cols, rows) of each image.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    weight: float
    tiles: np.ndarray | None
    grids: list[Grid]

    @property
    def size(self) -> tuple[int, int]:
        """Tokens and tiles."""
        return len(self.ids), 0 if self.tiles is None else len(self.tiles)


@dataclass(frozen=True)
class Size:
    """What a sample takes of a pack.

    Attributes:
        tokens, tiles, labels: how many.
        varies: whether another reading may give another size, as of a video.
    """

    tokens: int
    tiles: int
    labels: int
    varies: bool = False


class SampleReader:
    """Makes samples of lines; picklable, and without state between calls.

    Args:
        settings: of the data.
        tokenizer: of the model.
        config: of the model: template, tiling where the settings have None, numbering of positions.

    Raises:
        ValueError: settings that do not fit the model.
    """

    def __init__(
        self, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, config: CoMemoConfig
    ):
        self.settings = settings
        self.encoder = PromptEncoder(tokenizer, config.template, settings.published_text)
        self.input_size = config.vision_config.image_size[0]
        self.side, self.tokens_per_tile = config.side, config.tokens_per_tile
        self.rope, self.tile_order = config.rope, config.tile_order
        self.thumbnail = config.use_thumbnail
        if settings.use_thumbnail not in (None, config.use_thumbnail):
            got = f"{settings.use_thumbnail}, the model's config has {config.use_thumbnail}"
            raise ValueError(f"data: use_thumbnail must be that of the model, got {got}")
        self.most = settings.max_dynamic_patch or config.max_dynamic_patch
        self.fewest = settings.min_dynamic_patch or config.min_dynamic_patch
        self.tiled = config.dynamic_image_size
        if self.most > MAX_TILES:
            raise ValueError(
                f"data: max_dynamic_patch must be at most {MAX_TILES}, got {self.most}"
            )

    def read(
        self,
        collection: Collection,
        line: bytes,
        rng: np.random.Generator | None,
        augment: bool = False,
    ) -> Sample:
        """Read a sample.

        Args:
            collection: that the line belongs to.
            line: of its JSONL file.
            rng: draws frames of a video and augmentation; None for the middle frames.
            augment: whether each tile is compressed as JPEG of a random quality, 75 to 100, as
                published; needs `rng`.

        Raises:
            BadSample: what is wrong with the line, its images or its size.
            ValueError: `augment` without `rng`.
        """
        if augment and rng is None:
            raise ValueError("SampleReader.read: augment needs rng, got None")
        talk, video, chosen = self._open(collection, line, rng)
        quality = rng if augment else None
        if video is not None:
            frames = [_degrade(frame, quality) for frame in video.read(chosen)]
            size = (self.input_size, self.input_size)
            tiles = [frame.resize(size, Image.Resampling.BICUBIC) for frame in frames]
            grids = [(1, 1)] * len(tiles)
        else:
            tiles, grids = [], []
            limits = self._limits(collection, talk)
            for path in _image_paths(collection, talk):
                with _image_errors(path):
                    image = open_image(path, published=self.settings.published_pixels)
                    cut, grid = split_tiles(image, self.input_size, *limits, self.thumbnail)
                tiles += [_degrade(tile, quality) for tile in cut]
                grids.append(grid)
        ids, learnt, grids = self._compose(talk, grids)
        count = sum(map(self._tiles_of, grids))
        labels = np.where(learnt, ids, IGNORED)
        return Sample(
            ids,
            labels,
            self._number(ids, grids),
            weigh(self.settings.loss_weight, int(learnt.sum())),
            stack_tiles(tiles[:count]) if count else None,
            grids,
        )

    def measure(self, collection: Collection, line: bytes, rng: np.random.Generator | None) -> Size:
        """The size that `read` would give; of images only the headers are read.

        Args:
            collection, line, rng: see `read`.

        Raises:
            BadSample: as `read`, but for pixels that cannot be decoded.
        """
        talk, video, chosen = self._open(collection, line, rng)
        if video is not None:
            grids = [(1, 1)] * len(chosen)
        else:
            grids = []
            for path in _image_paths(collection, talk):
                with _image_errors(path):
                    size = read_size(path, published=self.settings.published_pixels)
                grids.append(choose_grid(*size, *self._limits(collection, talk), self.input_size))
        try:
            ids, learnt, grids = self._compose(talk, grids)
        except BadSample as fault:
            fault.varies = video is not None
            raise
        tiles = sum(map(self._tiles_of, grids))
        return Size(len(ids), tiles, int(learnt.sum()), video is not None)

    def _open(
        self, collection: Collection, line: bytes, rng: np.random.Generator | None
    ) -> tuple[Talk, Video | None, list[int]]:
        """The conversation and, of a video, the chosen frames, with marks for them."""
        talk = read_talk(line)
        if talk.video is None:
            _check_marks(talk, len(talk.images or []))
            return talk, None, []
        paths = talk.video if isinstance(talk.video, list) else [talk.video]
        paths = [os.path.join(collection.root, path) for path in paths]
        for path in paths:
            if not os.path.exists(path):
                raise BadSample("image missing", f"there is no {path!r}")
        source = paths if isinstance(talk.video, list) else paths[0]
        video = Video(source, talk.clip, self.settings.published_pixels)
        low, high = self.settings.min_frames, self.settings.max_frames
        chosen = choose_frames(video.length, rng, low, high)
        talk.turns = with_frames(talk.turns, len(chosen))
        _check_marks(talk, len(chosen))
        return talk, video, chosen

    def _limits(self, collection: Collection, talk: Talk) -> tuple[int, int]:
        """Fewest and most tiles of each image."""
        if not self.tiled:
            return 1, 1
        most = max((collection.max_tiles or self.most) // max(len(talk.images or []), 1), 1)
        return min(self.fewest, most), most

    def _tiles_of(self, grid: Grid) -> int:
        return ops.image_tokens(grid, self.side, self.thumbnail) // self.tokens_per_tile

    def _compose(
        self, talk: Talk, grids: Sequence[Grid]
    ) -> tuple[np.ndarray, np.ndarray, list[Grid]]:
        """Ids and whether each is learnt, [N], and the grids of the images that are in them."""
        try:
            ids, learnt = self.encoder.encode(talk.turns, talk.system)
        except ValueError as error:
            raise BadSample("wrong value", str(error)) from None
        repeats = np.ones(len(ids), np.int64)
        images = ids == self.encoder.context
        if images.sum() != len(grids):
            got = f"{images.sum()} for {len(grids)} images"
            raise BadSample("marks and images differ", f"wanted one image token each, got {got}")
        sizes = [self._tiles_of(grid) * self.tokens_per_tile for grid in grids]
        repeats[images] = sizes
        ids, learnt = np.repeat(ids, repeats), np.repeat(learnt, repeats)
        settings, kept = self.settings, list(grids)
        limit = min(settings.max_sample_tokens, settings.max_tokens)
        if settings.too_long == "refuse" and len(ids) > settings.max_sample_tokens:
            most = f"at most max_sample_tokens = {settings.max_sample_tokens}"
            raise BadSample("too long", f"wanted {most}, got {len(ids)} tokens")
        if settings.too_long == "cut" and len(ids) > limit:
            ids, learnt, kept = self._cut(ids, learnt, kept, limit)
        tiles = sum(map(self._tiles_of, kept))
        if len(ids) > settings.max_tokens or tiles > settings.max_tiles:
            most = f"at most {settings.max_tokens} tokens and {settings.max_tiles} tiles"
            got = f"{len(ids)} tokens and {tiles} tiles"
            raise BadSample("larger than a pack", f"wanted {most}, got {got}")
        if not learnt.any():
            raise BadSample("no label", "wanted an answer with tokens, got none")
        return ids, learnt, kept

    def _cut(
        self, ids: np.ndarray, learnt: np.ndarray, grids: list[Grid], limit: int
    ) -> tuple[np.ndarray, np.ndarray, list[Grid]]:
        images = ids == self.encoder.context
        if images[limit - 1] or images[limit]:
            got = f"{len(ids)} tokens with an image at token {limit}"
            raise BadSample("cut through an image", f"wanted text where it is cut, got {got}")
        if not learnt[:limit].any():
            got = f"no answer in the first {limit} of {len(ids)} tokens"
            raise BadSample("cut leaves no label", f"wanted labels, got {got}")
        sizes = [self._tiles_of(grid) * self.tokens_per_tile for grid in grids]
        whole = int(np.searchsorted(np.cumsum(sizes), images[:limit].sum(), side="right"))
        return ids[:limit], learnt[:limit], grids[:whole]

    def _number(self, ids: np.ndarray, grids: list[Grid]) -> np.ndarray:
        """Position ids [N] as the model numbers this prompt."""
        if not grids or self.rope == "original":
            return np.arange(len(ids))
        mask = torch.from_numpy(ids == self.encoder.context)[None]
        every = torch.ones_like(mask)
        return ops.rope_dhr_positions(
            mask, every, grids, self.side, self.tile_order, self.thumbnail
        )[0].numpy()


def weigh(rule: str, labels: int) -> float:
    """The weight of each label of a sample: "token" 1, "sample" 1/n, "square" 1/sqrt(n).

    Args:
        rule: one of these.
        labels: n, at least 1.

    Raises:
        ValueError: an unknown rule.
    """
    powers = {"token": 0.0, "sample": 1.0, "square": 0.5}
    if rule not in powers:
        raise ValueError(f"data: loss_weight must be one of {list(powers)}, got {rule!r}")
    return 1 / labels ** powers[rule]


def _check_marks(talk: Talk, images: int) -> None:
    outside = [answer for _, answer in talk.turns] + [talk.system or ""]
    if any(IMAGE_MARK in text for text in outside):
        where = "an answer or the system message"
        raise BadSample("marks and images differ", f"wanted {IMAGE_MARK} in questions, got {where}")
    marks = sum(question.count(IMAGE_MARK) for question, _ in talk.turns)
    if marks != images:
        got = f"{marks} for {images}"
        raise BadSample("marks and images differ", f"wanted one {IMAGE_MARK} per image, got {got}")


def _image_paths(collection: Collection, talk: Talk) -> list[str]:
    return [os.path.join(collection.root, path) for path in talk.images or []]


def _degrade(tile: Image.Image, rng: np.random.Generator | None) -> Image.Image:
    """A tile after JPEG compression of a random quality."""
    if rng is None:
        return tile
    low, high = QUALITIES
    file = io.BytesIO()
    tile.save(file, format="JPEG", quality=int(rng.integers(low, high + 1)))
    with Image.open(file) as image:
        image.load()
        return image


class _image_errors:
    """What opening an image raises, as a `BadSample`."""

    def __init__(self, path: str):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if is_of_machine(error):
            return
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise BadSample("image missing", f"there is no {self.path!r}") from None
        if isinstance(error, (ValueError, OSError)):
            raise BadSample("image broken", str(error)) from None
