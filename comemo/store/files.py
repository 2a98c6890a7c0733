"""Image memories as files: written whole or not at all, and fully checked when read.

A file is a safetensors file of `media`, `ids`, `keys.<layer>` and `values.<layer>`. Its header
holds format version, key, model, dtype and sizes, and a checksum of header and tensors. It protects
against accidents, not against people who may write to the directory.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import uuid
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch

from comemo.memory.parts import Layout
from comemo.store.directory import BadFileError, check_regular, host, make_directory, open_file
from comemo.store.keys import VERSION, chunks_of
from comemo_kernels import ImageMemory

FORMAT = "comemo picture"  # the name in the files
LONGEST_HEADER = 2**20
LARGEST = 2**40  # size of a dimension
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_FACTS = dict.fromkeys(("key", "model", "sha256"), "[0-9a-f]{64}")
_FACTS |= {"dtype": "[a-z0-9]{1,20}", "sizes": r"\[[1-9][0-9]{0,9}\]"}
_UNSIGNED = "0" * 64  # in place of the checksum while it is computed
_SIGNATURE = re.compile(rb'(?<="sha256": ")[0-9a-f]{64}(?=")')


class Header(NamedTuple):
    """The header of a file.

    Attributes:
        facts: format, version, key, model, dtype, sizes and sha256, all strings.
        tensors: dtype and shape of each tensor by name, in the order of their bytes.
        raw: the bytes before the tensors.
        used: time of the last use, in seconds since the epoch.
        size: bytes of the whole file.
    """

    facts: dict[str, str]
    tensors: Layout
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
        return _read_header(file)


def _read_header(file: BufferedReader) -> Header:
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
        tensors: Layout = {}
        end = 0
        for name, described in content.items():
            dtype, shape = DTYPES[described["dtype"]], described["shape"]
            _check(type(shape) is list and 1 <= len(shape) <= 3)
            _check(all(type(size) is int and 0 < size < LARGEST for size in shape))
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            _check(described["data_offsets"] == [begin, end])
            tensors[name] = dtype, tuple(shape)
        _check(all(re.fullmatch(form, facts[name]) for name, form in _FACTS.items()))
    except BadFileError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadFileError("its header cannot be understood") from error
    if status.st_size != len(raw) + end:
        raise BadFileError(f"it has {status.st_size} bytes, wanted {len(raw) + end}")
    return Header(facts, tensors, raw, status.st_mtime, status.st_size)


def _check(holds: bool) -> None:
    if not holds:
        raise BadFileError("its header contradicts itself")


def read_memory(path: Path, wanted: dict[str, str], tensors: Layout) -> ImageMemory:
    """Read the memory of an image and verify every byte of it.

    Args:
        path: of the file.
        wanted: facts that must be in its header.
        tensors: what it must hold; nothing larger is allocated.

    Returns:
        The memory, on the CPU; its tensors own their storage.

    Raises:
        BadFileError, OSError: as `read_header`; other facts or tensors than wanted, or changed
            bytes.
    """
    # Not memory-mapped: another process may replace or remove the file at any time.
    with open_file(path) as file:
        header = _read_header(file)
        for name, value in wanted.items():
            if (got := header.facts[name]) != value:
                raise BadFileError(f"its {name} is {got[:12]}, wanted {value[:12]}")
        if header.tensors != tensors or any(header.tokens != t[1][0] for t in tensors.values()):
            raise BadFileError("its tensors are not those of a memory of this model and image")
        digest = hashlib.sha256(_SIGNATURE.sub(_UNSIGNED.encode(), header.raw, 1))
        read = {}
        for name, (dtype, shape) in header.tensors.items():
            read[name] = tensor = torch.empty(shape, dtype=dtype, device="cpu")
            for chunk in chunks_of(tensor):  # views: this reads into the tensor
                if file.readinto(chunk) != len(chunk):
                    raise BadFileError("it became shorter while it was read")
                digest.update(chunk)
    if digest.hexdigest() != header.facts["sha256"]:
        raise BadFileError("its checksum is wrong: bytes have changed")
    memory = ImageMemory(
        media=read.pop("media"),
        ids=read.pop("ids"),
        sizes=(header.tokens,),
        starts=torch.zeros(1, dtype=torch.int32, device="cpu"),
        biases=torch.zeros(1, 1, dtype=torch.int32, device="cpu"),
    )
    for name, tensor in read.items():
        kind, _, layer = name.partition(".")
        getattr(memory, kind)[int(layer)] = tensor
    return memory


def write_memory(
    path: Path, memory: ImageMemory, facts: dict[str, str], limit: float | None = None
) -> bool:
    """Write the memory of an image: afterwards the file is complete, or unchanged.

    Only the owner may read the file, and the directory if it had to be created.

    Args:
        path: of the file.
        memory: of one image, with media, keys and values.
        facts: key, model and dtype for the header.
        limit: most bytes that the file may have; None for no limit.

    Returns:
        Whether it was written; False if it is larger than `limit`.

    Raises:
        BadFileError: the path names something that is not a regular file.
        OSError: no space left, no permission.
    """
    assert memory.media is not None
    assert memory.ids is not None
    tensors = {"media": memory.media, "ids": memory.ids}
    tensors |= {f"keys.{layer}": key for layer, key in memory.keys.items()}
    tensors |= {f"values.{layer}": value for layer, value in memory.values.items()}
    metadata = {"format": FORMAT, "version": str(VERSION), **facts}
    metadata |= {"sizes": json.dumps(memory.sizes), "sha256": _UNSIGNED}
    content: dict[str, Any] = {"__metadata__": metadata}
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
    part = path.with_name(f"{path.stem}.part-{host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    make_directory(path.parent)
    with contextlib.suppress(FileNotFoundError):
        check_regular(path.lstat())
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(raw)
            digest = hashlib.sha256(raw)
            for chunk in itertools.chain.from_iterable(map(chunks_of, tensors.values())):
                file.write(chunk)
                digest.update(chunk)
            signature = _SIGNATURE.search(raw)
            assert signature is not None
            file.seek(signature.start())
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return True
