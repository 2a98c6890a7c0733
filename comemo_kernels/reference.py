"""What each kernel must compute, in plain PyTorch: the specification, and the CPU path.

Same names and signatures as the public functions of the package. Each function works in the
dtype it is given (rotations and angles in float32 at least); the tests run it in float64 as the
truth and in the tested dtype as the yardstick.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head
dimension, T tiles, S tokens along a tile's side, C channels of the vision tower, d width of
the language model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._checks import check_prompt_grids, check_rotary, pack_prompt_grids
from comemo_kernels._op import check
from comemo_kernels.grids import (
    Grid,
    ImageGrids,
    check_grid,
    check_tile_order,
    image_tokens,
    thumbnail_cells,
)


def image_position_ids(
    grid: Grid,
    side: int = 16,
    tile_order: str = "row",
    bias: int = 0,
    thumbnail: bool = True,
) -> Tensor:
    """RoPE-DHR position ids of one image's tokens: tiles row-major, then the thumbnail.

    A tile token gets the id of the thumbnail cell that covers the same place:
    `f(j, r, rows) * S + f(i, c, cols)` for tile column i, tile row j, raster row r, raster
    column c, with `f(k, t, n) = max(S*((S-1)*k + t) - 1, 0) // ((S-1)*n)`.
    Source: CoMemo (arXiv:2506.06279); exact integers instead of the published float linspace.

    Args:
        grid: (cols, rows) of tiles; up to one tile there is only the thumbnail's raster.
        side: S, tokens along a tile's side.
        tile_order: "row" gives tile t the ids of its own place; "column" those of column
            t // rows, row t % rows, as the published code does.
        bias: id of the image's first thumbnail token.
        thumbnail: whether images of more than one tile carry a thumbnail.

    Returns:
        int64 [image_tokens(grid, side, thumbnail)], each in [bias, bias + S*S).

    Raises:
        ValueError: a negative grid, a side below 1 or an unknown tile order.
    """
    check_grid("image_position_ids", grid, side)
    check_tile_order("image_position_ids", tile_order)
    cols, rows = grid
    tokens = image_tokens(grid, side, thumbnail)
    return bias + thumbnail_cells(torch.arange(tokens), cols, rows, side, tile_order)


def rope_dhr_positions(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Grid] | Tensor,
    side: int = 16,
    tile_order: str = "row",
    thumbnail: bool = True,
    validate: bool = True,
) -> Tensor:
    """RoPE-DHR position ids of whole prompts.

    Text counts 0, 1, ...; an image whose first token would be `bias` spends the ids
    [bias, bias + S*S) whatever its tile count; padding gets 0. On a GPU it is one launch.
    Source: CoMemo (arXiv:2506.06279).

    Args:
        image_mask: bool [B, N], True at image tokens.
        attention_mask: [B, N], 0 at padding.
        grids: (cols, rows) of every image, in reading order, prompt after prompt; a list, or
            integers [I, 2], best on the CPU: of a tensor on a GPU the host has to wait.
        side, tile_order, thumbnail: as of `image_position_ids`.
        validate: whether to look if the grids fit the mask, for which the host waits for the
            GPU; without it ids of prompts that do not fit mean nothing.

    Returns:
        int64 [B, N] on the masks' device.

    Raises:
        ValueError: masks of different shapes or devices; an unknown tile order; with `validate`,
            grids that ask for another number of image tokens than the prompts hold, or an image
            torn apart by text or by a prompt's end.
    """
    packed = pack_prompt_grids(image_mask, attention_mask, grids, side, tile_order, thumbnail)
    B, N = image_mask.shape
    text = attention_mask.bool() & ~image_mask
    text_before = text.cumsum(1) - text.long()
    if not len(packed.table):
        ids = text_before
        whole = ~image_mask
    else:
        # Where images are whole, counts alone tell everything: how many image tokens of all
        # prompts lie before a token says which images are complete there.
        seen = image_mask.reshape(-1).long().cumsum(0).view(B, N) - image_mask.long()
        offset, _, cols, rows = packed.table.long().t().contiguous()  # [I] each
        image = (torch.searchsorted(offset, seen, right=True) - 1).clamp(min=0)  # [B, N]
        place = seen - offset[image]  # in its image, of an image token
        complete = image + (~image_mask & (place > 0)).long()
        before = seen[:, :1]  # all prompts ahead
        ahead = image[:, :1] + (before > offset[image[:, :1]]).long()
        cells = thumbnail_cells(place, cols[image], rows[image], side, tile_order)
        ids = text_before + side**2 * (complete - ahead) + torch.where(image_mask, cells, 0)
        follows = F.pad(image_mask[:, :-1], (1, 0))  # on an image token
        whole = ~image_mask | (((place == 0) | follows) & (seen < packed.end))
    if validate:
        check_prompt_grids(image_mask, packed, whole)
    return torch.where(text | image_mask, ids, 0)


def rotary_table(
    position_ids: Tensor,
    dim: int,
    theta: float = 10000.0,
    factor: float | None = None,
    length: Tensor | None = None,
    max_length: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's rotary angles.

    With `factor`, dynamic-NTK scaling: from `length` > `max_length` on, theta grows by
    `(factor * length / max_length - (factor - 1)) ** (dim / (dim - 2))`. It depends on this call
    only: a long prompt leaves nothing behind.

    Args:
        position_ids: [B, N] integers (floats for interpolated positions).
        dim: D, even.
        theta: base of the angles.
        factor: dynamic-NTK factor, or None.
        length: [B] tokens or positions of each prompt; needed with `factor`.
        max_length: length up to which nothing is scaled.

    Returns:
        cos, sin: float32 [B, N, D/2] of angles in radians.

    Raises:
        ValueError: an odd `dim`, or `factor` without `length`.
    """
    check(dim % 2 == 0, f"rotary_table: dim must be even, got {dim}")
    exponent = torch.arange(0, dim, 2, device=position_ids.device).float() / dim  # [D/2]
    if factor is None:
        frequency = (1.0 / theta**exponent)[None]  # [1, D/2]
    else:
        check(length is not None, "rotary_table: factor needs the length of each prompt, got None")
        assert length is not None
        growth = (factor * length.double() / max_length - (factor - 1)).clamp(min=1.0)
        base = theta * growth ** (dim / (dim - 2))  # [B], exactly theta where nothing is scaled
        frequency = 1.0 / base.float()[:, None] ** exponent
    angle = position_ids.float()[:, :, None] * frequency[:, None]
    return angle.cos(), angle.sin()


