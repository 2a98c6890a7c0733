"""What each kernel must compute, in plain PyTorch: the specification, and the CPU path.

Same names and signatures as the public functions of the package. Each function works in the
dtype it is given (rotations and angles in float32 at least); the tests run it in float64 as the
truth and in the tested dtype as the yardstick.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head
dimension, T tiles, S tokens along a tile's side, C channels of the vision tower, d width of
the language model.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._op import check

Grid = tuple[int, int]  # (cols, rows) of tiles


def image_tokens(grid: Grid, side: int = 16, thumbnail: bool = True) -> int:
    """Tokens of one image: S*S per tile, and S*S for the thumbnail where there is one.

    Args:
        grid: (cols, rows) of tiles; 0 x 0 is a video frame: one picture, no tiles.
        side: S.
        thumbnail: whether images of more than one tile carry a thumbnail.

    Returns:
        Number of tokens, a multiple of S*S.

    Raises:
        ValueError: a negative grid or a side below 1.
    """
    tiles = _check_grid("image_tokens", grid, side)
    return side * side * (tiles + 1 if thumbnail and tiles > 1 else max(tiles, 1))


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
    tiles = _check_grid("image_position_ids", grid, side)
    check(
        tile_order in ("row", "column"),
        f"image_position_ids: tile_order must be 'row' or 'column', got {tile_order!r}",
    )
    raster = torch.arange(side * side)
    if tiles <= 1:
        return bias + raster
    cols, rows = grid

    def cells(n: int) -> Tensor:  # [n, S]: thumbnail row or column under each raster row or column
        k, t = torch.arange(n)[:, None], torch.arange(side)
        # A raster of one token has one cell; the formula would divide by zero.
        return (side * ((side - 1) * k + t) - 1).clamp(min=0) // max((side - 1) * n, 1)

    ids = cells(rows)[:, None, :, None] * side + cells(cols)[None, :, None, :]  # [rows, cols, S, S]
    if tile_order == "column":
        ids = ids.transpose(0, 1)
    ids = ids.reshape(-1)
    return bias + (torch.cat([ids, raster]) if thumbnail else ids)


def rope_dhr_positions(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Grid],
    side: int = 16,
    tile_order: str = "row",
    thumbnail: bool = True,
) -> Tensor:
    """RoPE-DHR position ids of whole prompts.

    Text counts 0, 1, ...; an image whose first token would be `bias` spends the ids
    [bias, bias + S*S) whatever its tile count; padding gets 0.

    Args:
        image_mask: bool [B, N], True at image tokens.
        attention_mask: [B, N], 0 at padding.
        grids: (cols, rows) of every image, in reading order, prompt after prompt.
        side, tile_order, thumbnail: as of `image_position_ids`.

    Returns:
        int64 [B, N] on the masks' device.

    Raises:
        ValueError: masks of different shapes; grids that ask for another number of image
            tokens than the prompts hold; an image torn apart by text or by a prompt's end.
    """
    check(
        image_mask.shape == attention_mask.shape and image_mask.ndim == 2,
        "rope_dhr_positions: image_mask and attention_mask must have one shape [B, N], got"
        f" {tuple(image_mask.shape)} and {tuple(attention_mask.shape)}",
    )
    counts = [image_tokens(grid, side, thumbnail) for grid in grids]
    where = image_mask.reshape(-1).nonzero().squeeze(1)  # flat places of all image tokens
    check(
        sum(counts) == len(where),
        f"rope_dhr_positions: {len(counts)} grids of {sum(counts)} image tokens for prompts that"
        f" hold {len(where)}",
    )
    advance = attention_mask.bool().to(torch.int64)  # ids that each token uses up
    advance[image_mask] = 0
    relative = torch.zeros_like(advance)
    if counts:
        last = torch.tensor(counts, device=where.device).cumsum(0) - 1
        first = torch.cat([last.new_zeros(1), last[:-1] + 1])
        whole = (where[last] - where[first] == last - first) & (
            where[last] // image_mask.shape[1] == where[first] // image_mask.shape[1]
        )
        check(
            bool(whole.all()),
            f"rope_dhr_positions: images of {counts} tokens must each be one run of image tokens"
            f" in one prompt, got whole = {whole.tolist()}",
        )
        ids = [image_position_ids(grid, side, tile_order, 0, thumbnail) for grid in grids]
        relative.view(-1)[where] = torch.cat(ids).to(where.device)
        advance.view(-1)[where[last]] = side * side
    return advance.cumsum(1) - advance + relative


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


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of each head of `x` (rotate-half, as in Llama).

    Args:
        x: [B, N, H, D].
        cos, sin: [B or 1, N, D/2]; the published model rounds them to the dtype of `x` first.

    Returns:
        [B, N, H, D] in the dtype of `x`, computed in float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not fit.
    """
    wanted = (x.shape[1], x.shape[-1] // 2)
    check(
        x.shape[-1] % 2 == 0 and cos.shape[1:] == sin.shape[1:] == wanted,
        f"apply_rotary: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be"
        f" [B, {wanted[0]}, {wanted[1]}] for x {tuple(x.shape)}",
    )
    exact = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(exact).unsqueeze(2), sin.to(exact).unsqueeze(2)  # [B, N, 1, D/2]
    x1, x2 = x.to(exact).chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


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


def _check_grid(name: str, grid: Grid, side: int) -> int:
    cols, rows = grid
    check(cols >= 0 and rows >= 0, f"{name}: grid must be (cols, rows) >= 0, got {tuple(grid)}")
    check(side >= 1, f"{name}: side must be at least 1, got {side}")
    return cols * rows


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
