"""Append images to a memory with spare capacity."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count, to_device
from comemo_kernels.memory import ImageMemory
from comemo_kernels.reference.dtypes import INTEGERS
from comemo_kernels.reference.memory_checks import check_narrow, check_sizes

if find_spec("triton"):
    from comemo_kernels.memory_build import build_memory
else:
    from comemo_kernels.reference import build_memory


@public
def append_images(
    memory: ImageMemory,
    media: Tensor,
    ids: Tensor,
    sizes: Sequence[int],
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None = None,
    biases: Sequence[int] | None = None,
    eps: float = 1e-5,
) -> tuple[int, int]:
    """Build keys and values of more images, after those that are in the memory.

    Existing rows are neither copied nor computed again, and the bytes of an image do not depend on
    the images appended with it. On a GPU two launches do it for all layers.

    Args:
        memory: from `ImageMemory.allocate`; written in place, so memories that share it see the
            new rows.
        media: [m, d] projected tokens of the images, of the memory's dtype (of any floating dtype
            for float8).
        ids: integers [m], index of each token in its image, see `image_position_ids`; for an
            absolute memory its id in the prompt.
        sizes: tokens of each image; their sum is m.
        kv_weights: of each layer [2 * G * D, d], the rows of keys first.
        norm_weights: of each layer [d]; None if they are folded into `kv_weights`.
        biases: id of each image's first token, if one prompt reads them; None for 0, which
            `ImageMemory.reading` replaces.
        eps: of the norm.

    Returns:
        start, end: the span of the new images.

    Raises:
        ValueError: sizes, shapes, dtypes or devices that do not fit the memory; too many tokens for
            its capacity; float8 images that are not whole tiles. The memory is unchanged then.
    """
    layers = list(memory.keys)
    check(
        layers != [],
        "append_images: the memory must come from ImageMemory.allocate, got one without keys",
    )
    row = _check_held(memory)
    m = media.shape[0] if media.ndim else 0
    check_sizes("append_images", "sizes", sizes, 0)
    check(
        len(sizes) > 0
        and min(sizes) > 0
        and sum(sizes) == m
        and ids.shape == (m,)
        and ids.dtype in INTEGERS,
        f"append_images: sizes must be positive and sum to the {m} rows of media"
        f" {tuple(media.shape)}, and ids be integers [{m}], got {list(sizes)} and ids {ids.dtype}"
        f" {tuple(ids.shape)}",
    )
    check(
        len(kv_weights) == len(layers),
        f"append_images: kv_weights must be those of the memory's layers {layers}, got"
        f" {len(kv_weights)}",
    )
    check(
        row + m <= memory.capacity,
        f"append_images: {m} more image tokens must fit the memory's capacity of"
        f" {memory.capacity}, which holds {row}",
    )
    biases = [0] * len(sizes) if biases is None else biases
    check(
        len(biases) == len(sizes),
        f"append_images: biases must be one for each of {len(sizes)} images, got {biases}",
    )
    for i, bias in enumerate(biases):
        check_count("append_images", f"biases[{i}]", bias)
    tile = next((scale.tile for scale in memory.scales.values()), 1)
    check_count("append_images", "the tile of the memory", tile, 1)
    check(
        all(size % tile == 0 for size in sizes),
        f"append_images: images of a float8 memory must be whole tiles of {tile}, got"
        f" {list(sizes)}",
    )
    if memory.table is None or memory.keys[layers[0]].device != media.device:
        raise ValueError(
            f"append_images: media must be on the memory's device, which must have a table, got"
            f" {media.device} for {memory.keys[layers[0]].device}"
        )
    check_narrow("append_images", "ids", ids)
    # Everything that can fail comes before the first write.
    ids = ids.to(media.device, torch.int32)
    starts = torch.tensor((row, *sizes), dtype=torch.int64).cumsum(0)[:-1].int()
    places = torch.tensor([list(biases)], dtype=torch.int32)
    starts, places = to_device(starts, media.device), to_device(places, media.device)
    known = (*memory.sizes, *map(int, sizes))
    held = ids, starts, places
    if memory.ids is not None and memory.starts is not None and memory.biases is not None:
        places = places.expand(len(memory.biases), -1)
        held = (
            torch.cat([memory.ids, ids]),
            torch.cat([memory.starts, starts]),
            torch.cat([memory.biases, places], 1),
        )
    build_memory(
        media,
        kv_weights,
        norm_weights,
        *memory.table,
        ids,
        [memory.keys[layer] for layer in layers],
        [memory.values[layer] for layer in layers],
        [memory.scales[layer] for layer in layers] if memory.scales else None,
        row,
        eps,
    )
    # In one statement, so that no interrupt leaves it half done.
    memory.ids, memory.starts, memory.biases, memory.sizes = *held, known
    return row, row + m


def _check_held(memory: ImageMemory) -> int:
    """Check that ids, starts and biases of a memory fit its sizes; return its number of tokens."""
    check_sizes("append_images", "memory.sizes", memory.sizes, 1)
    row, images = sum(memory.sizes), len(memory.sizes)
    held = {"ids": memory.ids, "starts": memory.starts, "biases": memory.biases}
    wanted = {"ids": (row,), "starts": (images,), "biases": (images,)}
    first = next(iter(memory.keys.values()))
    check(
        first.ndim == 3,
        f"append_images: memory.keys must be [C, G, D], got {tuple(first.shape)}",
    )
    for name, t in held.items():
        if t is None:
            fits = not images
        else:
            shape = tuple(t.shape[1:] if name == "biases" else t.shape)
            fits = shape == wanted[name] and t.dtype == torch.int32 and t.device == first.device
        check(
            fits,
            f"append_images: memory.{name} must be int32 on {first.device}, for {images} images of"
            f" {row} tokens in total, got"
            f" {None if t is None else (t.dtype, tuple(t.shape), t.device)}",
        )
    layers = memory.keys.keys()
    check(
        memory.values.keys() == layers and memory.scales.keys() in (layers, set()),
        f"append_images: memory.values, and scales if any, must have the layers {list(layers)},"
        f" got {list(memory.values)} and {list(memory.scales)}",
    )
    return row
