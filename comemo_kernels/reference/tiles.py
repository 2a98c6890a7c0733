"""Vision tokens to image tokens, in PyTorch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._cpu_products import cpu_product
from comemo_kernels._op import check, padded
from comemo_kernels._writes import check_writable
from comemo_kernels.reference.dtypes import DTYPES


class Fold(NamedTuple):
    """How the tokens of a tile become image tokens."""

    n: int  # side of a neighbourhood that is folded, in tokens
    side: int  # of a tile, in image tokens

    @property
    def tokens(self) -> int:
        return self.side * self.side


@public
def fold_tiles(tokens: Tensor, ratio: float = 0.5, version: str = "v2") -> Tensor:
    """Fold each square neighbourhood of a token raster into channels ("pixel shuffle").

    Args:
        tokens: [T, h, w, C].
        ratio: side of the folded raster over that of `tokens`; n = 1/ratio is an integer.
        version: "v2" keeps the raster order, "v1" gives the transposed raster.

    Returns:
        "v2": [T, h/n, w/n, C*n*n], channels ordered (row, column, C) inside the fold;
        "v1": [T, w/n, h/n, C*n*n], its transpose.

    Raises:
        ValueError: a raster that n does not divide, a ratio that is not 1 over an integer, or an
            unknown version.
    """
    n = _check_fold("fold_tiles", ratio, version)
    check(
        tokens.ndim == 4,
        f"fold_tiles: tokens must be [T, h, w, C], got {tuple(tokens.shape)}",
    )
    _, h, w, _ = tokens.shape
    if h % n or w % n:
        raise ValueError(f"fold_tiles: a raster of {h} x {w} cannot be folded by {n} x {n}")
    raster = "T h w" if version == "v2" else "T w h"
    return rearrange(tokens, f"T (h i) (w j) C -> {raster} (i j C)", i=n, j=n)


@public
def image_rows(image_mask: Tensor, count: int) -> Tensor:
    """Rows of the image tokens in a batch's flattened tokens, in reading order.

    Synchronises with the device once, to know their count.

    Args:
        image_mask: bool [..., N], True at image tokens; any number of them in each prompt.
        count: image tokens to place: the tiles of all prompts times the tokens of one tile.

    Returns:
        int64 [count], for `project_tiles`.

    Raises:
        ValueError: a mask that is not bool, or that has another number of image tokens.
    """
    if image_mask.dtype != torch.bool or image_mask.ndim == 0:
        raise ValueError(
            f"image_rows: image_mask must be bool [..., N], got {image_mask.dtype}"
            f" {tuple(image_mask.shape)}"
        )
    rows = image_mask.flatten().nonzero().squeeze(1)
    if len(rows) != count:
        held = image_mask.sum(-1).flatten().tolist()
        raise ValueError(
            f"image_rows: the tiles have {count} image tokens, image_mask"
            f" {tuple(image_mask.shape)} holds {len(rows)}: {held} in its prompts"
        )
    return rows


@public
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
    activation: str = "gelu",
    media: Tensor | None = None,
    embeds: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Vision tokens to image tokens: drop the class token, fold, LayerNorm, Linear, GELU, Linear.

    The image tokens are the media of the image memory; with `embeds` they are written into the
    sequence too. The epilogue of the second GEMM writes both. Differentiable in tokens, weights and
    biases, and through `embeds`.

    Args:
        tokens: [T, 1 + h*h, C], the vision tower's output with its class token; any strides, on a
            GPU with C contiguous.
        norm_weight, norm_bias: [C*n*n], n = 1/ratio.
        weight1, bias1: [d, C*n*n], [d].
        weight2, bias2: [d, d], [d].
        ratio, version: see `fold_tiles`.
        eps: of the LayerNorm.
        activation: between the GEMMs; only "gelu", by the error function.
        media: [T * (h/n)**2, d], written and returned instead of a new tensor; not with gradients.
        embeds: [..., d], contiguous, any floating dtype: written in place at `rows`.
        rows: int64 [T * (h/n)**2], rows of `embeds` flattened to [.., d], each at most once: the
            destinations of the image tokens, tile by tile. `image_rows` finds them in a mask.

    Returns:
        [T, (h/n)**2, d]; `media` if that is given.

    Raises:
        ValueError: a token count that is not 1 + a square or that n does not divide; shapes, dtypes
            (except under autocast) or devices that do not fit; another activation; not one row for
            each image token, or, on a CPU, a row outside `embeds`. Nothing is written then. On a
            GPU rows outside `embeds` are not checked, and nothing is written there.
    """
    inputs = (tokens, norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    fold = check_project(*inputs, ratio, version, activation, media, embeds, rows)
    n, (T, _, C) = fold.n, tokens.shape
    h = fold.side * n
    x = fold_tiles(tokens[:, 1:].unflatten(1, (h, h)), ratio, version).flatten(1, 2)
    x = F.layer_norm(x, (C * n * n,), norm_weight, norm_bias, eps)
    found = cpu_product(F.gelu(cpu_product(x, weight1, bias1)), weight2, bias2)
    if media is not None:
        media.copy_(found.flatten(0, 1))
        found = media.view(T, fold.tokens, weight1.shape[0])
    if embeds is not None and rows is not None:
        place_rows(found.flatten(0, 1), embeds, rows)
    return found


def place_rows(found: Tensor, embeds: Tensor, rows: Tensor) -> None:
    """Write image tokens [R, d] at rows of embeddings, differentiably."""
    embeds.view(-1, embeds.shape[-1]).index_copy_(0, rows, found.to(embeds.dtype))


def check_project(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    ratio: float,
    version: str,
    activation: str,
    media: Tensor | None,
    embeds: Tensor | None,
    rows: Tensor | None,
) -> Fold:
    """Raise the errors of `project_tiles` that do not depend on the device."""
    n = _check_fold("project_tiles", ratio, version)
    if activation != "gelu":
        raise ValueError(
            f"project_tiles: activation must be 'gelu', by the error function, got {activation!r}"
        )
    h = int(max(tokens.shape[1] - 1, 0) ** 0.5) if tokens.ndim == 3 else 0
    if h == 0 or tokens.shape[1] != 1 + h * h or tokens.dtype not in DTYPES or not tokens.shape[2]:
        raise ValueError(
            "project_tiles: tokens must be floats [T, 1 + h*h, C], a class token and a square, got"
            f" {tokens.dtype} {tuple(tokens.shape)}"
        )
    if h % n:
        raise ValueError(f"project_tiles: a raster of {h} x {h} cannot be folded by {n} x {n}")
    width, fold = tokens.shape[2] * n * n, Fold(n, h // n)
    d = max(weight1.shape[0] if weight1.ndim else 0, 1)
    count = tokens.shape[0] * fold.tokens
    weights = (norm_weight, norm_bias, weight1, bias1, weight2, bias2)
    shapes = ((width,), (width,), (d, width), (d,), (d, d), (d,))
    dtype, device = tokens.dtype, tokens.device
    mixed = torch.is_autocast_enabled(device.type)  # PyTorch then converts the operands
    for name, operand, shape in zip(
        ("norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2", "media"),
        (*weights, media),
        (*shapes, (count, d)),
        strict=True,
    ):
        if operand is not None and (
            operand.shape != shape
            or operand.device != device
            or (operand.dtype != dtype and not (mixed and operand.dtype in DTYPES))
        ):
            raise ValueError(
                f"project_tiles: {name} must be {dtype} {shape} on {device}, for tokens"
                f" {tuple(tokens.shape)} folded by {n} x {n}, got {operand.dtype}"
                f" {tuple(operand.shape)} on {operand.device}"
            )
    if (
        media is not None
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (tokens, *weights, media, embeds))
    ):
        raise ValueError(
            "project_tiles: media to be written exclude gradients, leave them out or use"
            " torch.no_grad"
        )
    if embeds is not None and rows is not None:
        _check_place(embeds, rows, device, count, d)
    elif embeds is not None or rows is not None:
        raise ValueError("project_tiles: embeds and rows go together, got one without the other")
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (tokens, *weights))
    check_writable("project_tiles", {"media": media, "embeds": embeds}, learns)
    return fold


