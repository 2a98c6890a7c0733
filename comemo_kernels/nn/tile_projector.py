"""The projector of a vision tower's tokens, as a module."""

from typing import Any

import torch
from torch import Tensor, nn

import comemo_kernels as ops
from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count
from comemo_kernels._writes import check_writable
from comemo_kernels.plain import is_plain
from comemo_kernels.reference.dtypes import DTYPES
from comemo_kernels.reference.memory_checks import known_values
from comemo_kernels.reference.tiles import place_rows

LAYERS = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)


class TileProjector(nn.Sequential):
    """Vision tokens of tiles to image tokens: fold, LayerNorm, Linear, GELU, Linear.

    Computed by `project_tiles`. If a submodule has hooks, adapters, quantised, sharded or offloaded
    weights, all four are called. Initialised like `nn.LayerNorm` and `nn.Linear`.
    Source: CoMemo (arXiv:2506.06279), the projector of InternVL.

    State dict, that of InternVL's and CoMemo's `mlp1` without this prefix; n = 1/ratio:
        0.weight, 0.bias: [vision_dim * n * n].
        1.weight: [dim, vision_dim * n * n].
        1.bias: [dim].
        3.weight: [dim, dim].
        3.bias: [dim].

    Args:
        vision_dim: C, channels of a vision token.
        dim: d, width of the image tokens.
        ratio: side of the folded raster over that of the tokens, 1/n.
        version: "v2" keeps the raster order, "v1" transposes it, see `fold_tiles`.
        eps: of the LayerNorm.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes below 1, a ratio that is not 1 over an integer, an unknown version.
    """

    @public
    def __init__(
        self,
        vision_dim: int,
        dim: int,
        ratio: float = 0.5,
        version: str = "v2",
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("TileProjector", "vision_dim", vision_dim, 1)
        check_count("TileProjector", "dim", dim, 1)
        check(
            version in ("v1", "v2"),
            f"TileProjector: version must be 'v1' or 'v2', got {version!r}",
        )
        n = round(1 / ratio) if 1e-6 < ratio <= 1 else 0
        check(
            n > 0 and abs(n * ratio - 1) < 1e-6,
            f"TileProjector: ratio must be 1 over an integer, got {ratio}",
        )
        width = vision_dim * n * n
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            nn.LayerNorm(width, eps, **place),
            nn.Linear(width, dim, **place),
            nn.GELU(),
            nn.Linear(dim, dim, **place),
        )
        self.ratio, self.version = ratio, version

    @public
    def forward(
        self, tokens: Tensor, embeds: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Project the output of a vision tower.

        Args:
            tokens: [T, 1 + h*h, C], class token first; it is dropped.
            embeds: [..., d] contiguous, embeddings of a sequence: the image tokens are also
                written there, at `rows`.
            rows: int64 [T * (h/n)**2] of `embeds` flattened to [.., d], see `image_rows`.

        Returns:
            [T, (h/n)**2, d]. Differentiable, also through `embeds`.

        Raises:
            ValueError: tokens that are not a class token and a square, or of another width; errors
                of `project_tiles`.
        """
        return project(self, tokens, embeds, rows)


def project(projector: Any, tokens: Tensor, embeds: Tensor | None, rows: Tensor | None) -> Tensor:
    """The forward of `TileProjector`, of any sequence of its layers with its settings."""
    layers = tuple(projector.children())
    if tuple(map(type, layers)) == LAYERS and layers[2].approximate == "none":
        norm, first, _, second = layers
        weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
        if is_plain(*layers, biased=True) and all(weight is not None for weight in weights):
            options = {"ratio": projector.ratio, "version": projector.version, "eps": norm.eps}
            return ops.project_tiles(tokens, *weights, **options, embeds=embeds, rows=rows)
    side = round(max(tokens.shape[1] - 1, 0) ** 0.5) if tokens.ndim == 3 else 0
    if not side or tokens.shape[1] != 1 + side * side:
        raise ValueError(
            "TileProjector.forward: tokens must be [T, 1 + h*h, C], a class token and a square, got"
            f" {tuple(tokens.shape)}"
        )
    if (embeds is None) != (rows is None):
        raise ValueError(
            "TileProjector.forward: embeds and rows must be given together, got one without the"
            " other"
        )
    raster = tokens[:, 1:].unflatten(1, (side, side))
    x = ops.fold_tiles(raster, projector.ratio, projector.version).flatten(1, 2)
    for layer in layers:
        x = layer(x)
    if embeds is not None and rows is not None:
        _write(x.flatten(0, 1), embeds, rows)
    return x


def _write(found: Tensor, embeds: Tensor, rows: Tensor) -> None:
    """Write image tokens [R, d] at rows of embeddings, differentiably."""
    R, d = found.shape
    if not (
        embeds.ndim > 1
        and embeds.shape[-1] == d
        and embeds.dtype in DTYPES
        and embeds.device == found.device
        and embeds.is_contiguous()
    ):
        raise ValueError(
            f"TileProjector.forward: embeds must be contiguous floats [.., {d}] on {found.device},"
            f" got {embeds.dtype} {tuple(embeds.shape)} of strides {embeds.stride()} on"
            f" {embeds.device}"
        )
    flat = embeds.view(-1, d)
    known = known_values(rows) if rows.dtype == torch.int64 and rows.ndim == 1 else []
    if (
        rows.dtype != torch.int64
        or rows.shape != (R,)
        or rows.device != found.device
        or (known and not 0 <= min(known) <= max(known) < len(flat))
    ):
        raise ValueError(
            f"TileProjector.forward: rows must be int64 [{R}] on {found.device}, in the"
            f" {len(flat)} rows of embeds, got {rows.dtype} {tuple(rows.shape)} on {rows.device}"
        )
    check_writable("TileProjector.forward", {"embeds": embeds}, found.requires_grad)
    place_rows(found, embeds, rows)
