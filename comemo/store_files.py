"""Memories of pictures as files: written whole or not at all, and read with suspicion.

A file is a safetensors file of `media`, `ids`, `keys.<layer>` and `values.<layer>`. Its header
names format version, key, model, dtype and sizes, and a checksum of header and tensors: against
accidents, not against whoever may write into the directory.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import time
import uuid
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from comemo.store_keys import VERSION, chunks_of
from comemo_kernels import ImageMemory

FORMAT = "comemo picture"
ENDING = ".safetensors"
LEFTOVER = 3600  # seconds after which an unfinished file belongs to nobody
LONGEST_HEADER = 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNSIGNED = "0" * 64  # stands for the checksum while it is computed
_SIGNATURE = re.compile(rb'(?<="sha256": ")[0-9a-f]{64}(?=")')


class BadFileError(ValueError):
    """A file that holds no memory, or not the one that was wanted; the message is the reason."""


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        facts: format, version, key, model, dtype, sizes and sha256, all of them text.
        tensors: name, dtype and shape of each, in the order of their bytes.
        raw: the bytes ahead of the tensors.
        used: seconds since the epoch of the last use.
        size: bytes of the whole file.
    """

    facts: dict[str, str]
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]
    raw: bytes
    used: float
    size: int

    @property
    def tokens(self) -> int:
        """Image tokens of the picture."""
        return sum(map(int, json.loads(self.facts["sizes"])))


def read_header(path: Path) -> Header:
    """Read a file's header, not its tensors.

    Args:
        path: of the file.

    Returns:
        The header, of a file that is as long as it says.

    Raises:
        BadFileError: no file of ours, of another version, or not a whole one.
        OSError: a file that cannot be read; FileNotFoundError if there is none.
    """
    with open(path, "rb") as file:
        return _read_header(file)


def _read_header(file: BufferedReader) -> Header:
    status = os.fstat(file.fileno())
    length = int.from_bytes(start := file.read(8), "little")
    if len(start) < 8:
        raise BadFileError("it is empty" if not start else "it ends within its header")
    if not 2 <= length <= LONGEST_HEADER:
        raise BadFileError("it is no safetensors file")
    raw = start + file.read(length)
    if len(raw) < 8 + length:
        raise BadFileError("it ends within its header")
    try:
        content = json.loads(raw[8:])
        facts = content.pop("__metadata__", {})
        if facts.get("format") != FORMAT:
            raise BadFileError("it is a safetensors file of something else")
        if facts.get("version") != str(VERSION):
            told = str(facts.get("version"))[:8]
            raise BadFileError(f"it is of version {told!r}, wanted {VERSION}")
        tensors, end = [], 0
        for name, told in content.items():
            dtype, shape = DTYPES[told["dtype"]], tuple(map(int, told["shape"]))
            nbytes = math.prod(shape) * dtype.itemsize
            if told["data_offsets"] != [end, end + nbytes] or min(shape, default=0) < 1:
                raise BadFileError("its header contradicts itself")
            tensors.append((name, dtype, shape))
            end += nbytes
        header = Header(facts, tensors, raw, status.st_mtime, status.st_size)
        digests = [re.fullmatch("[0-9a-f]{64}", facts[name]) for name in ("key", "model", "sha256")]
        if None in digests or not re.fullmatch("[a-z0-9]+", facts["dtype"]) or header.tokens < 1:
            raise BadFileError("its header contradicts itself")
    except BadFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as e:
        raise BadFileError("its header cannot be understood") from e
    if status.st_size != len(raw) + end:
        raise BadFileError(f"it has {status.st_size} bytes of {len(raw) + end}")
    return header


def read_image(path: Path, wanted: dict[str, str]) -> ImageMemory:
    """Read a picture's memory and verify every byte of it.

    Args:
        path: of the file.
        wanted: facts that its header must tell.

    Returns:
        The memory, on the CPU; its tensors own their storage.

    Raises:
        BadFileError, OSError: as of `read_header`; other facts than wanted, bytes that changed.
    """
    # Read and not mapped: another process may replace or remove the file at any time.
    with open(path, "rb") as file:
        header = _read_header(file)
        for name, value in wanted.items():
            if (got := header.facts[name]) != value:
                raise BadFileError(f"its {name} is {got[:12]}, wanted {value[:12]}")
        digest = hashlib.sha256(_SIGNATURE.sub(_UNSIGNED.encode(), header.raw, 1))
        tensors = {}
        for name, dtype, shape in header.tensors:
            tensors[name] = tensor = torch.empty(shape, dtype=dtype)
            for chunk in chunks_of(tensor):  # views: what is read into them lies in the tensor
                if file.readinto(chunk) != len(chunk):
                    raise BadFileError("it became shorter while it was read")
                digest.update(chunk)
    if digest.hexdigest() != header.facts["sha256"]:
        raise BadFileError("its checksum is wrong: bytes have changed")
    return _assemble(tensors, header)


