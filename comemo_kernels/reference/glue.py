"""What stands around the attention of a mixin layer, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Llama has it: normalised in float32, rounded, then weighted."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return weight * exact.to(x.dtype)


def norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return F.linear(rms_norm(x, norm_weight, eps), weight)


def norm_swiglu(
    x: Tensor, norm_weight: Tensor, gate_weight: Tensor, up_weight: Tensor, eps: float = 1e-5
) -> Tensor:
    y = rms_norm(x, norm_weight, eps)
    return F.silu(F.linear(y, gate_weight)) * F.linear(y, up_weight)


def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    return x + gate.tanh() * F.linear(a, weight)
