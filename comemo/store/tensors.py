"""The tensors of one image's memory: their bytes, their storage and their devices."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from comemo_kernels import ImageMemory


def tensors_of(memory: ImageMemory) -> list[Tensor]:
    """What a store keeps of an image: media, ids, keys and values."""
    kept = (memory.media, memory.ids, *memory.keys.values(), *memory.values.values())
    return [tensor for tensor in kept if tensor is not None]


def count_bytes(memory: ImageMemory) -> int:
    """Bytes of an image's tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(memory))


def own_storage(memory: ImageMemory) -> ImageMemory:
    """The memory, copied if its storage holds other images too: nobody would count their bytes."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(memory)}
    if sum(storage.nbytes() for storage in storages.values()) <= count_bytes(memory):
        return memory
    return _map_tensors(memory, Tensor.clone)


def move_to(
    memory: ImageMemory, device: torch.device, places: Mapping[int, torch.device]
) -> ImageMemory:
    """The memory on its devices; tensors that are there already are not copied.

    Args:
        memory: of an image.
        device: of all but keys and values.
        places: of the keys and values of each layer.
    """
    moved = _map_tensors(memory, lambda tensor: tensor.to(device), of_layers=False)
    keys = {layer: key.to(places[layer]) for layer, key in memory.keys.items()}
    values = {layer: value.to(places[layer]) for layer, value in memory.values.items()}
    return replace(moved, keys=keys, values=values)


def _map_tensors(
    memory: ImageMemory, change: Callable[[Tensor], Tensor], of_layers: bool = True
) -> ImageMemory:
    """The memory with `change` applied to each tensor, also to keys and values if `of_layers`."""
    media, ids, starts, biases = (
        None if t is None else change(t)
        for t in (memory.media, memory.ids, memory.starts, memory.biases)
    )
    keys, values = memory.keys, memory.values
    if of_layers:
        keys = {layer: change(key) for layer, key in keys.items()}
        values = {layer: change(value) for layer, value in values.items()}
    return replace(
        memory, media=media, ids=ids, starts=starts, biases=biases, keys=keys, values=values
    )