def _assemble(tensors: dict[str, Tensor], header: Header) -> ImageMemory:
    """The memory of these tensors, if they fit together."""
    m = header.tokens
    memory = ImageMemory(
        media=tensors.pop("media", None),
        ids=tensors.pop("ids", None),
        sizes=(m,),
        starts=torch.zeros(1, dtype=torch.int32),
        biases=torch.zeros(1, 1, dtype=torch.int32),
    )
    for name, tensor in tensors.items():
        kind, _, layer = name.partition(".")
        if kind not in ("keys", "values") or not layer.isdecimal():
            raise BadFileError(f"it holds a tensor {name!r}")
        getattr(memory, kind)[int(layer)] = tensor
    held = (memory.media, memory.ids, *tensors.values())
    if (
        any(t is None or len(t) != m for t in held)
        or len({(t.shape, t.dtype) for t in tensors.values()}) != 1
        or memory.keys.keys() != memory.values.keys()
    ):
        raise BadFileError("its tensors do not fit together")
    return memory


def write_image(
    path: Path, image: ImageMemory, facts: dict[str, str], limit: int | None = None
) -> bool:
    """Write a picture's memory: afterwards the file is there whole, or as it was before.

    Args:
        path: of the file.
        image: with media, keys and values.
        facts: key, model and dtype for the header.
        limit: most bytes that the file may have; None for any.

    Returns:
        Whether it was written, and not too large.

    Raises:
        OSError: no room, no permission.
    """
    assert image.media is not None
    assert image.ids is not None
    tensors = {"media": image.media, "ids": image.ids}
    tensors |= {f"keys.{layer}": key for layer, key in image.keys.items()}
    tensors |= {f"values.{layer}": value for layer, value in image.values.items()}
    told = {"format": FORMAT, "version": str(VERSION), **facts}
    told |= {"sizes": json.dumps(image.sizes), "sha256": _UNSIGNED}
    content: dict[str, Any] = {"__metadata__": told}
    end = 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.nbytes]
        shape = list(tensor.shape)
        content[name] = {"dtype": NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    raw = len(text).to_bytes(8, "little") + text
    if limit is not None and len(raw) + end > limit:
        return False
    part = path.with_name(f"{path.stem}.part-{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "xb") as file:
            file.write(raw)
            digest = hashlib.sha256(raw)
            for chunk in itertools.chain.from_iterable(map(chunks_of, tensors.values())):
                file.write(chunk)
                digest.update(chunk)
            place = _SIGNATURE.search(raw)
            assert place is not None
            file.seek(place.start())
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return True


def list_files(directory: Path) -> list[tuple[Path, os.stat_result]]:
    """Files that bear a picture's key, the longest unused first; others are none of ours.

    Args:
        directory: of a store; may be gone.

    Returns:
        Paths, and sizes and times of those that were there when they were asked.
    """
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if re.fullmatch(rf"[0-9a-f]{{64}}\{ENDING}", entry.name):
                with contextlib.suppress(FileNotFoundError):
                    found.append((Path(entry.path), os.stat(entry.path)))
    return sorted(found, key=lambda item: item[1].st_mtime_ns)


def remove_beyond(directory: Path, budget: int) -> None:
    """Remove files, the longest unused first, until `budget` bytes are left at most."""
    files = list_files(directory)
    total = sum(status.st_size for _, status in files)
    for path, status in files:
        if total <= budget:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size


def touch(path: Path) -> None:
    """Note that a file is in use, if it can be noted."""
    with contextlib.suppress(OSError):
        os.utime(path)


def sweep(directory: Path) -> None:
    """Remove unfinished files of writers that are gone."""
    for path in directory.glob("*.part-*"):
        if _is_abandoned(path):
            with contextlib.suppress(OSError):
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    named = re.search(r"\.part-(\w+)-(\d+)-\w+$", path.name)
    if named is not None and named[1] == _host() and not _is_alive(int(named[2])):
        return True
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > LEFTOVER
    return False


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


def _host() -> str:
    """A word for where process ids mean the same processes: this machine, this container."""
    space = ""
    with contextlib.suppress(OSError):
        space = os.readlink("/proc/self/ns/pid")
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