def check_project_kernel(
    tokens: Tensor,
    weights: tuple[Tensor, ...],
    n: int,
    media: Tensor | None,
    rows: Tensor | None,
    widest: int,
) -> None:
    """Raise for what the reference supports and the kernels do not, with every reason."""
    reasons = []
    if any(t.dtype == torch.float64 for t in (tokens, *weights)):
        reasons.append("float64 has no kernel")
    if tokens.stride(-1) != 1:
        reasons.append(f"C must be contiguous, got strides {tokens.stride()} of tokens")
    if not all(t.is_contiguous() for t in weights):
        reasons.append(f"weights must be contiguous, got strides {[t.stride() for t in weights]}")
    if media is not None and media.stride(-1) != 1:
        reasons.append(f"d must be contiguous, got strides {media.stride()} of media")
    if rows is not None and not rows.is_contiguous():
        reasons.append(f"rows must be contiguous, got strides {rows.stride()}")
    width = padded(n * n) * padded(tokens.shape[2])
    if width > widest:
        reasons.append(f"n*n times C, rounded up, must be at most {widest}, got {width}")
    if reasons:
        raise ValueError(
            f"project_tiles: on a GPU {'; '.join(reasons)}: or use"
            " comemo_kernels.reference.project_tiles"
        )


def _check_fold(verb: str, ratio: float, version: str) -> int:
    if version not in ("v1", "v2"):
        raise ValueError(f"{verb}: version must be 'v1' or 'v2', got {version!r}")
    ratio = float(ratio)
    inverse = 1 / ratio if ratio > 0 else 0.0
    n = round(inverse) if inverse < 2**31 else 0
    if n < 1 or abs(n * ratio - 1) > 1e-6:
        raise ValueError(f"{verb}: ratio must be 1 over an integer, got {ratio}")
    return n


def _check_place(embeds: Tensor, rows: Tensor, device: torch.device, count: int, d: int) -> None:
    if not (
        embeds.ndim > 1
        and embeds.shape[-1] == d
        and embeds.dtype in DTYPES
        and embeds.device == device
        and embeds.is_contiguous()
    ):
        raise ValueError(
            f"project_tiles: embeds must be contiguous floats [..., {d}] on {device}, got"
            f" {embeds.dtype} {tuple(embeds.shape)} of strides {embeds.stride()} on {embeds.device}"
        )
    if rows.dtype != torch.int64 or rows.shape != (count,) or rows.device != device:
        raise ValueError(
            f"project_tiles: rows must be int64 [{count}] on {device}, one for each image token,"
            f" got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )
    if device.type == "cpu" and count and not torch.compiler.is_compiling():
        _check_rows(rows, embeds.numel() // d)


def _check_rows(rows: Tensor, held: int) -> None:
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= held:
        raise ValueError(
            f"project_tiles: rows must lie in the {held} of embeds, got {low} to {high}"
        )
