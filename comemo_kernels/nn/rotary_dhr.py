"""RoPE-DHR as a module without tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import comemo_kernels as ops
from comemo_kernels._arguments import public
from comemo_kernels._op import check, check_count
from comemo_kernels.grids import Grid, ImageGrids, check_tile_order
from comemo_kernels.memory_tensors import Table
from comemo_kernels.reference.dtypes import INTEGERS


class RotaryDHR(nn.Module):
    """Rotates queries and keys by position ids; image tokens have the ids of their place.

    It holds numbers, neither parameters nor buffers, so that its state dict is empty and `.to`
    rounds nothing. The table of angles is float32 and is that of `distance_table`: for the same
    settings and device the same tensors, computed once.
    Source: CoMemo (arXiv:2506.06279).

    Args:
        head_dim: D, even.
        theta: base of the angles.
        max_positions: P; a token with an id outside of [0, P) becomes NaN.
        side: S, image tokens along a tile's side.
        tile_order: "row", or "column" as published, see `image_position_ids`.
        thumbnail: whether images of more than one tile have a thumbnail.

    Raises:
        ValueError: an odd head_dim, a theta that is not positive, no positions, or settings that
            `image_position_ids` refuses.
    """

    @public
    def __init__(
        self,
        head_dim: int,
        theta: float = 10000.0,
        max_positions: int = 32768,
        side: int = 16,
        tile_order: str = "row",
        thumbnail: bool = True,
    ) -> None:
        super().__init__()
        check_count("RotaryDHR", "head_dim", head_dim, 2)
        check(head_dim % 2 == 0, f"RotaryDHR: head_dim must be even, got {head_dim}")
        check(0 < theta < float("inf"), f"RotaryDHR: theta must be positive, got {theta}")
        check_count("RotaryDHR", "max_positions", max_positions, 1)
        check_count("RotaryDHR", "side", side, 1)
        check_tile_order("RotaryDHR", tile_order)
        self.head_dim, self.theta, self.max_positions = head_dim, theta, max_positions
        self.side, self.tile_order, self.thumbnail = side, tile_order, thumbnail

    def extra_repr(self) -> str:
        return (
            f"head_dim={self.head_dim}, theta={self.theta}, max_positions={self.max_positions},"
            f" side={self.side}, tile_order={self.tile_order!r}, thumbnail={self.thumbnail}"
        )

    @public
    def table(self, device: torch.device | str) -> Table:
        """cos, sin float32 [P, D/2] on a device, for an `ImageMemory`; do not write to them."""
        return ops.distance_table(self.head_dim, self.theta, self.max_positions, device)

    @public
    def position_ids(
        self, image_mask: Tensor, attention_mask: Tensor, grids: Sequence[Grid] | Tensor
    ) -> Tensor:
        """RoPE-DHR ids int64 [B, N] of whole prompts; arguments as in `rope_dhr_positions`."""
        validate = not torch.compiler.is_compiling()
        return ops.rope_dhr_positions(
            image_mask,
            attention_mask,
            grids,
            self.side,
            self.tile_order,
            self.thumbnail,
            validate,
        )

    @public
    def forward(
        self, q: Tensor, k: Tensor | None, positions: Tensor | ImageGrids
    ) -> tuple[Tensor, Tensor | None]:
        """Rotate queries and keys.

        Args:
            q: [B, N, H, D] or, packed, [T, H, D].
            k: [B, N, G, D] or [T, G, D]; None to rotate `q` alone.
            positions: int32 or int64 [B or 1, N] or [T] ids; or `ImageGrids`, from which the kernel
                derives them.

        Returns:
            q and k rotated, in their dtype, computed in float32. Differentiable.

        Raises:
            ValueError: heads of another dimension, ids that are not integers; errors of
                `apply_rotary`.
        """
        if q.shape[-1:] != (self.head_dim,):
            raise ValueError(
                f"RotaryDHR.forward: q must have heads of {self.head_dim} elements, got"
                f" {tuple(q.shape)}"
            )
        if torch.compiler.is_compiling() and isinstance(positions, Tensor):
            return self._rotate_compiled(q, k, positions)
        return ops.apply_rotary(q, k, *self.table(q.device), positions)

    def _rotate_compiled(self, q: Tensor, k: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same with angles of the tokens alone: a graph would compute the whole table."""
        if ids.dtype not in INTEGERS:
            raise ValueError(
                f"RotaryDHR.forward: positions must be int32 or int64, got {ids.dtype}"
            )
        unknown = (ids < 0) | (ids >= self.max_positions)
        places = ids.float().masked_fill(unknown, float("nan"))
        cos, sin = ops.rotary_table(places.view(-1, places.shape[-1]), self.head_dim, self.theta)
        shape = (*places.shape, -1)
        return ops.apply_rotary(q, k, cos.view(shape), sin.view(shape))
