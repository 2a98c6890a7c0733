"""The directory of a store: which entries belong to the store, and what it does with them.

The directory may hold anything. Files of the store are regular files with names of exactly its
form. Nothing else is opened, changed, removed or counted, and no link is followed.
"""

import contextlib
import hashlib
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePath

ENDING = ".safetensors"
LEFTOVER = 3600  # seconds after which an unfinished file has no writer any more
_NAME = re.compile(rf"[0-9a-f]{{64}}\{ENDING}")
_PART = re.compile(r"[0-9a-f]{64}\.part-([0-9a-f]{8})-([1-9][0-9]{0,9})-[0-9a-f]{8}")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


class BadFileError(ValueError):
    """A file that does not hold the memory that was wanted; the message is the reason."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read; never block, and never follow a link.

    Args:
        path: of the file.

    Raises:
        BadFileError: it is not a regular file.
        OSError: a file that cannot be read; FileNotFoundError if there is none.
    """
    check_regular(path.lstat())  # opening a device may have effects
    return open(path, "rb", opener=_open_without_following)


def _open_without_following(path: str, flags: int) -> int:
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    try:
        check_regular(os.fstat(descriptor))  # it may have been replaced since
    except BadFileError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(status: os.stat_result) -> None:
    """Raise a BadFileError for anything but a regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise BadFileError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}")


def is_named(directory: object) -> bool:
    """Whether a value names a directory; an empty path does not, even if it acts like "."."""
    if isinstance(directory, PurePath):  # Path("") and Path(".") have no parts
        return bool(directory.parts) and "\0" not in str(directory)
    return isinstance(directory, str) and directory != "" and "\0" not in directory


def make_directory(directory: Path) -> None:
    """Create a directory that only its owner may read; an existing one stays as it is.

    Args:
        directory: to be created, with its parents.

    Raises:
        OSError: the path names something else, no permission.
    """
    directory.mkdir(0o700, parents=True, exist_ok=True)


def list_files(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """The store's files, least recently used first: regular files named by an image's key.

    Args:
        directory: of a store; may not exist.

    Returns:
        Path and status of each file.
    """
    found = [(path, status) for path, status, _ in _scan(directory, _NAME)]
    return sorted(found, key=lambda item: item[1].st_mtime_ns)


def _scan(
    directory: Path, form: re.Pattern[str]
) -> Iterator[tuple[Path, os.stat_result, re.Match[str]]]:
    """Regular files whose names match a pattern."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if named := form.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield Path(entry.path), status, named


def remove(path: Path) -> None:
    """Remove a regular file, if it is there."""
    with contextlib.suppress(FileNotFoundError, BadFileError):
        check_regular(path.lstat())
        path.unlink()


def remove_beyond(directory: Path, budget: float) -> None:
    """Remove files until at most `budget` bytes are left.

    Files larger than the budget are removed first, then the least recently used ones.

    Args:
        directory: of a store.
        budget: in bytes.

    Raises:
        OSError: a file that cannot be removed; no other file is removed in its place.
    """
    files, failed = list_files(directory), None
    total = sum(status.st_size for _, status in files)
    for path, status in sorted(files, key=lambda item: item[1].st_size <= budget):
        if total <= budget:
            break
        try:
            remove(path)
        except OSError as error:
            failed = error
        total -= status.st_size
    if failed is not None:
        raise failed


def touch(path: Path) -> None:
    """Set the time of a file's last use to now, if that is possible."""
    with contextlib.suppress(OSError, BadFileError), open_file(path) as file:
        os.utime(file.fileno())


def sweep(directory: Path) -> None:
    """Remove unfinished files whose writers have ended, if that is possible."""
    with contextlib.suppress(OSError):
        for path, status, named in _scan(directory, _PART):
            gone = named[1] == host() and not _is_alive(int(named[2]))
            if gone or time.time() - status.st_mtime > LEFTOVER:
                with contextlib.suppress(OSError):
                    remove(path)


def _is_alive(process: int) -> bool:
    """Whether a process runs; True where that cannot be found out."""
    if os.name == "posix":
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            return True
    return True


def host() -> str:
    """A name for the machine or container: process ids mean the same within it."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
