"""Image memories as files: written whole or not at all, and fully checked when read.

A file is a safetensors file of `media`, `ids`, `keys.<layer>` and `values.<layer>`. Its header
holds format version, key, model, dtype and sizes, and a checksum of header and tensors. It protects
against accidents, not against people who may write to the directory.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import uuid
from pathlib import Path
from typing import Any

import torch

from comemo.memory.parts import Layout
from comemo.store.directory import BadFileError, check_regular, host, make_directory, open_file
from comemo.store.headers import DTYPES, FORMAT, VERSION, Header, parse_header
from comemo.store.keys import chunks_of
from comemo_kernels import ImageMemory

NAMES: dict[torch.dtype, str] = {getattr(torch, dtype): name for name, (dtype, _) in DTYPES.items()}
_UNSIGNED = "0" * 64  # in place of the checksum while it is computed
_SIGNATURE = re.compile(rb'(?<="sha256": ")[0-9a-f]{64}(?=")')


def tensors_of(header: Header) -> Layout:
    """Dtype and shape of each tensor of a file by name, in the order of their bytes."""
    return {
        name: (getattr(torch, DTYPES[dtype][0]), shape)
        for name, (dtype, shape) in header.layout.items()
    }


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
        header = parse_header(file)
        for name, value in wanted.items():
            if (got := header.facts[name]) != value:
                raise BadFileError(f"its {name} is {got[:12]}, wanted {value[:12]}")
        held = tensors_of(header)
        if held != tensors or any(header.tokens != t[1][0] for t in tensors.values()):
            raise BadFileError("its tensors are not those of a memory of this model and image")
        digest = hashlib.sha256(_SIGNATURE.sub(_UNSIGNED.encode(), header.raw, 1))
        read = {}
        for name, (dtype, shape) in held.items():
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
