"""Pictures of a store: built together, held apart."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from comemo_kernels import ImageMemory, split_images


def build_pictures(model: Any, pixels: list[Tensor], places: list[Tensor]) -> list[ImageMemory]:
    """Memories of pictures, by one pass of the vision tower and one of the projections.

    Args:
        model: a `CoMemoModel`.
        pixels: [t, 3, side, side] of each picture.
        places: ids [m] of its tokens less that of the first.

    Raises:
        ValueError: a model that cannot build all keys and values at once.
    """
    media = model.project_images(torch.cat(pixels).to(model.device)).flatten(0, 1)
    sizes = [len(ids) for ids in places]
    memory = ImageMemory.from_media(media, torch.cat(places), [sum(sizes)], sizes)
    if not model.language_model.build_memory(memory):
        raise ValueError(
            "MemoryStore: keys and values of all mixin layers must be built at once, got media of"
            f" {media.dtype} on {media.device} for weights of {model.dtype} on {model.device}"
        )
    memory.table = None  # of the model, and not a picture's
    return split_images(memory)


def tensors_of(image: ImageMemory) -> list[Tensor]:
    """What is held of a picture: media, ids, keys and values."""
    held = (image.media, image.ids, *image.keys.values(), *image.values.values())
    return [tensor for tensor in held if tensor is not None]


def count_bytes(image: ImageMemory) -> int:
    """Bytes of a picture's tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(image))


def own(image: ImageMemory) -> ImageMemory:
    """The picture; a copy if its storage holds others too, whose bytes nobody would count."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_of(image)}
    if sum(storage.nbytes() for storage in storages.values()) <= count_bytes(image):
        return image
    return _each(image, Tensor.clone)


def move_to(image: ImageMemory, device: torch.device) -> ImageMemory:
    """The picture on a device."""
    assert image.media is not None
    return image if image.media.device == device else _each(image, lambda t: t.to(device))


def _each(image: ImageMemory, change: Callable[[Tensor], Tensor]) -> ImageMemory:
    """The picture with other tensors."""
    media, ids, starts, biases = (
        None if t is None else change(t)
        for t in (image.media, image.ids, image.starts, image.biases)
    )
    keys = {layer: change(key) for layer, key in image.keys.items()}
    values = {layer: change(value) for layer, value in image.values.items()}
    changed = replace(image, media=media, ids=ids, starts=starts, biases=biases)
    return replace(changed, keys=keys, values=values)
