"""JSON lines by number, without reading the file into memory."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_BLOCK = 1 << 24  # bytes
_BOM = b"\xef\xbb\xbf"
_BLANK = (9, 11, 12, 13, 32)  # bytes that a blank line may hold


class Lines:
    """The lines of a file that are not blank, by index.

    A process opens the file when it first reads: an object that was pickled or forked has no
    handle in common with another process.

    Args:
        path: of the file. Lines end in LF or CR LF; the last may end without; a byte order mark is
            skipped.
        cache: folder for the index, which is then memory-mapped and found again for the same path,
            size and time of change; None keeps it in memory.

    Raises:
        OSError: a file that cannot be read.
    """

    def __init__(self, path: str, cache: Path | None = None):
        self.path = path
        self._file: BinaryIO | None = None
        self._owner = 0
        status = os.stat(path)
        self._stamp = (status.st_size, status.st_mtime_ns)
        self._stored: Path | None = None
        if cache is not None:
            name = f"{os.path.realpath(path)}\0{self._stamp}".encode("utf-8", "surrogateescape")
            self._stored = Path(cache) / f"lines-{hashlib.sha256(name).hexdigest()[:32]}.npy"
        self._index = self._load() if self._stored else None
        if self._index is None:
            self._index = _find_lines(path)
            if not len(self._index):
                self._stored = None  # an empty file cannot be mapped
            if self._stored is not None:
                _store(self._stored, self._index)
                self._index = self._load()

    def __len__(self) -> int:
        return len(self._rows)

    def number(self, index: int) -> int:
        """The number of line `index` in the file, from 1, blank lines counted."""
        return int(self._rows[index, 1])

    def read(self, index: int) -> bytes:
        """The bytes of line `index`, with its end.

        Raises:
            ValueError: the file has changed since it was indexed.
            OSError: it cannot be read.
        """
        if self._file is None or self._owner != os.getpid():
            self._file, self._owner = open(self.path, "rb"), os.getpid()  # noqa: SIM115
            status = os.fstat(self._file.fileno())
            if (status.st_size, status.st_mtime_ns) != self._stamp:
                raise ValueError(f"{self.path}: the file must not change while it is read")
        self._file.seek(int(self._rows[index, 0]))
        return self._file.readline()

    @property
    def _rows(self) -> np.ndarray:
        if self._index is None:
            self._index = self._load()
        if self._index is None:
            raise OSError(f"{self._stored}: the index of {self.path} is gone")
        return self._index

    def _load(self) -> np.ndarray | None:
        """int64 [lines, 2]: first byte and number; None if it is not stored, or damaged."""
        try:
            index = np.load(str(self._stored), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        whole = index.ndim == 2 and index.shape[1] == 2 and index.dtype == np.int64
        return index if whole else None

    def __getstate__(self) -> dict[str, Any]:
        index = None if self._stored is not None else self._index
        return {**self.__dict__, "_file": None, "_index": index}


def _find_lines(path: str) -> np.ndarray:
    """int64 [lines, 2]: the first byte and the number of each line that is not blank."""
    ends, offset = [], 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + offset)
            offset += len(block)
        end = np.concatenate([*ends, [offset]]).astype(np.int64)
        start = np.concatenate([[0], end[:-1] + 1])
        file.seek(0)
        if file.read(3) == _BOM:
            start[0] = 3
        number = np.arange(1, len(start) + 1)
        filled = start < end
        start, end, number = start[filled], end[filled], number[filled]
        blank = _blank_lines(file, start, end)
    return np.stack([start[~blank], number[~blank]], axis=1).astype(np.int64)


def _blank_lines(file: BinaryIO, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """bool [lines], True where a line has only white space."""
    blank = np.zeros(len(start), bool)
    first = np.zeros(len(start), np.uint8)
    file.seek(0)
    offset = row = 0
    while block := file.read(_BLOCK):
        stop = int(np.searchsorted(start, offset + len(block)))
        first[row:stop] = np.frombuffer(block, np.uint8)[start[row:stop] - offset]
        offset, row = offset + len(block), stop
    for index in np.flatnonzero(np.isin(first, _BLANK)):
        file.seek(int(start[index]))
        blank[index] = not file.read(int(end[index] - start[index])).strip()
    return blank


def _store(path: Path, index: np.ndarray) -> None:
    """Write an index as a whole: another process never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, index)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
