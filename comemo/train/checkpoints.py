"""Checkpoints that are written whole or not at all, and found again.

A checkpoint is filled under another name, listed in a manifest with the size and checksum of each
file, flushed to the disk, and only then renamed to `checkpoint-STEP`. A process that is killed at
any moment leaves the checkpoints before it, and at most a folder that the next run removes.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

MANIFEST = "whole.json"
PARTS = "shards"  # folder of what each rank wrote
# Names of folders that are not checkpoints: being written, or being removed.
WRITING, REMOVING = ".writing-", ".removing-"
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK = 2**24  # bytes of a file in memory at once

# What the libraries raise when a disk is full: torch.save does not raise an OSError.
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)


class NotWritten(OSError):
    """A folder could not be written; nothing of it is left."""


def write_checkpoint(
    folder: Path, step: int, fill: Callable[[Path], None], keep: int | None = None
) -> Path:
    """Write `folder`/checkpoint-`step`.

    Args:
        folder: of the stage; created if it does not exist.
        step: optimizer steps so far. A checkpoint of the same step is replaced.
        fill: writes the files into the folder that it is given.
        keep: newest checkpoints to keep, at least 1; None for all. Older ones are removed after the
            new one is whole.

    Returns:
        The folder of the checkpoint.

    Raises:
        NotWritten: the disk is full, or another fault of the file system.
    """

    def fill_and_seal(staging: Path) -> None:
        fill(staging)
        _seal(staging, step)

    target = folder / f"checkpoint-{step}"
    write_folder(target, fill_and_seal)
    if keep is not None:
        for old in _checkpoints(folder)[:-keep]:
            _remove(folder / f"checkpoint-{old}")
    return target


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all.

    Args:
        target: replaced if it exists; the folder above it is created.
        fill: writes the files into the folder that it is given.

    Raises:
        NotWritten: as `write_checkpoint`.
    """
    staging = _staging(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove(staging)
        staging.mkdir()
        fill(staging)
        for path in (*staging.rglob("*"), staging):
            _flush(path)
        _remove(target)
        staging.rename(target)
        _flush(target.parent)
    except NOT_WRITTEN as error:
        shutil.rmtree(staging, ignore_errors=True)
        reason = " ".join(str(error).split())
        raise NotWritten(f"{target} cannot be written: {reason}") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def staging_of(folder: Path, step: int) -> Path:
    """The folder in which `write_checkpoint` fills a checkpoint."""
    return _staging(folder / f"checkpoint-{step}")


def _staging(target: Path) -> Path:
    return target.with_name(f"{WRITING}{target.name}")


def find_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder.

    Args:
        folder: of the stage; it may not exist.

    Returns:
        The folder of the checkpoint or None, and for each newer one that is not whole a sentence
        that says why.
    """
    faults: list[str] = []
    for step in reversed(_checkpoints(folder)):
        path = folder / f"checkpoint-{step}"
        fault = find_fault(path)
        if fault is None:
            return path, faults
        faults.append(f"{path} is not whole: {fault}")
    return None, faults


def find_fault(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole; None if it is. All its files are read."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        wanted = {
            name: (int(size), int(check)) for name, (size, check) in manifest["files"].items()
        }
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, (size, _) in wanted.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    try:
        listed = [name for name, (_, check) in wanted.items() if check >= 0]
        for name, found in _checksums(checkpoint, listed).items():
            if found != wanted[name][1]:
                return f"{name} has changed"
    except OSError as error:
        return f"it cannot be read: {error}"
    return None


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; a process that is killed meanwhile leaves none."""
    _remove(checkpoint)


def step_of(checkpoint: Path) -> int:
    """Optimizer steps of a checkpoint's folder."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match[1])


def clean_up(folder: Path) -> None:
    """Remove what a process left that was killed while writing or removing."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith((WRITING, REMOVING)):
                shutil.rmtree(path, ignore_errors=True)


def _checkpoints(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)


def _remove(path: Path) -> None:
    """Remove a folder; its name is gone first, so that half of it is never taken for a whole."""
    if path.exists():
        doomed = path.with_name(f"{REMOVING}{path.name}-{os.getpid()}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _seal(folder: Path, step: int) -> None:
    """Write the manifest."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    # What other ranks wrote is many times larger, and only listed with its size.
    checks = _checksums(folder, sorted(n for n in names if not n.startswith(f"{PARTS}/")))
    files = {name: [(folder / name).stat().st_size, checks.get(name, -1)] for name in names}
    text = json.dumps({"step": step, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def _checksums(folder: Path, names: list[str]) -> dict[str, int]:
    """CRC-32 of files. zlib releases the GIL, so several are read at the same time."""
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: _checksum(folder / name), names), strict=True))


def _checksum(file: Path) -> int:
    check = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            check = zlib.crc32(block, check)
    return check


def _flush(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if path.is_file():  # some file systems have no fsync of folders
            raise
    finally:
        os.close(handle)
