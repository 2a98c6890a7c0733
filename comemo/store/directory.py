"""The directory of a store: which of its entries are ours, and what may be done to them.

Others may have put anything there. Ours are regular files whose names have exactly our form: all
else is neither opened nor changed, removed or counted, and no link is followed.
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
LEFTOVER = 3600  # seconds after which an unfinished file belongs to nobody
_NAME = re.compile(rf"[0-9a-f]{{64}}\{ENDING}")
_PART = re.compile(r"[0-9a-f]{64}\.part-([0-9a-f]{8})-([1-9][0-9]{0,9})-[0-9a-f]{8}")
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


class BadFileError(ValueError):
    """A file that holds no memory, or not the one that was wanted; the message is the reason."""


def open_file(path: Path) -> BufferedReader:
    """Open a regular file to read; nothing that would wait, and nothing behind a link.

    Args:
        path: of the file.

    Raises:
        BadFileError: it is no regular file.
        OSError: a file that cannot be read; FileNotFoundError if there is none.
    """
    check_regular(path.lstat())  # a device may act on being opened at all
    return open(path, "rb", opener=_open_itself)


def _open_itself(path: str, flags: int) -> int:
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(path, flags)
    try:
        check_regular(os.fstat(descriptor))  # it may be another by now
    except BadFileError:
        os.close(descriptor)
        raise
    return descriptor


def check_regular(status: os.stat_result) -> None:
    """Raise a BadFileError for what is no regular file."""
    if not stat.S_ISREG(status.st_mode):
        raise BadFileError(f"it is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a device')}")


def is_named(directory: object) -> bool:
    """Whether it names a directory; an empty path names none, though it acts as the current one."""
    if isinstance(directory, PurePath):  # which has no parts if it was made of "" or "."
        return bool(directory.parts) and "\0" not in str(directory)
    return isinstance(directory, str) and directory != "" and "\0" not in directory


def make_directory(directory: Path) -> None:
    """Make a directory that nobody else may look into; one that is there stays as it is.

    Args:
        directory: to be made, with those above it.

    Raises:
        OSError: something else bears its name, no permission.
    """
    directory.mkdir(0o700, parents=True, exist_ok=True)


def list_files(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """Regular files that bear a picture's key, the longest unused first; others are none of ours.

    Args:
        directory: of a store; may be gone.

    Returns:
        Paths, and sizes and times of those that were there when they were asked.
    """
    found = [(path, status) for path, status, _ in _scan(directory, _NAME)]
    return sorted(found, key=lambda item: item[1].st_mtime_ns)


def _scan(
    directory: Path, form: re.Pattern[str]
) -> Iterator[tuple[Path, os.stat_result, re.Match[str]]]:
    """Regular files with names of a form."""
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
    """Remove files until `budget` bytes are left at most.

    Files that are larger by themselves go first, then those unused longest.

    Args:
        directory: of a store.
        budget: in bytes.

    Raises:
        OSError: files that cannot be removed; nothing else made room for them.
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
    """Note that a file is in use, if it can be noted."""
    with contextlib.suppress(OSError, BadFileError), open_file(path) as file:
        os.utime(file.fileno())


def sweep(directory: Path) -> None:
    """Remove unfinished files of writers that are gone, if they can be removed."""
    with contextlib.suppress(OSError):
        for path, status, named in _scan(directory, _PART):
            gone = named[1] == host() and not _is_alive(int(named[2]))
            if gone or time.time() - status.st_mtime > LEFTOVER:
                with contextlib.suppress(OSError):
                    remove(path)


def _is_alive(process: int) -> bool:
    """Whether there is a process; there may be where it cannot be asked."""
    if os.name == "posix":
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return False
        except OSError:
            return True
    return True


def host() -> str:
    """A word for where process ids mean the same processes: this machine, this container."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
