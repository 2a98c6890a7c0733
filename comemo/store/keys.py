"""Keys of a store: digests of a model's weights and settings and of an image's pixels and ids.

Which weights and settings count is up to `comemo.memory.parts`; here they are only hashed.
"""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from comemo.store.headers import VERSION

CHUNK = 2**26  # bytes hashed at a time
BLOCK = 2**20  # integers summed at a time: they, their factors and products fit the cache
SMALL = 2**16  # elements; smaller weights are concatenated before they are summed
Weights: TypeAlias = Sequence[tuple[str, Tensor]]  # with their names


def describe(settings: Mapping[str, Any]) -> str:
    """JSON of settings and of the version of the keys; always the same for the same values."""
    return json.dumps({"version": VERSION, **settings}, sort_keys=True)


def stamp_model(settings: Mapping[str, Any], weights: Weights) -> tuple[Any, ...]:
    """A value that changes when the model does; cheaper than `identify_model`.

    Every bit of every weight counts, whoever changed it: version counters of tensors do not see
    writes to `weight.data` or through NumPy. The sums are computed where the weights are, and only
    they leave a GPU.

    Args:
        settings: those that a memory depends on.
        weights: their names and tensors.

    Returns:
        A value to compare within this process. A change goes unnoticed with a probability of at
        most 2^-32; a change of a single number is always noticed.
    """
    tensors = [weight for _, weight in weights]
    shapes = tuple((tuple(weight.shape), weight.dtype) for weight in tensors)
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return (
        describe(settings),
        shapes,
        *itertools.chain.from_iterable(map(sum_bits, alike.values())),
    )


@torch.no_grad()
def sum_bits(tensors: Sequence[Tensor]) -> list[int]:
    """Integers that change when any bit of the tensors changes, or their order.

        s = sum_i c_i x_i mod 2^64

    for each block of integers x of at most 32 bits, with odd random c of 64 bits. A difference of
    x_i has at most 31 trailing zero bits: its product takes 2^32 values or more, and never 0.

    Args:
        tensors: of one dtype and device, of any shapes and strides.

    Returns:
        One sum for each block of `BLOCK` integers.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    small = [t for t in flat if t.numel() < SMALL]
    large = [t for t in flat if t.numel() >= SMALL]
    numbers = [_integers_of(t) for t in ([torch.cat(small)] if small else []) + large]
    if not numbers:
        return []
    factors = _factors(numbers[0].device)
    buffer = torch.empty_like(factors[: max(map(len, numbers))])
    sums = []
    for block in itertools.chain.from_iterable(x.split(BLOCK) for x in numbers):
        products = buffer[: len(block)]
        products.copy_(block).mul_(factors[: len(block)])
        sums.append(products.sum())
    return torch.stack(sums).tolist()


def _integers_of(flat: Tensor) -> Tensor:
    """The bits of a tensor [n] as the widest integers that it holds whole, up to 32 bits."""
    start = flat.storage_offset() * flat.element_size()
    for kind in (torch.int32, torch.int16):
        if flat.nbytes % kind.itemsize == start % kind.itemsize == 0:
            return flat.view(kind)
    return flat.view(torch.int8)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd int64 [BLOCK], random in every process: nobody can make weights with equal sums."""
    return torch.frombuffer(bytearray(os.urandom(8 * BLOCK)), dtype=torch.int64).to(device) | 1


@torch.no_grad()
def identify_model(settings: Mapping[str, Any], weights: Weights) -> str:
    """Hex digest of the settings and weights that a memory depends on.

    Args:
        settings: as for `stamp_model`.
        weights: their names and tensors; the names are hashed too.
    """
    digest = hashlib.sha256(describe(settings).encode())
    for name, weight in weights:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        for chunk in chunks_of(weight):
            digest.update(chunk)
    return digest.hexdigest()


def identify_image(model: str, tiles: Tensor, ids: Tensor) -> str:
    """Hex digest of an image as a model sees it.

    Args:
        model: what `identify_model` returned.
        tiles: [t, 3, side, side] in the model's dtype.
        ids: integers [m], position ids of its tokens minus that of the first. They show the grid,
            the order of the tiles and the kind of RoPE.
    """
    shape = f"{model} {tiles.dtype} {tuple(tiles.shape)} {tuple(ids.shape)}\n"
    digest = hashlib.sha256(shape.encode())
    for tensor in (tiles, ids.int()):
        for chunk in chunks_of(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def chunks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor of any dtype and device, in row-major order, in chunks."""
    flat = tensor.detach().reshape(-1)
    step = max(1, CHUNK // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield memoryview(flat[start : start + step].cpu().view(torch.uint8).numpy())
