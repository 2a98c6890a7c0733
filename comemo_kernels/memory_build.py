"""Keys and values of image tokens for every mixin layer: the computation of the image memory.

    x = media * rstd * norm_weight                        rstd = 1 / sqrt(mean(media^2) + eps)
    k, v = split(x W^T);  k = rotate(k, id)               W [2 * G * D, d], keys first

All layers read the same media, so rstd is computed once, and one GEMM launch computes all layers.
Either `norm_weight` is folded into W beforehand and rstd scales the product (two launches in all);
or, in exact mode, the normalised media are written once for each layer, rounded as the model
rounds them. float8 takes a third launch, which finds the largest element of each tile and head for
its scale.

FLOPs: 4 * M * d * G * D for each layer. Traffic: media and weights once, keys and values written
once; exact mode 2 * L * M * d elements more, float8 3/2 of what bfloat16 keys and values take.
Source: CoMemo (arXiv:2506.06279).

Letters: M image tokens, d their width, L layers, G heads, D head dimension, P rows of the rotary
table, T tiles.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels import _memory_build_tma, reference
from comemo_kernels._memory_build_gemm import project_exact, project_media
from comemo_kernels._memory_build_rows import norm_media, scale_memory
from comemo_kernels._op import documented, on_triton, padded, register, to_device
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.reference.memory_build_checks import check_build, check_build_kernel

# --- operator ---

USE_TMA = True  # where `_memory_build_tma` accepts the inputs
CHUNK = 8192  # rows of normalised media, or of unscaled keys and values, that are in memory at once


def _launch(
    media: Tensor,
    kv_weights: list[Tensor],
    norm_weights: list[Tensor],  # empty: folded into kv_weights
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    key_scales: list[Tensor],  # empty: not float8
    value_scales: list[Tensor],
    tile: int,
    row: int,
    eps: float,
) -> None:
    (M, d), L, (_, G, D) = media.shape, len(kv_weights), keys[0].shape
    dtype, half = media.dtype, D // 2
    exact, scaled = bool(norm_weights), bool(key_scales)
    project = project_exact if dtype == torch.float32 else project_media
    strides = (media.stride(0), d, *keys[0].stride()[:2], cos.stride(0))
    block_half = max(16, padded(half))
    config, blocks_h = project.config, -(-G * block_half // project.config["BLOCK_C"])
    step = CHUNK // tile * tile if exact or scaled else M
    rows = min(M, step)
    rstd = torch.empty(0 if exact else rows, dtype=torch.float32, device=media.device)
    normed = torch.empty((L, rows, d) if exact else 0, dtype=dtype, device=media.device)
    scratch = torch.empty((L, 2, rows, G, D) if scaled else 0, dtype=dtype, device=media.device)
    held = list(zip(keys, values, strict=True))
    if scaled:
        held = [tuple(plane.unbind(0)) for plane in scratch]
    address, whole = _addresses(kv_weights, norm_weights or kv_weights, *zip(*held, strict=True))
    aligned = whole and all(stride % 8 == 0 for stride in strides)
    by_tma = USE_TMA and _memory_build_tma.fits(media, kv_weights, D, aligned)
    targets, whole = address, True
    if scaled:
        targets, whole = _addresses(keys, values, key_scales, value_scales)
        whole &= all(stride % 16 == 0 for stride in keys[0].stride()[:2])
    outs = (G * D, D) if scaled else keys[0].stride()[:2]  # strides of what the GEMM writes
    for first in range(0, M, step):
        part, part_ids = media[first : first + step], ids[first:]
        m = part.shape[0]
        programs = -(-m // norm_media.config["BLOCK_M"])
        even = d % norm_media.config["BLOCK_K"] == 0
        tensors = (rstd, normed, part, address)
        norm_media.launch(programs, *tensors, part.stride(0), m, d, L, eps, exact, aligned, even)

        out_row = 0 if scaled else row + first
        x, stride_l = (normed, m * d) if exact else (part, 0)
        operands = (x, rstd, part_ids, cos, sin, address)
        if by_tma:
            _memory_build_tma.launch(*operands, outs, m, (G, D), out_row)
        else:
            programs = -(-m // config["BLOCK_M"]) * L * 2 * blocks_h
            gemm_strides = (stride_l, x.stride(-2), *outs, cos.stride(0))
            sizes = (m, d, G, L, cos.shape[0], out_row)
            constants = (exact, half, aligned, d % config["BLOCK_K"] == 0, block_half)
            project.launch(programs, *operands, *gemm_strides, *sizes, *constants)

        if scaled:
            tiles = -(-m // tile)
            programs = tiles * G * L * 2
            numbers = (*keys[0].stride()[:2], rows, m, G, tiles, tile, row + first)
            block_d = padded(D)
            scale_memory.launch(programs, scratch, keys[0], targets, *numbers, D, whole, block_d)


def _addresses(*tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Addresses [L, 4] of four sequences of L tensors, on their device; whether 16 divides all."""
    rows = [[t.data_ptr() for t in layer] for layer in zip(*tensors, strict=True)]
    aligned = not any(address % 16 for row in rows for address in row)
    return to_device(torch.tensor(rows), tensors[0][0].device), aligned


_build = register(
    "build_memory(Tensor media, Tensor[] kv_weights, Tensor[] norm_weights, Tensor cos, Tensor sin,"
    " Tensor ids, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor(c!)[] key_scales,"
    " Tensor(d!)[] value_scales, int tile, int row, float eps) -> ()",
    _launch,
    lambda *_: None,
)

# --- public ---


@documented(reference.build_memory)
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
    inputs = (media, kv_weights, norm_weights, cos, sin, ids, keys, values, scales, row)
    if not on_triton(media):
        return reference.build_memory(*inputs, eps)
    check_build(*inputs)
    check_build_kernel(media, kv_weights, norm_weights, cos, sin, keys, values, scales)
    weights = (list(kv_weights), [] if norm_weights is None else list(norm_weights))
    held = (list(keys), list(values))
    scales = scales or ()
    factors = ([scale.keys for scale in scales], [scale.values for scale in scales])
    tile = scales[0].tile if scales else 1
    _build(media, *weights, cos, sin, ids.contiguous(), *held, *factors, tile, row, eps)
    return None
