"""Split an image memory into its images, and join images into the memory of another prompt."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count, to_device
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.memory import ImageMemory
from comemo_kernels.memory_tensors import memory_buffers
from comemo_kernels.reference.memory_checks import check_biases, check_sizes, check_spans


@public
def split_images(memory: ImageMemory) -> list[ImageMemory]:
    """One memory for each image, over the same storage: nothing is copied.

    Args:
        memory: of I images; with or without keys and values, of any capacity.

    Returns:
        I memories of one image each, at bias 0, with `spans` and `active` None.
        `ImageMemory.reading` or `join_images` sets spans.

    Raises:
        ValueError: a memory of absolute ids, whose keys fit one place in one prompt only; one
            without ids; float8 images that share a scale.
    """
    check(
        not memory.absolute and memory.ids is not None,
        "split_images: the memory must have ids that are not absolute, got"
        f" {'absolute ones' if memory.absolute else 'none'}",
    )
    assert memory.ids is not None
    device = memory.ids.device
    _check_held("split_images", memory)
    starts = torch.tensor((0, *memory.sizes)).cumsum(0)[:-1].tolist()
    tile = next((scale.tile for scale in memory.scales.values()), 1)
    check(
        all(start % tile == 0 for start in starts),
        f"split_images: images of a float8 memory must start at a tile of {tile}, got sizes"
        f" {list(memory.sizes)}",
    )
    images = []
    for start, size in zip(starts, memory.sizes, strict=True):
        rows = slice(start, start + size)
        tiles = slice(start // tile, -(-(start + size) // tile))
        images.append(
            ImageMemory(
                media=None if memory.media is None else memory.media[rows],
                ids=memory.ids[rows],
                sizes=(size,),
                starts=torch.zeros(1, dtype=torch.int32, device=device),
                biases=torch.zeros(1, 1, dtype=torch.int32, device=device),
                keys={layer: key[rows] for layer, key in memory.keys.items()},
                values={layer: value[rows] for layer, value in memory.values.items()},
                scales={
                    layer: MemoryScales(scale.keys[tiles], scale.values[tiles], tile)
                    for layer, scale in memory.scales.items()
                },
                table=memory.table,
            )
        )
    return images


@public
def join_images(
    images: Sequence[ImageMemory], spans: Tensor | None = None, biases: Tensor | None = None
) -> ImageMemory:
    """One memory of all these images, concatenated.

    Args:
        images: memories of one or more images each, of the same layers, with or without keys and
            values. A single memory is not copied: its tensors are shared. Absolute memories must be
            of one prompt.
        spans: integers [B, 1, 2] or [B, N, 2], what the prompts may read; None for no readers yet.
        biases: integers [I] or [B, I], ids of the first tokens of all I images in these prompts;
            None takes those of the memories.

    Returns:
        A memory with dictionaries of its own, without spare capacity unless `images` is a single
        memory.

    Raises:
        ValueError: no memory; memories without ids, or only some with absolute ids; different
            layers, tables, shapes, dtypes or devices; media of only some; float8 images that would
            share a scale.
    """
    check(len(images) > 0, "join_images: images must be at least one memory, got none")
    check_spans("join_images", spans)
    _check_alike(images)
    if len(images) == 1:
        joined = replace(images[0], spans=spans, active=None)
        joined.keys, joined.values = dict(joined.keys), dict(joined.values)
        joined.scales = dict(joined.scales)
    else:
        joined = _concatenate(images)
        joined.spans = spans
    if biases is not None:
        joined.biases = check_biases("join_images", biases, len(joined.sizes))
    return joined


def _check_alike(images: Sequence[ImageMemory]) -> None:
    """Raise for memories that cannot be concatenated."""
    first = images[0]
    for image in images:
        _check_held("join_images", image)
        check(
            image.ids is not None and image.absolute == first.absolute,
            "join_images: each memory must have an id for each of its tokens, all absolute or none,"
            f" got absolute={image.absolute} after {first.absolute} and ids"
            f" {None if image.ids is None else tuple(image.ids.shape)} for sizes {image.sizes}",
        )
        check(
            image.keys.keys() == image.values.keys() == first.keys.keys(),
            "join_images: all memories must have keys and values of the same layers, got"
            f" {sorted(first.keys)} and {sorted(image.keys)}",
        )
        check(
            (image.media is None) == (first.media is None)
            and image.scales.keys() == first.scales.keys(),
            "join_images: all memories must have media and float8 scales, or none, got media"
            f" {[i.media is not None for i in images]} and scales"
            f" {[bool(i.scales) for i in images]}",
        )
        kinds, wanted = _kinds(image), _kinds(first)
        check(
            kinds == wanted,
            "join_images: all memories must have the widths, dtypes and devices of the first"
            f" {wanted}, got {kinds}",
        )
    tile = next((scale.tile for scale in first.scales.values()), 1)
    check(
        all(len(image) % tile == 0 for image in images[:-1])
        and all(scale.tile == tile for image in images for scale in image.scales.values()),
        f"join_images: float8 images must be whole tiles of {tile} except for the last, got sizes"
        f" {[len(image) for image in images]}",
    )
    tables = [image.table for image in images if image.table is not None]
    for table in tables[1:]:
        check(
            all(a is b or torch.equal(a, b) for a, b in zip(table, tables[0], strict=True)),
            "join_images: all memories must have one table of angles, got different ones",
        )


def _check_held(verb: str, memory: ImageMemory) -> None:
    """Raise for a memory whose tensors do not fit its sizes."""
    check_sizes(verb, "the sizes of a memory", memory.sizes, 0)
    M, images = sum(memory.sizes), len(memory.sizes)
    check(
        memory.ids is None or memory.ids.shape == (M,),
        f"{verb}: a memory must have an id for each of its tokens, got ids"
        f" {None if memory.ids is None else tuple(memory.ids.shape)} for sizes {memory.sizes}",
    )
    check(
        memory.biases is None or (memory.biases.ndim == 2 and memory.biases.shape[1] == images),
        f"{verb}: a memory must have biases [B, I] of its {images} images, got"
        f" {None if memory.biases is None else tuple(memory.biases.shape)}",
    )
    media = [] if memory.media is None else [memory.media]
    keys, values = memory.keys.values(), memory.values.values()
    for kind, tensors, ndim in (("media", media, 2), ("keys", keys, 3), ("values", values, 3)):
        for t in tensors:
            check(
                t.ndim == ndim and t.shape[0] >= M,
                f"{verb}: {kind} of a memory must have {ndim} dimensions and a row for each of"
                f" {M} tokens, got {tuple(t.shape)}",
            )
    for scale in memory.scales.values():
        check_count(verb, "the tile of a memory", scale.tile, 1)
        for t in scale[:2]:
            check(
                t.ndim == 2 and t.shape[0] * scale.tile >= M,
                f"{verb}: scales of a memory must be [T, G], T tiles of {scale.tile} for {M}"
                f" tokens, got {tuple(t.shape)}",
            )


def _kinds(image: ImageMemory) -> list[tuple[tuple[int, ...], torch.dtype, torch.device]]:
    """Widths, dtypes and devices of media, ids, keys and values."""
    held = (image.media, image.ids, *image.keys.values(), *image.values.values())
    return [(tuple(t.shape[1:]), t.dtype, t.device) for t in held if t is not None]


def _concatenate(images: Sequence[ImageMemory]) -> ImageMemory:
    first, sizes = images[0], tuple(size for image in images for size in image.sizes)
    assert first.ids is not None
    device = first.ids.device
    tile = next((scale.tile for scale in first.scales.values()), 1)
    places = [i.biases if i.biases is not None else torch.zeros(1, len(i.sizes)) for i in images]
    prompts = max(len(p) for p in places)
    check(
        all(len(p) in (1, prompts) for p in places),
        "join_images: biases of all memories must be for the same prompts, got those of"
        f" {[len(p) for p in places]}",
    )

    def join_scales(layer: int) -> MemoryScales:
        used = [(i.scales[layer], -(-len(i) // tile)) for i in images]
        keys = torch.cat([scale.keys[:tiles] for scale, tiles in used])
        values = torch.cat([scale.values[:tiles] for scale, tiles in used])
        return MemoryScales(keys, values, tile)

    def join(layers: dict[int, Tensor], parts: list[dict[int, Tensor]]) -> dict[int, Tensor]:
        joined = {}
        for layer, (_, G, D) in ((layer, t.shape) for layer, t in layers.items()):
            of_layer = [part[layer][: len(i)] for part, i in zip(parts, images, strict=True)]
            joined[layer] = memory_buffers(
                1, sum(sizes), G, D, of_layer[0].dtype, of_layer[0].device
            )[0, 0]
            start = 0
            for rows in of_layer:  # slices: autograd does not allow writes into views of `split`
                joined[layer][start : start + len(rows)].copy_(rows)
                start += len(rows)
        return joined

    return ImageMemory(
        media=None if first.media is None else torch.cat([i.media for i in images]),
        ids=torch.cat([i.ids for i in images]),
        sizes=sizes,
        starts=to_device(torch.tensor((0, *sizes)).cumsum(0)[:-1].int(), device),
        biases=torch.cat([p.to(device).int().expand(prompts, -1) for p in places], 1),
        keys=join(first.keys, [image.keys for image in images]),
        values=join(first.values, [image.values for image in images]),
        scales={layer: join_scales(layer) for layer in first.scales},
        table=next((image.table for image in images if image.table is not None), None),
        absolute=first.absolute,
    )
