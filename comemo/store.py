"""Known pictures: image memories that are kept from one prompt to the next, and on a disk.

A picture's memory depends on the weights, its pixels and its tiling, not on the prompt. It is kept
under a digest of all three, so that the same picture is recognised wherever it turns up again, and
only where it may be.
"""

import errno
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from comemo import store_files as files
from comemo.store_keys import check_storable, identify_model, identify_picture, stamp_weights
from comemo_kernels import ImageMemory, join_images, split_images


class MemoryStoreWarning(UserWarning):
    """A file of a store is bad, or none can be written; answers come all the same."""


@dataclass(frozen=True)
class StoreStatistics:
    """What a `MemoryStore` has done since it was made, and what it holds now.

    Attributes:
        hits: pictures found in memory, or seen earlier in the same call.
        disk_hits: pictures read from the directory.
        misses: pictures that had to be computed.
        evictions: pictures that had to leave memory for others.
        too_large: pictures that exceeded a budget by themselves, of memory or of disk.
        refused: files that were bad.
        entries, bytes: pictures held in memory.
        disk_entries, disk_bytes: files in the directory, whoever wrote them.
    """

    hits: int
    disk_hits: int
    misses: int
    evictions: int
    too_large: int
    refused: int
    entries: int
    bytes: int
    disk_entries: int
    disk_bytes: int


