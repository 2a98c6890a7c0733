"""Vision tokens to image tokens, in PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._op import check


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
