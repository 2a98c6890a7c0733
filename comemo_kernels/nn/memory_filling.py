"""Keys and values of several layers, built at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import comemo_kernels as ops
from comemo_kernels._arguments import public
from comemo_kernels.memory import ImageMemory
from comemo_kernels.nn.gated_cross_attention import (
    angles_of,
    build_keys,
    check_media,
    norm_of_media,
)
from comemo_kernels.plain import is_plain, is_untouched

Built = list[tuple[Tensor, Tensor]]


@public
def fill_memory(layers: Sequence[nn.Module], memory: ImageMemory) -> None:
    """Build keys and values of several `GatedCrossAttention` layers from the media of a memory.

    The memory is filled under each layer's `layer_idx`; keys that it has are replaced. On a GPU
    layers that are alike are built in the two launches of `build_memory`, with gradients or under
    autocast by `project_memory`. A layer whose norm or projection has to be called builds its own;
    if the layer itself provides their weights, by hooks of sharding or offloading, nothing is built
    for it here, and each of its calls builds what it reads.

    Args:
        layers: of one or several shapes, each with another `layer_idx`.
        memory: with media [M, media_dim] on the device of the layers; it gets new dictionaries of
            keys and values after everything is computed. What `reading` returned before does not
            see them.

    Returns:
        None.

    Raises:
        ValueError: no layers, an index that occurs twice, a memory without media, media that do not
            fit the layers. The memory is unchanged then.
    """
    indices = [getattr(layer, "layer_idx", None) for layer in layers]
    if not indices or None in indices or len(set(indices)) != len(indices):
        raise ValueError(
            "fill_memory: layers must be GatedCrossAttention modules, each of another layer_idx,"
            f" got {[type(layer).__name__ for layer in layers]} of {indices}"
        )
    media = memory.media
    if media is None:
        raise ValueError("fill_memory: memory must have media to build keys from, got None")
    built: dict[int, tuple[Tensor, Tensor]] = {}
    alike: dict[Any, list[Any]] = {}
    for layer in layers:
        check_media("fill_memory", layer, memory)
        norm, linear = norm_of_media(layer), layer.kv_proj
        if is_plain(norm, linear):
            weight = linear.weight
            kind = (norm.eps, norm.weight is None, weight.shape, weight.dtype, weight.device)
            alike.setdefault((*kind, layer.num_key_value_heads, layer.head_dim), []).append(layer)
        elif is_untouched(layer):
            built[_index(layer)] = build_keys(layer, memory)
    for group in alike.values():
        pairs = _build_together(group, memory)
        built |= {_index(layer): pair for layer, pair in zip(group, pairs, strict=True)}
    keys = {**memory.keys, **{index: pair[0] for index, pair in built.items()}}
    values = {**memory.values, **{index: pair[1] for index, pair in built.items()}}
    scales = {index: scale for index, scale in memory.scales.items() if index not in built}
    # In one statement, so that no interrupt leaves it half done.
    memory.keys, memory.values, memory.scales = keys, values, scales


def _index(layer: Any) -> int:
    return layer.layer_idx


def _build_together(layers: list[Any], memory: ImageMemory) -> Built:
    """Keys and values of layers whose norms and projections have the same shapes."""
    media, first = memory.media, layers[0]
    assert media is not None
    G, D, eps = first.num_key_value_heads, first.head_dim, norm_of_media(first).eps
    ids, table = angles_of(memory, D)
    weights = [layer.kv_proj.weight for layer in layers]
    scales = [norm_of_media(layer).weight for layer in layers]
    norms = None if scales[0] is None else scales
    learning = torch.is_grad_enabled() and any(
        t.requires_grad for t in (media, *weights, *(norms or ()))
    )
    if learning or torch.is_autocast_enabled(media.device.type):
        keys, values = ops.project_memory(media, weights, norms, *table, ids, G, eps)
        return list(zip(keys, values, strict=True))
    held = ops.memory_buffers(len(layers), len(media), G, D, media.dtype, media.device)
    keys, values = held[0].unbind(0), held[1].unbind(0)
    ops.build_memory(media, weights, norms, *table, ids, keys, values, eps=eps)
    return list(zip(keys, values, strict=True))