class MemoryStore:
    """Image memories of pictures that were seen before, those in use longest ago given up first.

    To be handed to `chat`, `generate` or `CoMemoModel.build_image_memory` as `memory_store`, to
    one model or several, from any number of threads. Several processes may share a directory.
    Its files are safe from accidents; whoever may write there can change answers.

    Args:
        budget: bytes of what is held in memory, on the model's device. A larger picture is used
            and not held.
        directory: where pictures are kept as files too; made if there is none. None for no files.
        disk_budget: bytes of the files; None for no limit.

    Raises:
        ValueError: a negative budget, or one of a disk without a directory.
        NotADirectoryError: `directory` is a file.
    """

    def __init__(
        self,
        budget: int = 2 * 2**30,
        directory: str | Path | None = None,
        disk_budget: int | None = None,
    ) -> None:
        if budget < 0 or (disk_budget or 0) < 0 or (disk_budget is not None and directory is None):
            raise ValueError(
                "MemoryStore: budget and disk_budget must not be negative, and disk_budget needs a"
                f" directory, got {budget}, {disk_budget} and {directory}"
            )
        self.budget, self.disk_budget = budget, disk_budget
        self.directory = None if directory is None else Path(directory)
        self._lock = threading.Lock()  # never held while anything is computed, hashed or read
        self._held: OrderedDict[str, ImageMemory] = OrderedDict()
        self._bytes = 0
        self._counts: Counter[str] = Counter()
        self._identities: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()
        if self.directory is not None:
            self._open(self.directory)

    def image_memory(
        self,
        model: Any,
        pixel_values: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        sizes: Sequence[int] | None = None,
    ) -> ImageMemory:
        """Memory of a batch of prompts, of which only unknown pictures are computed.

        Keys and values of all mixin layers are in it. No gradients reach the model.

        Args:
            model: a `CoMemoModel`.
            pixel_values: [T, 3, side, side], all prompts' tiles in reading order.
            position_ids: [M] ids of the image tokens in their prompts.
            lengths: image tokens of each prompt.
            sizes: image tokens of each picture; None takes each prompt's pictures for one.

        Returns:
            What `ImageMemory.from_media` makes, built. Of a single picture its tensors are those
            of the store: not to be written.

        Raises:
            ValueError: a model whose weights do not say what it computes (adapters, quantised,
                sharded or offloaded weights), or with absolute memory positions; pictures that
                are no whole tiles. Nothing was computed then.
        """
        check_storable(model)
        # Of use to whoever asks next, also with gradients.
        with torch.inference_mode(False), torch.no_grad():
            position_ids = position_ids.to(model.device)
            memory = ImageMemory.from_media(position_ids[:, None], position_ids, lengths, sizes)
            tokens = model.config.tokens_per_tile
            tiles = [size // tokens for size in memory.sizes]
            if [count * tokens for count in tiles] != list(memory.sizes):
                raise ValueError(
                    f"MemoryStore: pictures must be whole tiles of {tokens} image tokens, got"
                    f" {list(memory.sizes)}"
                )
            assert memory.ids is not None
            places = memory.ids.cpu().split(list(memory.sizes))
            pixels = pixel_values.to(model.dtype).split(tiles)
            joined = join_images(self._images(model, pixels, places))
            memory.media, memory.keys, memory.values = joined.media, joined.keys, joined.values
        return memory

    def _images(
        self, model: Any, pixels: Sequence[Tensor], places: Sequence[Tensor]
    ) -> list[ImageMemory]:
        """The memory of each picture, known or computed."""
        facts = {"model": self._identify(model), "dtype": str(model.dtype).removeprefix("torch.")}
        keys = [
            identify_picture(facts["model"], tiles, ids)
            for tiles, ids in zip(pixels, places, strict=True)
        ]
        images: dict[str, ImageMemory] = {}
        unknown: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key in images or key in unknown:
                self._count("hits")
            elif (image := self._fetch(key, facts, model.device)) is not None:
                images[key] = image
            else:
                unknown[key] = i
        if unknown:
            built = _build(model, *([x[i] for i in unknown.values()] for x in (pixels, places)))
            for key, image in zip(unknown, built, strict=True):
                images[key] = self._keep(key, image, facts)
        return [images[key] for key in keys]

    def _identify(self, model: Any) -> str:
        stamp = stamp_weights(model)
        with self._lock:
            known = self._identities.get(model)
        if known is None or known[0] != stamp:
            known = stamp, identify_model(model)
            with self._lock:
                self._identities[model] = known
        return known[1]

    def _fetch(self, key: str, facts: dict[str, str], device: torch.device) -> ImageMemory | None:
        """A known picture, on the device; None if it has to be computed."""
        with self._lock:
            image = self._held.get(key)
            if image is not None:
                self._held.move_to_end(key)
                self._counts["hits"] += 1
        if image is None:
            image = self._read(key, facts)
            if image is not None:
                image = self._hold(key, _to(image, device))
            self._count("misses" if image is None else "disk_hits")
        elif self.directory is not None:
            files.touch(self._path(key))  # it is in use, though not read
        return None if image is None else _to(image, device)

    def _keep(self, key: str, image: ImageMemory, facts: dict[str, str]) -> ImageMemory:
        if self.directory is not None:
            path = self._path(key)
            try:
                if not files.write_image(path, image, {"key": key, **facts}, self.disk_budget):
                    self._count("too_large")
                elif self.disk_budget is not None:
                    files.remove_beyond(self.directory, self.disk_budget)
            except OSError as error:
                _warn(f"{path} cannot be written: {error.strerror or error}")
        return self._hold(key, image)

    def _hold(self, key: str, image: ImageMemory) -> ImageMemory:
        """Hold a picture in memory, if there is room for it."""
        if _nbytes(image) > self.budget:
            self._count("too_large")
            return image
        image = _own(image)
        with self._lock:
            if key in self._held:  # computed twice at once
                self._bytes -= _nbytes(self._held.pop(key))
            self._held[key] = image
            self._bytes += _nbytes(image)
            while self._bytes > self.budget:
                self._bytes -= _nbytes(self._held.popitem(last=False)[1])
                self._counts["evictions"] += 1
        return image

    def _read(self, key: str, facts: dict[str, str]) -> ImageMemory | None:
        if self.directory is None:
            return None
        path = self._path(key)
        try:
            image = files.read_image(path, {"key": key, **facts})
        except FileNotFoundError:
            return None
        except (OSError, files.BadFileError) as error:
            self._count("refused")
            reason = getattr(error, "strerror", None) or error
            _warn(f"{path} is refused and its picture computed again: {reason}")
            return None
        files.touch(path)
        return image

    def _open(self, directory: Path) -> None:
        if directory.exists() and not directory.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, "MemoryStore: directory must be a directory, got", str(directory)
            )
        try:
            directory.mkdir(parents=True, exist_ok=True)
            files.sweep(directory)
        except (FileExistsError, NotADirectoryError):
            raise
        except OSError as error:
            _warn(f"{directory} cannot be made: {error.strerror or error}")

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}{files.ENDING}"

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _files(self) -> dict[str, int]:
        """Keys and sizes of the files."""
        if self.directory is None:
            return {}
        try:
            return {path.stem: at.st_size for path, at in files.list_files(self.directory)}
        except OSError:
            return {}

    @property
    def stats(self) -> StoreStatistics:
        """What has happened so far, and what is held now."""
        sizes = self._files().values()
        names = ("hits", "disk_hits", "misses", "evictions", "too_large", "refused")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            held = {"entries": len(self._held), "bytes": self._bytes}
        return StoreStatistics(**counts, **held, disk_entries=len(sizes), disk_bytes=sum(sizes))

    def __iter__(self) -> Iterator[str]:
        """Keys of all known pictures: those that only the directory has, then those in memory."""
        on_disk = self._files()
        with self._lock:
            held = list(self._held)
        return iter([*(key for key in on_disk if key not in held), *held])

    def __len__(self) -> int:
        """How many pictures are known, in memory and in the directory."""
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        with self._lock:
            if key in self._held:
                return True
        return key in self._files()

    def clear(self, disk: bool = False) -> None:
        """Give up what is held in memory.

        Args:
            disk: remove the files too.

        Raises:
            OSError: a file that cannot be removed.
        """
        with self._lock:
            self._held.clear()
            self._bytes = 0
        if disk and self.directory is not None:
            files.remove_beyond(self.directory, 0)


