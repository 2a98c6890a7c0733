"""Gradient of the GELU between the two GEMMs of the tile projection, and the GELU itself.

    dx = dy * (P(x) + x p(x));  y = x P(x)         P, p: the normal distribution and its density

The gradient of the weight after the GELU needs y, which the forward pass does not keep.
Traffic: x and dy read, dx and y written, once.
"""

import torch
import triton.language as tl
from torch import Tensor

from comemo_kernels._op import Kernel, jit, register

# --- kernel ---


@jit
def _gelu_gradient_kernel(
    dx_ptr,  # [count], all contiguous
    y_ptr,  # gelu(x), for the gradient of the weight after it
    dy_ptr,
    x_ptr,
    count,
    ALIGNED: tl.constexpr,  # count is a multiple of 8
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK elements."""
    if ALIGNED:
        count = count // 8 * 8
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    below = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    slope = below + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    tl.store(dx_ptr + offs, (dy * slope).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offs, (x * below).to(y_ptr.dtype.element_ty), mask=mask)


gelu_gradient = Kernel(_gelu_gradient_kernel, [{"BLOCK": 2048, "num_warps": 8}])

# --- operator ---


def _launch(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    dx, y = _fake(dy, x)
    count = x.numel()
    programs = -(-count // gelu_gradient.config["BLOCK"])
    gelu_gradient.launch(programs, dx, y, dy, x, count, count % 8 == 0)
    return dx, y


def _fake(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dy), torch.empty_like(x)


gelu_gradient_op = register(
    "gelu_gradient(Tensor dy, Tensor x) -> (Tensor, Tensor)", _launch, _fake
)
