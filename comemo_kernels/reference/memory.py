"""Keys and values of image tokens, in PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._checks import FLOAT8
from comemo_kernels._checks_memory import check_build
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.reference.attention import turn
from comemo_kernels.reference.fused_linear import rms_norm

FLOAT8_MAX = 448.0  # of float8_e4m3fn


@torch.no_grad()
@public
def build_memory(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[MemoryScales] | None = None,
    row: int = 0,
    eps: float = 1e-5,
) -> None:
    """Write keys and values of image tokens, for every layer, into rows of the image memory.

    k, v = split(rms_norm(media) W^T), k rotated by `ids`. On a GPU one product builds all layers.
    A value that is NaN is written as 0: its key is NaN and reaches whoever may read it, and the
    value cannot reach who may not. Source: CoMemo (arXiv:2506.06279).

    Args:
        media: [M, d] projected image tokens; float16, bfloat16 or float32, on a CPU also float64.
        kv_weights: of each layer [2 * G * D, d], rows of keys first; on a GPU contiguous.
        norm_weights: of each layer [d]; None if they are folded into `kv_weights`.
        cos, sin: [P, D/2], a row for each id from 0 on. An id beyond gives NaN.
        ids: int32 [M], of any sign: place of each token in its image, or in its prompt.
        keys, values: of each layer [C, G, D], written from `row` on; the dtype of media, or
            float8_e4m3fn with `scales`; of one layout, D at most 128 on a GPU.
        scales: of each layer, written where the tiles are: the largest element of a tile and head
            becomes the largest float8.
        row: first row to write, with `scales` the first of a tile.
        eps: of the norm.

    Returns:
        None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; more rows than the capacity C; keys
            or values that cannot be written or lie in one place; on a GPU layouts, float64 or
            gradients that the kernels do not know. Nothing is written then.
    """
    check_build(media, kv_weights, norm_weights, cos, sin, ids, keys, values, scales, row)
    M, (_, G, D) = media.shape[0], keys[0].shape
    rows = slice(row, row + M)
    normed = rms_norm(media, None, eps)
    for layer, weight in enumerate(kv_weights):
        x = normed if norm_weights is None else norm_weights[layer] * normed
        kv = F.linear(x, weight).view(M, 2, G, D)
        k, v = turn(kv[:, 0], ids, cos, sin), kv[:, 1].masked_fill(kv[:, 1].isnan(), 0)
        if scales is None:
            keys[layer][rows], values[layer][rows] = k, v
            continue
        scale = scales[layer]
        for x, held, factors in ((k, keys, scale.keys), (v, values, scale.values)):
            exact = F.pad(x.float(), (0, 0, 0, 0, 0, -M % scale.tile))
            tiles = exact.view(-1, scale.tile, G, D)
            largest = tiles.abs().amax((1, 3)) / FLOAT8_MAX  # [T, G]
            largest = torch.where(largest == 0, 1.0, largest)
            first = row // scale.tile
            factors[first : first + len(tiles)] = largest
            scaled = (tiles / largest[:, None, :, None]).view(-1, G, D)[:M]
            held[layer][rows] = scaled.to(FLOAT8)
