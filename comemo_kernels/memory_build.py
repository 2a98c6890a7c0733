"""Keys and values of image tokens for every mixin layer: the image memory's one computation.

    x = media * rstd * norm_weight                        rstd = 1 / sqrt(mean(media^2) + eps)
    k, v = split(x W^T);  k = rotate(k, id)               W [2 * G * D, d], keys first

The media are the same for every layer, so their statistics are taken once and one launch of the
product builds all layers: many tiles leave no multiprocessor idle at the end. A tile of the product
holds a first and a second half of heads, so that each thread rotates what it has accumulated.
`norm_weight` either is folded into W beforehand, and rstd then scales the product (two launches in
all); or the normed media are written once for each layer, rounded as the model rounds them.
float8: a third launch takes each tile's and head's largest element for its scale.

FLOPs: 4 * M * d * G * D for each layer. Traffic: media and weights once, keys and values written
once; exact mode 2 * L * M * d elements more, float8 3/2 of what bfloat16 keys and values take.
Source: CoMemo (arXiv:2506.06279).

Letters: M image tokens, d their width, L layers, G heads, D head dimension, P rows of the rotary
table, T tiles.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import _memory_build_tma as _build_tma
from comemo_kernels import reference
from comemo_kernels._blocks import in_groups, offset_of
from comemo_kernels._op import Kernel, documented, has_float8, on_triton, register, to_device
from comemo_kernels.attention_types import MemoryScales
from comemo_kernels.reference.memory_build import check_build

# --- kernel ---


@triton.jit
def _pointer(address, like_ptr, ALIGNED: tl.constexpr):
    """A pointer of the type of another; to a multiple of 16 bytes, if ALIGNED."""
    pointer = address.to(like_ptr.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit(do_not_specialize=["media_stride", "num_rows", "width", "num_layers", "eps"])
def _norm_kernel(
    rstd_ptr,  # [M] float32
    normed_ptr,  # [L, M, d], contiguous
    media_ptr,  # [M, d], d contiguous
    address_ptr,  # [L, 4]: of W, norm weight, keys, values
    media_stride: tl.int64,
    num_rows,  # M
    width,  # d
    num_layers,
    eps,
    EXACT: tl.constexpr,  # write the normed media instead of rstd
    ALIGNED: tl.constexpr,  # stride and width are multiples of 8
    EVEN: tl.constexpr,  # BLOCK_K divides the width
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program norms BLOCK_M image tokens, for all layers."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    media_rows = media_ptr + offset_of(row, media_stride, ALIGNED)
    square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in range(0, tl.cdiv(width, BLOCK_K)):
        column = i * BLOCK_K + offs_k
        mask = mask_m[:, None]
        if not EVEN:
            mask &= (column < width)[None, :]
        x = tl.load(media_rows[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        square += x * x
    rstd = 1.0 / tl.sqrt_rn(tl.sum(square, 1) / width + eps)
    if not EXACT:
        tl.store(rstd_ptr + row, rstd, mask=mask_m)
    else:
        for i in range(0, tl.cdiv(width, BLOCK_K)):
            column = i * BLOCK_K + offs_k
            mask = mask_m[:, None]
            if not EVEN:
                mask &= (column < width)[None, :]
            x = tl.load(media_rows[:, None] + column[None, :], mask=mask, other=0.0)
            normed = (x.to(tl.float32) * rstd[:, None]).to(x.dtype)
            for layer in range(num_layers):
                address = tl.load(address_ptr + layer * 4 + 1)
                weight_ptr = _pointer(address, media_ptr, ALIGNED)
                if EVEN:
                    weight = tl.load(weight_ptr + column)
                else:
                    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0)
                first = normed_ptr + offset_of(row + layer * num_rows, width, ALIGNED)
                y = normed.to(tl.float32) * weight.to(tl.float32)[None, :]
                tl.store(first[:, None] + column[None, :], y, mask=mask)


@triton.jit(
    do_not_specialize=[
        *("x_stride_l", "x_stride_m", "out_stride_m", "out_stride_g", "table_stride"),
        *("num_rows", "width", "num_heads", "num_layers", "num_positions", "out_row"),
    ]
)
def _project_kernel(
    x_ptr,  # [L or 1, M, d]: normed, or media
    rstd_ptr,  # [M]
    ids_ptr,  # [M] int32
    cos_ptr,  # [P, HALF]
    sin_ptr,
    address_ptr,  # [L, 4]: of W, norm weight, keys, values
    x_stride_l: tl.int64,
    x_stride_m: tl.int64,
    out_stride_m: tl.int64,
    out_stride_g: tl.int64,
    table_stride: tl.int64,
    num_rows,  # M
    width,  # d
    num_heads,  # G
    num_layers,
    num_positions,  # P
    out_row,  # where the first row goes
    EXACT: tl.constexpr,
    HALF: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_K divides the width
    BLOCK_HALF: tl.constexpr,  # HALF rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,  # columns of each half: BLOCK_C / BLOCK_HALF heads
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,  # blocks of rows that follow each other on one block of columns
):
    """One program computes BLOCK_M keys, or values, of some heads of one layer."""
    HEADS: tl.constexpr = BLOCK_C // BLOCK_HALF
    blocks_m, blocks_h = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_heads, HEADS)
    pid_m, pid_c = in_groups(tl.program_id(0), blocks_m, num_layers * 2 * blocks_h, GROUP)
    layer, kind = pid_c // (2 * blocks_h), pid_c // blocks_h % 2
    row = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = row < num_rows
    offs_k = tl.arange(0, BLOCK_K)
    # Columns of a tile: the first halves of its heads, then their second halves.
    offs_n = tl.arange(0, 2 * BLOCK_C)
    head = pid_c % blocks_h * HEADS + offs_n % BLOCK_C // BLOCK_HALF
    element = offs_n % BLOCK_HALF
    mask_n = (head < num_heads) & (element < HALF)
    w_row = (kind * num_heads + head) * (2 * HALF) + offs_n // BLOCK_C * HALF + element

    table = address_ptr + layer * 4
    w_ptr = _pointer(tl.load(table), x_ptr, ALIGNED)
    out_ptr = _pointer(tl.load(table + 2 + kind), x_ptr, ALIGNED)
    x_rows = x_ptr + offset_of(layer, x_stride_l, ALIGNED) + offset_of(row, x_stride_m, ALIGNED)
    x_ptrs = x_rows[:, None] + offs_k[None, :]
    w_ptrs = w_ptr + offset_of(w_row, width, ALIGNED)[:, None] + offs_k[None, :]
    PRECISION: tl.constexpr = "ieee" if x_ptr.dtype.element_ty == tl.float32 else "tf32"
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_C], tl.float32)
    for i in tl.range(0, tl.cdiv(width, BLOCK_K)):
        mask_x, mask_w = mask_m[:, None], mask_n[:, None]
        if not EVEN:
            mask_k = (i * BLOCK_K + offs_k < width)[None, :]
            mask_x, mask_w = mask_x & mask_k, mask_w & mask_k
        x = tl.load(x_ptrs, mask=mask_x, other=0.0)
        w = tl.load(w_ptrs, mask=mask_w, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    if not EXACT:
        acc *= tl.load(rstd_ptr + row, mask=mask_m, other=0.0)[:, None]
    acc = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_C)), (0, 2, 1))
    acc1, acc2 = tl.split(acc)
    offs_c = tl.arange(0, BLOCK_C)
    head = pid_c % blocks_h * HEADS + offs_c // BLOCK_HALF
    element = offs_c % BLOCK_HALF
    mask_c = (head < num_heads) & (element < HALF)
    if kind == 0:
        distance = tl.load(ids_ptr + row, mask=mask_m, other=0)
        at = tl.abs(distance)
        known = mask_m & (at >= 0) & (at < num_positions)  # the least integer has no abs
        known = known[:, None] & (element < HALF)[None, :]
        offs = offset_of(at, table_stride, ALIGNED)[:, None] + element[None, :]
        cos = tl.load(cos_ptr + offs, mask=known, other=float("nan")).to(tl.float32)
        sin = tl.load(sin_ptr + offs, mask=known, other=float("nan")).to(tl.float32)
        sin = tl.where((distance < 0)[:, None], -sin, sin)
        turned = acc1 * cos - acc2 * sin
        acc2 = acc2 * cos + acc1 * sin
        acc1 = turned
    else:
        # Where values are NaN keys are, and reach who may read them; these would reach others.
        acc1 = tl.where(acc1 == acc1, acc1, 0.0)
        acc2 = tl.where(acc2 == acc2, acc2, 0.0)
    out_rows = out_ptr + offset_of(row + out_row, out_stride_m, ALIGNED)[:, None]
    out_ptrs = out_rows + (offset_of(head, out_stride_g, ALIGNED) + element)[None, :]
    mask = mask_m[:, None] & mask_c[None, :]
    tl.store(out_ptrs, acc1, mask=mask)
    tl.store(out_ptrs + HALF, acc2, mask=mask)


@triton.jit(
    do_not_specialize=[
        *("out_stride_m", "out_stride_g", "plane_rows", "num_rows", "num_heads", "num_tiles"),
        *("tile", "out_row"),
    ]
)
def _scale_kernel(
    x_ptr,  # [L, 2, plane_rows, G, D], contiguous
    like_ptr,  # a tensor of the output's dtype
    address_ptr,  # [L, 4]: of keys, values and their scales
    out_stride_m: tl.int64,
    out_stride_g: tl.int64,
    plane_rows,
    num_rows,  # M
    num_heads,  # G
    num_tiles,  # T
    tile,  # rows of a tile
    out_row,
    D: tl.constexpr,
    ALIGNED: tl.constexpr,  # strides are multiples of 16
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program scales one tile of one head's keys or values and stores it in float8."""
    pid = tl.program_id(0).to(tl.int64)
    head, rest = pid % num_heads, pid // num_heads
    pid_t, plane = rest % num_tiles, rest // num_tiles  # plane: layer, keys or values
    address = address_ptr + plane // 2 * 4 + plane % 2
    out_ptr = _pointer(tl.load(address), like_ptr, ALIGNED)
    scale_ptr = tl.load(address + 2).to(tl.pointer_type(tl.float32))
    offs_d = tl.arange(0, BLOCK_D)
    first = pid_t * tile
    largest = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in range(0, tl.cdiv(tile, BLOCK_M)):
        inside = i * BLOCK_M + tl.arange(0, BLOCK_M)
        row = first + inside
        mask = ((inside < tile) & (row < num_rows))[:, None] & (offs_d < D)[None, :]
        offs = ((plane * plane_rows + row) * num_heads + head)[:, None] * D + offs_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    most = tl.max(tl.max(largest, 1), 0)
    bad = tl.max(tl.max((largest != largest).to(tl.int32), 1), 0)
    scale = tl.where(most > 0.0, most / 448.0, 1.0)  # the largest float8_e4m3fn
    scale = tl.where(bad > 0, float("nan"), scale)
    tl.store(scale_ptr + (out_row // tile + pid_t) * num_heads + head, scale)
    for i in range(0, tl.cdiv(tile, BLOCK_M)):
        inside = i * BLOCK_M + tl.arange(0, BLOCK_M)
        row = first + inside
        mask = ((inside < tile) & (row < num_rows))[:, None] & (offs_d < D)[None, :]
        offs = ((plane * plane_rows + row) * num_heads + head)[:, None] * D + offs_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) / scale
        out_rows = out_ptr + offset_of(row + out_row, out_stride_m, ALIGNED, 16)
        out_rows += offset_of(head, out_stride_g, ALIGNED, 16)
        tl.store(out_rows[:, None] + offs_d[None, :], x.to(like_ptr.dtype.element_ty), mask=mask)


norm_media = Kernel(
    _norm_kernel,
    [
        {"BLOCK_M": 4, "BLOCK_K": 512, "num_warps": 4},
        {"BLOCK_M": 2, "BLOCK_K": 1024, "num_warps": 4},
    ],
)
project_media = Kernel(
    _project_kernel,
    [
        {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": 64, "GROUP": 16, "num_warps": 8, "num_stages": n}
        for m, c, n in ((128, 64, 3), (128, 128, 3))
    ],
)
project_exact = Kernel(  # float32
    _project_kernel,
    [{"BLOCK_M": 64, "BLOCK_C": 64, "BLOCK_K": 16, "GROUP": 16, "num_warps": 8, "num_stages": 3}],
)
scale_memory = Kernel(_scale_kernel, [{"BLOCK_M": 32, "num_warps": 4}])

# --- operator ---

USE_TMA = False  # not timed on a GPU yet, nor looked at for races
CHUNK = 8192  # rows whose normed, or unscaled, form is held at once


def _launch(
    media: Tensor,
    kv_weights: list[Tensor],
    norm_weights: list[Tensor],  # empty: folded
    cos: Tensor,
    sin: Tensor,
    ids: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    key_scales: list[Tensor],  # empty: not scaled
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
    block_half = max(16, triton.next_power_of_2(half))
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
    by_tma = USE_TMA and _build_tma.fits(media, kv_weights, D, aligned)
    targets, whole = address, True
    if scaled:
        targets, whole = _addresses(keys, values, key_scales, value_scales)
        whole &= all(stride % 16 == 0 for stride in keys[0].stride()[:2])
    stride_m, stride_g = (G * D, D) if scaled else keys[0].stride()[:2]
    for first in range(0, M, step):
        part = media[first : first + step]
        m = part.shape[0]
        even = d % norm_media.config["BLOCK_K"] == 0
        norm_media.launch(
            *(-(-m // norm_media.config["BLOCK_M"]), rstd, normed, part, address),
            *(part.stride(0), m, d, L, eps, exact, aligned, even),
        )
        out_row = 0 if scaled else row + first
        x, stride_l = (normed, m * d) if exact else (part, 0)
        if by_tma:
            outs = (stride_m, stride_g)
            _build_tma.launch(x, rstd, ids[first:], cos, sin, address, outs, m, (G, D), out_row)
        else:
            even = d % config["BLOCK_K"] == 0
            project.launch(
                *(-(-m // config["BLOCK_M"]) * L * 2 * blocks_h, x, rstd, ids[first:], cos, sin),
                *(address, stride_l, x.stride(-2), stride_m, stride_g),
                *(cos.stride(0), m, d, G, L, cos.shape[0], out_row),
                *(exact, half, aligned, even, block_half),
            )
        if scaled:
            tiles = -(-m // tile)
            scale_memory.launch(
                *(tiles * G * L * 2, scratch, keys[0], targets),
                *(*keys[0].stride()[:2], rows, m, G, tiles, tile, row + first),
                *(D, whole, triton.next_power_of_2(D)),
            )


def _addresses(*tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
    """Addresses [L, 4] of four sequences of L tensors, on their device; whether 16 divides them."""
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
    _check_kernel(media, kv_weights, norm_weights, cos, sin, keys, values, scales)
    scales = scales or ()
    _build(
        *(media, list(kv_weights), _listed(norm_weights), cos, sin, ids.contiguous()),
        *(list(keys), list(values), [s.keys for s in scales], [s.values for s in scales]),
        *(scales[0].tile if scales else 1, row, eps),
    )
    return None


def _listed(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    return [] if tensors is None else list(tensors)


def _check_kernel(
    media: Tensor,
    kv_weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor] | None,
    cos: Tensor,
    sin: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[MemoryScales] | None,
) -> None:
    """Raise for what the reference can do and the kernels cannot, with every reason."""
    reasons = []
    weights = [*kv_weights, *_listed(norm_weights)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (media, *weights)):
        reasons.append("no gradients are computed")
    if media.dtype == torch.float64:
        reasons.append("float64 has no kernel")
    layouts = {t.stride() for t in (*keys, *values)}
    if len(layouts) > 1 or keys[0].stride(-1) != 1 or not all(t.is_contiguous() for t in weights):
        reasons.append(
            "keys and values must have one layout, D contiguous, and weights be contiguous, got"
            f" strides {sorted(layouts)} and {[t.stride() for t in weights]}"
        )
    if media.stride(-1) != 1 or cos.stride() != sin.stride() or cos.stride(-1) != 1:
        reasons.append(
            f"media, cos and sin must be contiguous along their last dimension, got strides"
            f" {media.stride()}, {cos.stride()} and {sin.stride()}"
        )
    if keys[0].shape[-1] > 128:
        reasons.append(f"D must be at most 128, got {keys[0].shape[-1]}")
    if scales is not None:
        if not all(t.is_contiguous() for scale in scales for t in scale[:2]):
            reasons.append("scales must be contiguous")
        if media.is_cuda and not has_float8(media.get_device()):
            reasons.append("float8 needs a GPU of compute capability 8.9")
    if reasons:
        raise ValueError(
            f"build_memory: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.build_memory"
        )
