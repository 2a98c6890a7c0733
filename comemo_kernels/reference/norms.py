"""RMSNorm of Llama and its gradient, in PyTorch."""

import torch
from torch import Tensor

from comemo_kernels.reference.blocks import blocks


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of Llama: normalised in float32, rounded, then weighted unless `weight` is None."""
    parts = blocks(x, -2, weight) if x.ndim > 1 else None
    if parts is None:
        return _rms_norm(x, weight, eps)
    dtype = x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)
    out = torch.empty(x.shape, dtype=dtype)
    for part in parts:
        out[..., part, :] = _rms_norm(x[..., part, :], weight, eps)
    return out


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return exact.to(x.dtype) if weight is None else weight * exact.to(x.dtype)


def rms_norm_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    added: Tensor | None,
    eps: float,
    to_x: bool,
    to_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of `rms_norm`; nothing of the forward pass is needed but x.

        n = x rstd;  dn = dy weight;  dx = (dn - n mean(dn n)) rstd + added
        dweight = sum over rows of dy n, where n is rounded as in `rms_norm`

    Args:
        dy: [R, d] gradient of the normed rows.
        x: [R, d] what was normalised.
        weight: [d] or None.
        added: [R, d] gradient of x by another way, such as a residual; or None.
        eps: added to the mean square.
        to_x, to_weight: what to compute; without `weight` to_weight must be False.

    Returns:
        dx [R, d] in the dtype of x, without to_x [0, d]; dweight [d] in the dtype of weight,
        without to_weight [0]. Sums in float32, of float64 in float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    exact = x.to(wide)
    rstd = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    exact, dy = exact * rstd, dy.to(wide)
    dx, dweight = x.new_empty(0, x.shape[1]), x.new_empty(0)
    if to_weight and weight is not None:
        dweight = (dy * exact.to(x.dtype)).sum(0).to(weight.dtype)
    if to_x:
        dn = dy if weight is None else dy * weight
        dx = torch.addcmul(dn, exact, (dn * exact).mean(-1, keepdim=True), value=-1) * rstd
        dx = (dx if added is None else dx + added).to(x.dtype)
    return dx, dweight
