"""The headers of a store's files: what a file holds, without its tensors and without torch."""

import json
import math
import os
import re
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

from comemo.store.directory import BadFileError, open_file

VERSION = 1  # of the keys and of the files; raised when either changes
FORMAT = "comemo picture"  # the name in the files
LONGEST_HEADER = 2**20
LARGEST = 2**40  # size of a dimension
DTYPES = {  # torch's name, and bytes of a number
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
}
_FACTS = dict.fromkeys(("key", "model", "sha256"), "[0-9a-f]{64}")
_FACTS |= {"dtype": "[a-z0-9]{1,20}", "sizes": r"\[[1-9][0-9]{0,9}\]"}


class Header(NamedTuple):
    """The header of a file.

    Attributes:
        facts: format, version, key, model, dtype, sizes and sha256, all strings.
        layout: dtype (a key of `DTYPES`) and shape of each tensor by name, in the order of their
            bytes.
        raw: the bytes before the tensors.
        used: time of the last use, in seconds since the epoch.
        size: bytes of the whole file.
    """

    facts: dict[str, str]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    raw: bytes
    used: float
    size: int

    @property
    def tokens(self) -> int:
        """Image tokens of the image."""
        return int(self.facts["sizes"][1:-1])


def read_header(path: Path) -> Header:
    """Read a file's header, not its tensors.

    Args:
        path: of the file.

    Returns:
        The header; the file is as long as its header says.

    Raises:
        BadFileError: not a file of this store, a file of another version, or not a whole one.
        OSError: a file that cannot be read; FileNotFoundError if there is none.
    """
    with open_file(path) as file:
        return parse_header(file)


def parse_header(file: BufferedReader) -> Header:
    """Read the header of an open file; see `read_header`."""
    status = os.fstat(file.fileno())
    length = int.from_bytes(start := file.read(8), "little")
    if len(start) < 8:
        raise BadFileError("it is empty" if not start else "it ends within its header")
    if not 2 <= length <= LONGEST_HEADER:
        raise BadFileError("it is not a safetensors file")
    raw = start + file.read(length)
    if len(raw) < 8 + length:
        raise BadFileError("it ends within its header")
    try:
        content = json.loads(raw[8:])
        facts = content.pop("__metadata__", {})
        if facts.get("format") != FORMAT:
            raise BadFileError("it is a safetensors file of something else")
        if facts.get("version") != str(VERSION):
            version = str(facts.get("version"))[:8]
            raise BadFileError(f"it has version {version!r}, wanted {VERSION}")
        layout = {}
        end = 0
        for name, described in content.items():
            dtype, shape = described["dtype"], described["shape"]
            _, item_size = DTYPES[dtype]
            _check(type(shape) is list and 1 <= len(shape) <= 3)
            _check(all(type(size) is int and 0 < size < LARGEST for size in shape))
            begin, end = end, end + math.prod(shape) * item_size
            _check(described["data_offsets"] == [begin, end])
            layout[name] = dtype, tuple(shape)
        _check(all(re.fullmatch(form, facts[name]) for name, form in _FACTS.items()))
    except BadFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError("its header cannot be understood") from error
    if status.st_size != len(raw) + end:
        raise BadFileError(f"it has {status.st_size} bytes, wanted {len(raw) + end}")
    return Header(facts, layout, raw, status.st_mtime, status.st_size)


def _check(holds: bool) -> None:
    if not holds:
        raise BadFileError("its header contradicts itself")
