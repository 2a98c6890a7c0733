"""Layers without state, which the `kernels` package puts under the modules of a model.

`kernels` takes a layer's `forward` and calls it with the module of the model as `self`. So a layer
here has neither a constructor nor attributes, except for the two flags that `kernels` reads.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

import comemo_kernels as ops
from comemo_kernels.memory import ImageMemory
from comemo_kernels.nn.gated_cross_attention import read_images
from comemo_kernels.nn.tile_projector import project


class ApplyRotary(nn.Module):
    """For `rotary_pos_emb`, the name of transformers' `apply_rotary_pos_emb`: by `apply_rotary`.

    The same arguments and results, with gradients. It rotates in float32 and rounds once, to the
    dtype of q. Both halves of a row of cos and sin are equal in transformers: the first is read.
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """q [B, H, N, D] and k [B, G, N, D] by cos, sin [B or 1, N, D or D/2], all rotated.

        With an `unsqueeze_dim` of 2 they are [B, N, H, D] and [B, N, G, D].
        """
        return rotate(self, q, k, cos, sin, unsqueeze_dim)


class GatedCrossAttention(nn.Module):
    """For modules with the submodules and settings of `comemo_kernels.nn.GatedCrossAttention`."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        x: Tensor,
        media: Tensor | ImageMemory,
        positions: Tensor | None = None,
        spans: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """x [B, N, d] to [B, N, d]."""
        return read_images(self, x, media, positions, spans, active)


class TileProjector(nn.Module):
    """For sequences with the layers and settings of `comemo_kernels.nn.TileProjector`."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, tokens: Tensor, embeds: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Tokens [T, 1 + h*h, C] to [T, (h/n)**2, d]."""
        return project(self, tokens, embeds, rows)


def rotate(
    function: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int
) -> tuple[Tensor, Tensor]:
    """The forward of `ApplyRotary` for a function of a model.

    Raises:
        ValueError: a function that rotates other pairs or the other way, shapes that do not fit.
    """
    D, width = q.shape[-1], cos.shape[-1]
    if width not in (D, D // 2) or D % 2:
        raise ValueError(
            f"rotary_pos_emb: cos must be [.., {D}] or [.., {D}/2] for q {tuple(q.shape)}, got"
            f" {tuple(cos.shape)}"
        )
    if not _rotates_halves(type(function), width == D):
        raise ValueError(
            "rotary_pos_emb: the function of the model must rotate the halves of a head, to"
            f" (x1 cos - x2 sin, x2 cos + x1 sin), got {type(function).forward} with another"
            " rotation: leave rotary_pos_emb out of the mapping"
        )
    heads = unsqueeze_dim % (cos.ndim + 1) + q.ndim - cos.ndim - 1  # the dimension of heads in q
    if q.ndim not in (3, 4) or not max(q.ndim - 3, 0) <= heads <= q.ndim - 2:
        raise ValueError(
            "rotary_pos_emb: q must be [B, H, N, D] with unsqueeze_dim 1 or [B, N, H, D] with 2,"
            f" got {tuple(q.shape)}, cos {tuple(cos.shape)} and unsqueeze_dim {unsqueeze_dim}"
        )
    if q.ndim == 4 and cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    tokens = q.ndim - 3  # the dimension of tokens that `apply_rotary` expects
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    if heads != tokens:
        return ops.apply_rotary(q, k, cos, sin)
    q, k = q.transpose(heads, heads + 1), k.transpose(heads, heads + 1)
    q, k = ops.apply_rotary(q, k, cos, sin)
    return q.transpose(heads, heads + 1), k.transpose(heads, heads + 1)


@torch._dynamo.assume_constant_result
def _rotates_halves(kind: type, repeated: bool) -> bool:
    return _probe(kind, repeated)


@functools.cache
def _probe(kind: Any, repeated: bool) -> bool:
    """Whether the original forward of a class rotates (1, 2, 3, 4) to (-3, -4, 1, 2)."""
    with unset_fake_temporarily(), torch.no_grad():
        x = torch.arange(1.0, 5.0, device="cpu").view(1, 1, 1, 4)
        sin = torch.ones(1, 1, 4 if repeated else 2, device="cpu")
        try:
            rotated, _ = kind.forward(kind.__new__(kind), x, x, torch.zeros_like(sin), sin)
        except RuntimeError:  # shapes that it does not take
            return False
        return rotated.flatten().tolist() == [-3.0, -4.0, 1.0, 2.0]
