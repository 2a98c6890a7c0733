"""Meta files: which datasets there are, where they lie, and how often each is read."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comemo.images import MAX_TILES
from comemo.safety.regular import check_regular, read_json
from comemo.train.data.faults import logger

_KEYS = {
    "root": (str,),
    "annotation": (str,),
    "data_augment": (bool,),
    "repeat_time": (int, float),
    "length": (int,),
    "max_dynamic_patch": (int,),
}
_NEEDED = ("root", "annotation")


@dataclass(frozen=True)
class Collection:
    """One dataset of a meta file.

    Attributes:
        name: in the meta file; of a JSONL file alone, its name without the suffix.
        annotation: path of the JSONL file.
        root: folder of its images and videos.
        augment: whether tiles are compressed as JPEG of a random quality.
        repeat: how often the lines are read in an epoch; below 1 the share of lines that is read.
        length: number of lines that the meta file gives, or None.
        max_tiles: most tiles of a sample, thumbnails not counted; None for the settings' value.
    """

    name: str
    annotation: str
    root: str
    augment: bool = False
    repeat: float = 1.0
    length: int | None = None
    max_tiles: int | None = None

    def count(self, lines: int) -> int:
        """Samples of an epoch, from the number of lines. Sample j is line j modulo `lines`."""
        whole = math.floor(self.repeat)
        rest = int(lines * (self.repeat - whole))
        return max(whole * lines + rest, min(lines, 1))

    def check_length(self, lines: int) -> None:
        """Warn if the file has another number of lines than the meta file says."""
        if self.length is not None and self.length != lines:
            logger.warning(
                "%s: the meta file gives length %d, %s has %d lines: all are used",
                self.name,
                self.length,
                self.annotation,
                lines,
            )


def read_collections(path: str, root: str | None = None) -> list[Collection]:
    """The datasets of a meta file, or the one of a JSONL file.

    Args:
        path: a file that ends in `.jsonl`, or a meta file: a JSON object of datasets by name, each
            `{root, annotation, data_augment, repeat_time, length, max_dynamic_patch}`, of which
            `root` and `annotation` are needed. A path in it that does not exist is taken relative
            to the folder of the meta file; an empty `root` is that folder.
        root: folder of the images of a JSONL file; None for the folder of the file. Not for meta
            files.

    Raises:
        ValueError: not a file of these kinds, unknown or missing keys, values of a wrong type, no
            dataset, or files that do not exist. Names dataset and file.
    """
    if not isinstance(path, str) or not path:
        raise ValueError(f"data: wanted the path of a meta or JSONL file, got {path!r}")
    _check_file("data", path)
    folder = Path(path).parent
    if path.endswith(".jsonl"):
        images = str(folder) if root is None else root
        _check_folder("data", "root", images)
        return [Collection(Path(path).name.removesuffix(".jsonl"), path, images)]
    if root is not None:
        raise ValueError(f"data: root must be None for a meta file, got {root!r}: it has its own")
    meta = read_json(path)
    if not isinstance(meta, dict) or not meta:
        raise ValueError(f"data: {path!r} must hold a JSON object of datasets, got {_short(meta)}")
    return [_read_entry(path, folder, name, entry) for name, entry in meta.items()]


def _read_entry(path: str, folder: Path, name: str, entry: Any) -> Collection:
    where = f"data: dataset {name!r} of {path!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a JSON object, got {_short(entry)}")
    for key, value in entry.items():
        if key not in _KEYS:
            raise ValueError(f"{where} must have keys of {list(_KEYS)}, got {key!r}")
        wanted = _KEYS[key]
        wrong_bool = isinstance(value, bool) and bool not in wanted
        if not isinstance(value, wanted) or wrong_bool:
            kinds = " or ".join(kind.__name__ for kind in wanted)
            raise ValueError(f"{where}: {key} must be {kinds}, got {_short(value)}")
    for key in _NEEDED:
        if key not in entry:
            raise ValueError(f"{where} must have the key {key}, got {sorted(entry)}")
    repeat = entry.get("repeat_time", 1)
    if not 0 < repeat < 1e6:
        raise ValueError(f"{where}: repeat_time must be above 0, got {repeat!r}")
    for key, most in (("length", 2**63), ("max_dynamic_patch", MAX_TILES)):
        if not 1 <= entry.get(key, 1) <= most:
            raise ValueError(f"{where}: {key} must be from 1 to {most}, got {entry[key]!r}")
    annotation = _from_meta(folder, entry["annotation"])
    root = _from_meta(folder, entry["root"]) if entry["root"] else str(folder)
    _check_file(f"{where}: annotation", annotation)
    _check_folder(where, "root", root)
    return Collection(
        name,
        annotation,
        root,
        entry.get("data_augment", False),
        float(repeat),
        entry.get("length"),
        entry.get("max_dynamic_patch"),
    )


def _from_meta(folder: Path, path: str) -> str:
    return path if os.path.exists(path) else os.path.join(folder, path)


def _check_file(where: str, path: str) -> None:
    if "\0" in path or not os.path.exists(path) or os.path.isdir(path):
        raise ValueError(f"{where}: wanted an existing file, got {path!r}")
    check_regular(where, path)


def _check_folder(where: str, key: str, path: str) -> None:
    if not isinstance(path, str) or "\0" in path or not os.path.isdir(path):
        raise ValueError(f"{where}: {key} must be an existing folder, got {path!r}")


def _short(value: Any) -> str:
    return f"{value!r:.60}"
