"""The feed-forward network of a gated layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo_kernels._arguments import public
from comemo_kernels._op import check_count
from comemo_kernels.plain import KINDS


class FeedForward(nn.Module):
    """SwiGLU network: (silu(x gate^T) * (x up^T)) down^T, without biases.

    State dict: `gate_proj.weight`, `up_proj.weight` [F, d], `down_proj.weight` [d, F]; initialised
    like `nn.Linear`.

    Args:
        dim: d.
        intermediate_size: F.
        device, dtype: of the parameters.

    Raises:
        ValueError: sizes below 1.
    """

    @public
    def __init__(
        self,
        dim: int,
        intermediate_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("FeedForward", "dim", dim, 1)
        check_count("FeedForward", "intermediate_size", intermediate_size, 1)
        super().__init__()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, intermediate_size, **made)
        self.up_proj = nn.Linear(dim, intermediate_size, **made)
        self.down_proj = nn.Linear(intermediate_size, dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to [..., d]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


OWN = KINDS | {FeedForward}  # classes that layers here compute from their weights
