"""Keys and values of image tokens, in PyTorch."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._cpu_products import cpu_product
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.reference.attention_groups import rotate_by_distance
from comemo_kernels.reference.dtypes import FLOAT8
from comemo_kernels.reference.memory_build_checks import check_build
from comemo_kernels.reference.norms import rms_norm

FLOAT8_MAX = 448.0  # of float8_e4m3fn


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

    k, v = split(rms_norm(media) W^T), k rotated by `ids`. On a GPU one GEMM builds all layers.
    A NaN in a value is written as 0, so that it cannot reach tokens that do not read this row; its
    key is NaN then too, which reaches those that do. Source: CoMemo (arXiv:2506.06279).

    Args:
        media: [M, d] projected image tokens; float16, bfloat16 or float32, on a CPU also float64.
        kv_weights: of each layer [2 * G * D, d], the rows of keys first; on a GPU contiguous.
        norm_weights: of each layer [d]; None if they are folded into `kv_weights`.
        cos, sin: [P, D/2], a row for each id from 0 to P - 1. A larger id gives NaN.
        ids: int32 [M], of any sign: index of each token in its image, or in its prompt.
        keys, values: of each layer [C, G, D], written from `row` on; the dtype of media, or
            float8_e4m3fn with `scales`; all with the same strides, D at most 128 on a GPU.
        scales: of each layer, written for the tiles that are built: they map the largest element
            of a tile and head to the largest float8.
        row: first row to write; with `scales` the first row of a tile.
        eps: of the norm.

    Returns:
        None.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; more rows than the capacity C; keys
            or values that cannot be written or share memory; gradients that are required, which
            `project_memory` computes; on a GPU layouts or float64 that the kernels do not support.
            Nothing is written then.
    """
    check_build(media, kv_weights, norm_weights, cos, sin, ids, keys, values, scales, row)
    with torch.no_grad():
        _write(media, kv_weights, norm_weights, cos, sin, ids, keys, values, scales, row, eps)


def _write(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[MemoryScales] | None,
    row: int,
    eps: float,
) -> None:
    M, (_, G, D) = media.shape[0], keys[0].shape
    rows = slice(row, row + M)
    built = project_layers(media, kv_weights, norm_weights, cos, sin, ids, G, eps)
    for layer, (k, v) in enumerate(built):
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


def project_layers(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    heads: int,
    eps: float,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [M, G, D] of one layer after the other."""
    normed = rms_norm(media, None, eps)
    for layer, weight in enumerate(kv_weights):
        x = normed if norm_weights is None else norm_weights[layer] * normed
        k, v = rearrange(cpu_product(x, weight), "m (kv g d) -> kv m g d", kv=2, g=heads)
        yield rotate_by_distance(k, ids, cos, sin), v.masked_fill(v.isnan(), 0)