def _build(model: Any, pixels: list[Tensor], places: list[Tensor]) -> list[ImageMemory]:
    """Memories of pictures, by one pass of the vision tower and one of the projections."""
    media = model.project_images(torch.cat(pixels).to(model.device)).flatten(0, 1)
    sizes = [len(ids) for ids in places]
    memory = ImageMemory.from_media(media, torch.cat(places), [sum(sizes)], sizes)
    if not model.language_model.build_memory(memory):
        raise ValueError(
            "MemoryStore: keys and values of all mixin layers must be built at once, got media of"
            f" {media.dtype} on {media.device} for weights of {model.dtype} on {model.device}"
        )
    memory.table = None  # of the model, and not a picture's
    return split_images(memory)


def _tensors(image: ImageMemory) -> list[Tensor]:
    held = (image.media, image.ids, *image.keys.values(), *image.values.values())
    return [tensor for tensor in held if tensor is not None]


def _nbytes(image: ImageMemory) -> int:
    return sum(tensor.nbytes for tensor in _tensors(image))


def _own(image: ImageMemory) -> ImageMemory:
    """The picture; a copy if its storage holds others too, whose bytes nobody would count."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(image)}
    if sum(storage.nbytes() for storage in storages.values()) <= _nbytes(image):
        return image
    return _each(image, Tensor.clone)


def _to(image: ImageMemory, device: torch.device) -> ImageMemory:
    assert image.media is not None
    return image if image.media.device == device else _each(image, lambda t: t.to(device))


def _each(image: ImageMemory, change: Callable[[Tensor], Tensor]) -> ImageMemory:
    """The picture with other tensors."""
    media, ids, starts, biases = (
        None if t is None else change(t)
        for t in (image.media, image.ids, image.starts, image.biases)
    )
    keys = {layer: change(key) for layer, key in image.keys.items()}
    values = {layer: change(value) for layer, value in image.values.items()}
    changed = replace(image, media=media, ids=ids, starts=starts, biases=biases)
    return replace(changed, keys=keys, values=values)


def _warn(text: str) -> None:
    warnings.warn(f"MemoryStore: {text}", MemoryStoreWarning, stacklevel=2)
