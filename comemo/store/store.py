"""Known pictures: image memories that are kept from one prompt to the next, and on a disk.

A picture's memory depends on the weights, its pixels and its tiling, not on the prompt. It is kept
under a digest of all three, so that the same picture is recognised wherever it turns up again, and
only where it may be.
"""

import errno
import math
import numbers
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from comemo.store import directory as store_directory
from comemo.store import files as store_files
from comemo.store.directory import BadFileError
from comemo.store.entries import build_pictures, count_bytes, move_to, own
from comemo.store.keys import (
    check_storable,
    describe_tensors,
    identify_model,
    identify_picture,
    stamp_weights,
)
from comemo_kernels import ImageMemory, join_images


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
    Its files are safe from accidents; whoever may write there can change answers, but nothing
    beyond: what is no file of a store's own form is left alone.

    Args:
        budget: bytes of what is held in memory, on the model's device. A larger picture is used
            and not held.
        directory: where pictures are kept as files too; made if there is none. Directory and files
            are for their owner alone (0700 and 0600), but a directory that was there stays as it
            is. None for no files.
        disk_budget: bytes of the files; None for no limit.

    Raises:
        ValueError: a budget that is no finite number from 0 on, or one of a disk without a
            directory; an empty `directory`.
        NotADirectoryError: `directory` is a file.
    """

    def __init__(
        self,
        budget: float = 2 * 2**30,
        directory: str | Path | None = None,
        disk_budget: float | None = None,
    ) -> None:
        if (
            not _is_size(budget)
            or not (disk_budget is None or _is_size(disk_budget))
            or (disk_budget is not None and directory is None)
        ):
            raise ValueError(
                "MemoryStore: budget and disk_budget must be finite numbers of bytes from 0 on, and"
                f" disk_budget needs a directory, got {budget!r}, {disk_budget!r} and {directory!r}"
            )
        if directory is not None and not store_directory.is_named(directory):
            raise ValueError(
                "MemoryStore: directory must be a path and not empty (of an unset variable?), the"
                f" current one '.', got {directory!r}"
            )
        self.budget, self.disk_budget = budget, disk_budget
        self.directory = None if directory is None else Path(directory)
        self._lock = threading.Lock()  # never held while anything is computed, hashed or read
        self._held: OrderedDict[str, ImageMemory] = OrderedDict()
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
            elif (image := self._fetch(key, facts, model, places[i])) is not None:
                images[key] = image
            else:
                unknown[key] = i
        if unknown:
            chosen = ([x[i] for i in unknown.values()] for x in (pixels, places))
            built = build_pictures(model, *chosen)
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

    def _fetch(
        self, key: str, facts: dict[str, str], model: Any, ids: Tensor
    ) -> ImageMemory | None:
        """A known picture, on the model's device; None if it has to be computed."""
        with self._lock:
            image = self._held.get(key)
            if image is not None:
                self._held.move_to_end(key)
                self._counts["hits"] += 1
        if image is None:
            image = self._read(key, facts, model, ids)
            if image is not None:
                image = self._hold(key, move_to(image, model.device))
            self._count("misses" if image is None else "disk_hits")
        elif self.directory is not None:
            store_directory.touch(self._path(key))  # it is in use, though not read
        return None if image is None else move_to(image, model.device)

    def _keep(self, key: str, image: ImageMemory, facts: dict[str, str]) -> ImageMemory:
        if self.directory is not None:
            self._write(self._path(key), image, {"key": key, **facts})
        return self._hold(key, image)

    def _write(self, path: Path, image: ImageMemory, facts: dict[str, str]) -> None:
        """Write a picture and remove others beyond the budget, if that can be."""
        try:
            if not store_files.write_image(path, image, facts, self.disk_budget):
                self._count("too_large")
                return
        except (OSError, BadFileError) as error:
            _warn(f"{path} cannot be written: {_reason(error)}")
            return
        try:
            if self.disk_budget is not None:
                store_directory.remove_beyond(path.parent, self.disk_budget)
        except OSError as error:
            _warn(f"{path.parent} exceeds its budget: {error.filename}: {_reason(error)}")

    def _hold(self, key: str, image: ImageMemory) -> ImageMemory:
        """Hold a picture in memory, if there is room for it."""
        if count_bytes(image) > self.budget:
            self._count("too_large")
            return image
        image = own(image)
        with self._lock:
            self._held[key] = image
            self._held.move_to_end(key)
            # Counted and not kept beside them: an interrupt would part the two.
            beyond = sum(map(count_bytes, self._held.values())) - self.budget
            while beyond > 0:
                beyond -= count_bytes(self._held.popitem(last=False)[1])
                self._counts["evictions"] += 1
        return image

    def _read(self, key: str, facts: dict[str, str], model: Any, ids: Tensor) -> ImageMemory | None:
        if self.directory is None:
            return None
        path = self._path(key)
        try:
            wanted = describe_tensors(model, len(ids))
            image = store_files.read_image(path, {"key": key, **facts}, wanted)
            assert image.ids is not None
            if not image.ids.equal(ids):
                raise BadFileError("its ids are those of another grid")
        except FileNotFoundError:
            return None
        except (OSError, BadFileError) as error:
            self._count("refused")
            _warn(f"{path} is refused and its picture computed again: {_reason(error)}")
            return None
        store_directory.touch(path)
        return image

    def _open(self, directory: Path) -> None:
        try:
            store_directory.make_directory(directory)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(
                errno.ENOTDIR, "MemoryStore: directory must be a directory, got", str(directory)
            ) from None
        except OSError as error:
            _warn(f"{directory} cannot be made: {_reason(error)}")
        store_directory.sweep(directory)

    def _path(self, key: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{key}{store_directory.ENDING}"

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _files(self) -> dict[str, int]:
        """Keys and sizes of the files."""
        if self.directory is None:
            return {}
        try:
            held = store_directory.list_files(self.directory)
            return {path.stem: status.st_size for path, status in held}
        except OSError:
            return {}

    @property
    def stats(self) -> StoreStatistics:
        """What has happened so far, and what is held now."""
        sizes = self._files().values()
        names = ("hits", "disk_hits", "misses", "evictions", "too_large", "refused")
        with self._lock:
            counts = {name: self._counts[name] for name in names}
            held = {
                "entries": len(self._held),
                "bytes": sum(map(count_bytes, self._held.values())),
            }
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
        if disk and self.directory is not None:
            store_directory.remove_beyond(self.directory, 0)


def _is_size(value: Any) -> bool:
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _reason(error: Exception) -> object:
    return getattr(error, "strerror", None) or error


def _warn(text: str) -> None:
    warnings.warn(f"MemoryStore: {text}", MemoryStoreWarning, stacklevel=2)