def apply_rotary(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | ImageGrids | None = None,
    inplace: bool = False,
    published: bool = False,
    validate: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Rotate the halves of each head of queries and keys (rotate-half, as in Llama).

    On a GPU it is one launch for both, reading and writing each once.

    Args:
        q: [B, N, H, D] or, packed, [T, H, D]; float16, bfloat16, float32 or float64. On a GPU D
            must be contiguous; the other strides are free, as of a view into a packed qkv or of
            `x.transpose(1, 2)`.
        k: [B, N, G, D] or [T, G, D], the dtype of `q`; None to rotate `q` alone.
        cos, sin: floating point, of angles in radians. With `positions` [P, R/2], a row for each
            id; without [B or 1, N, R/2] or [T, R/2], a row for each token. The first R of D are
            rotated, the others copied. Of a table that repeats its halves, as transformers has,
            give the first half: `cos[..., : D // 2]`.
        positions: int32 or int64 [B or 1, N] or [T] ids in any order, each in [0, P); or
            `ImageGrids`, from which a kernel derives the ids itself; None: see cos.
        inplace: write into `q` and `k` and return them; autograd follows.
        published: round cos and sin to the dtype of `q` first, as the published model does.
        validate: whether to look for ids beyond the table, for which the host waits for the GPU.
            Without it such a token's rotated part becomes NaN.

    Returns:
        q and k (None if None was given), rotated, in their dtype; computed in float32, of float64
        in float64. Differentiable in q and k.

    Raises:
        ValueError: shapes, dtypes, devices or strides that do not fit; an expanded tensor to be
            written in place; grids whose tokens overrun the sequence; ids beyond the table if
            `validate`; on a GPU a table that requires grad.
    """
    check_rotary(q, k, cos, sin, positions, inplace, validate)
    exact = torch.promote_types(q.dtype, torch.float32)
    tokens = q.shape[:-2]
    ids = positions
    if isinstance(positions, ImageGrids):
        ids = positions.position_ids(tokens.numel()).view(tokens)
    if ids is not None:
        cos, sin = _rows(cos, ids), _rows(sin, ids)
    if published:
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
    cos, sin = cos.to(exact).unsqueeze(-2), sin.to(exact).unsqueeze(-2)  # [B, N, 1, R/2]
    return tuple(None if x is None else _rotate(x, cos, sin, inplace) for x in (q, k))  # type: ignore[return-value]


def _rows(table: Tensor, ids: Any) -> Tensor:
    """[..., R/2] rows of `table` [P, R/2] for integers `ids` [...]; NaN for ids beyond it."""
    known = (ids >= 0) & (ids < table.shape[0])
    rows = table[torch.where(known, ids, 0).long()]
    return torch.where(known[..., None], rows, float("nan"))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inplace: bool) -> Tensor:
    R = 2 * cos.shape[-1]
    x1, x2 = x[..., :R].to(cos.dtype).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)
    if inplace:
        x[..., :R].copy_(rotated)
        return x
    return rotated if x.shape[-1] == R else torch.cat([rotated, x[..., R:]], dim=-1)


def attend_images(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    """Every query reads its own span of the image memory: softmax(q k^T / sqrt(D)) v.

    Spans are the only mask: packed samples, ragged batches, prompts that share one memory.
    Queries of equal span are computed together, so beams read their memory once.

    Args:
        q: [B, N, H, D], rotated.
        k, v: [M, G, D], k rotated; H a multiple of G.
        spans: integers [B, N, 2] or [B, 1, 2], half-open [start, end) in [0, M].

    Returns:
        [B, N, H, D]; zeros, with zero gradients, where a span is empty.

    Raises:
        ValueError: shapes that do not fit, or (where that needs no synchronisation) a span
            outside the memory.
    """
    B, N, H, D = q.shape
    M, G = k.shape[:2]
    check(
        k.shape == v.shape == (M, G, D) and G > 0 and H % G == 0,
        f"attend_images: k {tuple(k.shape)} and v {tuple(v.shape)} must be [M, G, {D}] with G"
        f" dividing {H}",
    )
    check(
        tuple(spans.shape) in ((B, N, 2), (B, 1, 2)),
        f"attend_images: spans {tuple(spans.shape)} must be {(B, N, 2)} or {(B, 1, 2)}",
    )
    if spans.is_cuda or torch.compiler.is_compiling():
        return _attend_masked(q, k, v, spans)  # the values of the spans are not at hand
    spans = spans.expand(B, N, 2).reshape(-1, 2)
    distinct, owner = torch.unique(spans, dim=0, return_inverse=True)
    check(
        not len(spans) or bool((distinct >= 0).all() and (distinct <= M).all()),
        f"attend_images: spans must lie in [0, {M}], got {distinct.tolist()}",
    )
    flat = q.reshape(B * N, H, D)
    out = torch.zeros_like(flat)
    for index, (start, end) in enumerate(distinct.tolist()):
        if start >= end:
            continue
        if len(distinct) == 1:  # one span: no gathering
            return _attend(flat, k[start:end], v[start:end]).view(B, N, H, D)
        rows = (owner == index).nonzero().squeeze(1)
        out = out.index_copy(0, rows, _attend(flat[rows], k[start:end], v[start:end]))
    return out.view(B, N, H, D)


def fold_tiles(tokens: Tensor, ratio: float = 0.5, version: str = "v2") -> Tensor:
    """Fold each square neighbourhood of a token raster into channels ("pixel shuffle").

    Args:
        tokens: [T, h, w, C].
        ratio: side of the folded raster over that of `tokens`; 1/ratio an integer n.
        version: "v2" keeps the raster order, "v1" yields the transposed raster.

    Returns:
        "v2": [T, h/n, w/n, C*n*n], channels ordered (row, column, C) inside the fold;
        "v1": [T, w/n, h/n, C*n*n], its transpose.

    Raises:
        ValueError: a raster that n does not divide, or an unknown version.
    """
    T, h, w, C = tokens.shape
    n = round(1 / ratio)
    check(
        h % n == 0 and w % n == 0,
        f"fold_tiles: a raster of {h} x {w} cannot be folded by {n} x {n}",
    )
    check(version in ("v1", "v2"), f"fold_tiles: version must be 'v1' or 'v2', got {version!r}")
    x = tokens.reshape(T, h // n, n, w // n, n, C).permute(0, 1, 3, 2, 4, 5)
    x = x.reshape(T, h // n, w // n, n * n * C)
    return x.transpose(1, 2) if version == "v1" else x


def project_tiles(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    ratio: float = 0.5,
    version: str = "v2",
    eps: float = 1e-5,
) -> Tensor:
    """Vision tokens to image tokens: drop the class token, fold, LayerNorm, Linear, GELU, Linear.

    Args:
        tokens: [T, 1 + h*h, C], the vision tower's output with its class token.
        norm_weight, norm_bias: [C*n*n], n = 1/ratio.
        weight1, bias1: [d, C*n*n], [d].
        weight2, bias2: [d, d], [d].
        ratio, version: as of `fold_tiles`.
        eps: of the LayerNorm.

    Returns:
        [T, (h/n)**2, d].

    Raises:
        ValueError: a token count that is not 1 + a square, or widths that do not fit.
    """
    T, count, C = tokens.shape
    h = int((count - 1) ** 0.5)
    check(
        h > 0 and h * h == count - 1,
        f"project_tiles: tokens must be [T, 1 + h*h, C], got {tuple(tokens.shape)}",
    )
    width = C * round(1 / ratio) ** 2
    check(
        norm_weight.shape == (width,) and weight1.shape[1] == width,
        f"project_tiles: the norm and first weight must take {width} channels, got"
        f" {tuple(norm_weight.shape)} and {tuple(weight1.shape)}",
    )
    x = fold_tiles(tokens[:, 1:].reshape(T, h, h, C), ratio, version).flatten(1, 2)
    x = F.layer_norm(x, (width,), norm_weight, norm_bias, eps)
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """[R, H, D] queries over [M, G, D] keys, all heads in one SDPA call."""
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))  # [1, H, R, D]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
    return out.squeeze(0).transpose(0, 1)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, spans: Tensor) -> Tensor:
    B, N, H, D = q.shape
    place = torch.arange(k.shape[0], device=q.device)
    seen = (place >= spans[..., :1]) & (place < spans[..., 1:])  # [B, N or 1, M]
    seen = seen.expand(B, N, -1).reshape(B * N, -1)
    # An empty span attends to everything and is then zeroed: softmax over nothing is NaN.
    some = seen.any(-1, keepdim=True)
    out = _attend(q.reshape(B * N, H, D), k, v, seen | ~some)
    return torch.where(some[..., None], out, 0).view(B, N, H, D)
