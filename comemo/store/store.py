"""A cache of image memories, from one prompt to the next, in memory and on disk.

The memory of an image depends on the weights, its pixels and its tiling, not on the prompt. Its key
is a digest of all three: the same image is found again in any prompt, but never for another model.
"""

import errno
import math
import numbers
import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from comemo.memory.parts import (
    StorableModel,
    check_storable,
    memory_layout,
    memory_places,
    memory_settings,
    memory_weights,
)
from comemo.store import directory as store_directory
from comemo.store import files as store_files
from comemo.store.directory import BadFileError
from comemo.store.keys import identify_image, identify_model, stamp_model
from comemo.store.statistics import COUNTED, StoreStatistics
from comemo.store.tensors import count_bytes, move_to, own_storage
from comemo_kernels import ImageMemory, join_images


class MemoryStoreWarning(UserWarning):
    """A file of a store is bad, or a file cannot be written; answers are not affected."""


class MemoryStore:
    """A cache of image memories; the least recently used ones are removed first.

    Pass it to `chat`, `generate` or `CoMemoModel.build_image_memory` as `memory_store`, for one
    model or several, from any number of threads. Several processes may share a directory. Files
    are checked against accidents. Whoever may write to the directory can change answers, but do
    nothing else: entries that are not files of this store are left alone.

    Args:
        budget: bytes held in memory, on the model's device. A larger image is used but not held.
        directory: where images are kept as files too; created if it does not exist. Only the owner
            may read directory and files (0700 and 0600); an existing directory keeps its mode.
            None for no files.
        disk_budget: bytes of the files; None for no limit.

    Raises:
        ValueError: a budget that is not a finite number of at least 0, or a disk budget without a
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
                "MemoryStore: budget and disk_budget must be finite numbers of bytes, at least 0,"
                f" and disk_budget needs a directory, got {budget!r}, {disk_budget!r} and"
                f" {directory!r}"
            )
        if directory is not None and not store_directory.is_named(directory):
            raise ValueError(
                "MemoryStore: directory must be a path and not empty (an unset variable?); use '.'"
                f" for the current directory, got {directory!r}"
            )
        self.budget, self.disk_budget = budget, disk_budget
        self.directory = None if directory is None else Path(directory)
        self._lock = threading.Lock()  # never held while computing, hashing or reading
        self._held: OrderedDict[str, ImageMemory] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._identities: WeakKeyDictionary[StorableModel, tuple[Any, str]] = WeakKeyDictionary()
        if self.directory is not None:
            self._open(self.directory)

    def image_memory(
        self,
        model: StorableModel,
        pixel_values: Tensor,
        position_ids: Tensor,
        lengths: Sequence[int],
        sizes: Sequence[int] | None = None,
    ) -> ImageMemory:
        """The memory of a batch of prompts; only unknown images are computed.

        It holds keys and values of all mixin layers. No gradients reach the model.

        Args:
            model: a `CoMemoModel`.
            pixel_values: [T, 3, side, side], all prompts' tiles in reading order.
            position_ids: [M] ids of the image tokens in their prompts.
            lengths: image tokens of each prompt.
            sizes: image tokens of each image; None treats the images of a prompt as one.

        Returns:
            What `ImageMemory.from_media` makes, with keys and values. For a single image the
            tensors are those of the store: do not write to them.

        Raises:
            ValueError: a model whose weights do not determine what it computes (adapters,
                sharded or offloaded weights), or with absolute memory positions; images
                that are not whole tiles. Nothing was computed then.
        """
        check_storable("MemoryStore", model)
        # Not inference tensors: a later caller may need gradients.
        with torch.inference_mode(False), torch.no_grad():
            position_ids = position_ids.to(model.device)
            memory = ImageMemory.from_media(position_ids[:, None], position_ids, lengths, sizes)
            tokens = model.config.tokens_per_tile
            tiles = [size // tokens for size in memory.sizes]
            if [count * tokens for count in tiles] != list(memory.sizes):
                raise ValueError(
                    f"MemoryStore: images must be whole tiles of {tokens} image tokens, got"
                    f" {list(memory.sizes)}"
                )
            assert memory.ids is not None
            ids = memory.ids.cpu().split(list(memory.sizes))
            pixels = pixel_values.to(model.dtype).split(tiles)
            joined = join_images(self._memories(model, pixels, ids))
            memory.media, memory.keys, memory.values = joined.media, joined.keys, joined.values
        return memory

    def find(self, model: StorableModel, pixel_values: Tensor, ids: Tensor) -> ImageMemory | None:
        """The memory of one image if it is known: for callers that compute unknown ones in parts.

        Args:
            model: a `CoMemoModel`.
            pixel_values: [t, 3, side, side], its tiles.
            ids: integers [m] on the CPU, position ids of its tokens minus that of the first.

        Returns:
            The memory, read by nobody yet, or None. Its tensors are those of the store: do not
            write to them.

        Raises:
            ValueError: see `image_memory`.
        """
        check_storable("MemoryStore.find", model)
        key, facts = self._describe(model, pixel_values, ids)
        return self._fetch(key, facts, model, ids.int())

    def add(
        self, model: StorableModel, pixel_values: Tensor, ids: Tensor, memory: ImageMemory
    ) -> None:
        """Keep the memory of one image that `find` did not know.

        Args:
            model, pixel_values, ids: see `find`.
            memory: of this image alone, with media and with keys and values of all mixin layers.

        Raises:
            ValueError: see `image_memory`.
        """
        check_storable("MemoryStore.add", model)
        key, facts = self._describe(model, pixel_values, ids)
        self._keep(key, replace(memory, table=None, spans=None), facts)

    def _describe(
        self, model: StorableModel, pixel_values: Tensor, ids: Tensor
    ) -> tuple[str, dict[str, str]]:
        """The key of an image, and what its file says about the model."""
        facts = {"model": self._identify(model), "dtype": str(model.dtype).removeprefix("torch.")}
        return identify_image(facts["model"], pixel_values.to(model.dtype), ids.int()), facts

    def _memories(
        self, model: StorableModel, pixels: Sequence[Tensor], ids: Sequence[Tensor]
    ) -> list[ImageMemory]:
        """The memory of each image, from the store or computed."""
        facts = {"model": self._identify(model), "dtype": str(model.dtype).removeprefix("torch.")}
        keys = [
            identify_image(facts["model"], tiles, own)
            for tiles, own in zip(pixels, ids, strict=True)
        ]
        found: dict[str, ImageMemory] = {}
        first: dict[str, int] = {}
        for i, key in enumerate(keys):
            if key in first:
                self._count("hits")
                continue
            first[key] = i
            if (memory := self._fetch(key, facts, model, ids[i])) is not None:
                found[key] = memory
        # Ranks that divide a model compute an image together, if one of them does not know it.
        known = model.agree([key in found for key in first])
        unknown = {
            key: i for (key, i), is_known in zip(first.items(), known, strict=True) if not is_known
        }
        if unknown:
            built = model.build_image_memories(
                [pixels[i] for i in unknown.values()], [ids[i] for i in unknown.values()]
            )
            for key, memory in zip(unknown, built, strict=True):
                found[key] = self._keep(key, memory, facts)
        return [found[key] for key in keys]

    def _identify(self, model: StorableModel) -> str:
        """The digest of a model; computed again only when its weights or settings changed."""
        settings, weights = memory_settings(model), memory_weights(model)
        stamp = stamp_model(settings, weights)
        with self._lock:
            known = self._identities.get(model)
        if known is None or known[0] != stamp:
            known = stamp, identify_model(settings, weights)
            with self._lock:
                self._identities[model] = known
        return known[1]

    def _fetch(
        self, key: str, facts: dict[str, str], model: StorableModel, ids: Tensor
    ) -> ImageMemory | None:
        """A known image's memory, on the model's device; None if it has to be computed."""
        with self._lock:
            memory = self._held.get(key)
            if memory is not None:
                self._held.move_to_end(key)
                self._counts["hits"] += 1
        places = memory_places(model)
        if memory is None:
            memory = self._read(key, facts, model, ids)
            if memory is not None:
                memory = self._hold(key, move_to(memory, model.device, places))
            self._count("misses" if memory is None else "disk_hits")
        elif self.directory is not None:
            store_directory.touch(self._path(key))  # it is in use, though not read
        return None if memory is None else move_to(memory, model.device, places)

    def _keep(self, key: str, memory: ImageMemory, facts: dict[str, str]) -> ImageMemory:
        """Write a new memory to the directory and hold it; returns the one to use."""
        if self.directory is not None:
            self._write(self._path(key), memory, {"key": key, **facts})
        return self._hold(key, memory)

    def _write(self, path: Path, memory: ImageMemory, facts: dict[str, str]) -> None:
        """Write a memory and remove files beyond the budget; failures become warnings."""
        try:
            if not store_files.write_memory(path, memory, facts, self.disk_budget):
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

    def _hold(self, key: str, memory: ImageMemory) -> ImageMemory:
        """Hold a memory, unless it is larger than the budget; returns the one to use."""
        if count_bytes(memory) > self.budget:
            self._count("too_large")
            return memory
        memory = own_storage(memory)
        with self._lock:
            self._held[key] = memory
            self._held.move_to_end(key)
            # Summed each time: an interrupt could leave a running total wrong.
            beyond = sum(map(count_bytes, self._held.values())) - self.budget
            while beyond > 0:
                beyond -= count_bytes(self._held.popitem(last=False)[1])
                self._counts["evictions"] += 1
        return memory

    def _read(
        self, key: str, facts: dict[str, str], model: StorableModel, ids: Tensor
    ) -> ImageMemory | None:
        """A memory from the directory; None if there is no file, or a bad one, with a warning."""
        if self.directory is None:
            return None
        path = self._path(key)
        try:
            wanted = memory_layout(model, len(ids))
            memory = store_files.read_memory(path, {"key": key, **facts}, wanted)
            assert memory.ids is not None
            if not memory.ids.equal(ids):
                raise BadFileError("its ids are those of another grid")
        except FileNotFoundError:
            return None
        except (OSError, BadFileError) as error:
            self._count("refused")
            _warn(f"{path} is refused and its image computed again: {_reason(error)}")
            return None
        store_directory.touch(path)
        return memory

    def _open(self, directory: Path) -> None:
        try:
            store_directory.make_directory(directory)
        except (FileExistsError, NotADirectoryError):
            raise NotADirectoryError(
                errno.ENOTDIR, "MemoryStore: directory must be a directory, got", str(directory)
            ) from None
        except OSError as error:
            _warn(f"{directory} cannot be created: {_reason(error)}")
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
        """What the store has done so far, and what it holds now."""
        sizes = self._files().values()
        with self._lock:
            counts = {name: self._counts[name] for name in COUNTED}
            held = {
                "entries": len(self._held),
                "bytes": sum(map(count_bytes, self._held.values())),
            }
        return StoreStatistics(**counts, **held, disk_entries=len(sizes), disk_bytes=sum(sizes))

    def __iter__(self) -> Iterator[str]:
        """Keys of all known images: first those only in the directory, then those in memory."""
        on_disk = self._files()
        with self._lock:
            held = list(self._held)
        return iter([*(key for key in on_disk if key not in held), *held])

    def __len__(self) -> int:
        """How many images are known, in memory or in the directory."""
        return len(list(iter(self)))

    def __contains__(self, key: object) -> bool:
        with self._lock:
            if key in self._held:
                return True
        return key in self._files()

    def clear(self, disk: bool = False) -> None:
        """Remove all images from memory.

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
    """Whether a value is a finite number of at least 0."""
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _reason(error: Exception) -> object:
    return getattr(error, "strerror", None) or error


def _warn(text: str) -> None:
    warnings.warn(f"MemoryStore: {text}", MemoryStoreWarning, stacklevel=2)
