"""Fused RMSNorm + linear, SwiGLU, gated residual and feed-forward network, in PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels._cpu_products import cpu_product
from comemo_kernels._writes import may_overwrite, needs_gradient
from comemo_kernels.reference.fused_linear_checks import (
    check_gated_residual,
    check_gated_swiglu,
    check_norm_linear,
    check_norm_swiglu,
)
from comemo_kernels.reference.fused_linear_gradient import (
    Steps,
    add_gated,
    make_functions,
    swiglu,
    swiglu_gradient,
)
from comemo_kernels.reference.norms import rms_norm, rms_norm_gradient

functions = make_functions(
    Steps(rms_norm, rms_norm_gradient, cpu_product, swiglu, swiglu_gradient, add_gated)
)


@public
def norm_linear(x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm of x as in Llama, then a linear layer without bias.

    y = x / sqrt(mean(x^2) + eps) in float32, rounded, times norm_weight; then y weight^T.

    On a GPU up to 16 rows without gradients are one launch, which reads the weight once and never
    writes y to memory. More rows, gradients, float64 and autocast are a norm and PyTorch's GEMM:
    its libraries leave nothing to gain there. The backward pass computes y again from x.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        norm_weight: [d] in the dtype of x; None if it is folded into `weight`.
        weight: [O, d] in the dtype of x; on a GPU d must be contiguous.
        eps: added to the mean square.

    Returns:
        [..., O] in the dtype of x; sums in float32, of float64 in float64. With up to 16 rows a
        row's bits do not depend on the other rows. Differentiable once, in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit; on a GPU a
            last dimension that is not contiguous.
    """
    check_norm_linear(x, norm_weight, weight)
    if needs_gradient(x, norm_weight, weight):
        return functions.norm_linear.apply(x, norm_weight, weight, eps)
    return cpu_product(rms_norm(x, norm_weight, eps), weight)


@public
def norm_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Inner half of a gated feed-forward network: silu(y gate_weight^T) * (y up_weight^T).

    y is x normalised as in `norm_linear`, which also says when this is one launch; the launch
    reads both weights once. The backward pass computes y and both products again from x;
    `gated_swiglu` can keep the products.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        norm_weight: [d] in the dtype of x; None if it is folded into both other weights.
        gate_weight, up_weight: [F, d] in the dtype of x; on a GPU d must be contiguous.
        eps: added to the mean square.

    Returns:
        [..., F] in the dtype of x; sums, and in one launch also silu and the product, in float32,
        of float64 in float64. Differentiable once, in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit; on a GPU a
            last dimension that is not contiguous.
    """
    check_norm_swiglu(x, norm_weight, gate_weight, up_weight)
    if needs_gradient(x, norm_weight, gate_weight, up_weight):
        return functions.norm_swiglu.apply(x, norm_weight, gate_weight, up_weight, eps)
    y = rms_norm(x, norm_weight, eps)
    g, u = cpu_product(y, gate_weight), cpu_product(y, up_weight)
    if not may_overwrite():
        return F.silu(g) * u
    return F.silu(g, inplace=True).mul_(u)  # on a CPU new memory costs more than a pass


@public
def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """x + tanh(gate) * (a weight^T): output projection and gated residual of a layer.

    On a GPU up to 16 rows without gradients are one launch, which reads the weight once. More
    rows, gradients, float64 and autocast are PyTorch's GEMM and one pass over the rows. The gate is
    read on the device: no sync. The backward pass computes a weight^T never again: the gate's
    gradient is a sum over `a`.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        a: [..., K] with the rows and dtype of x; on a GPU K must be contiguous.
        weight: [d, K] in the dtype of x; on a GPU K must be contiguous.
        gate: [1] in the dtype of x, before tanh. At 0 the result is x. None means a factor of 1:
            for layers without gates, or with tanh(gate) folded into `weight`.

    Returns:
        [..., d] in the dtype of x, a new tensor; sums in float32, of float64 in float64.
        Differentiable once, in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit; on a GPU a
            last dimension that is not contiguous.
    """
    check_gated_residual(x, a, weight, gate)
    if needs_gradient(x, a, weight, gate):
        return functions.gated_residual.apply(x, a, weight, gate)
    return add_gated(x, cpu_product(a, weight), gate)


@public
def gated_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate: Tensor | None,
    eps: float = 1e-5,
    recompute: str = "cheap",
) -> Tensor:
    """A gated feed-forward network with its norm and residual: x + tanh(gate) * (p down_weight^T).

    p = silu(y gate_weight^T) * (y up_weight^T) is that of `norm_swiglu`. Without gradients this is
    `norm_swiglu` and then `gated_residual`.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        norm_weight: [d] in the dtype of x; None if it is folded into the next two weights.
        gate_weight, up_weight: [F, d] in the dtype of x; on a GPU d must be contiguous.
        down_weight: [d, F] in the dtype of x; on a GPU F must be contiguous.
        gate: [1] in the dtype of x, before tanh; None means a factor of 1.
        eps: added to the mean square.
        recompute: what the backward pass computes again to save memory. "cheap": the norm and p,
            so that x and two products [..., F] are kept. "projections": these two products as well,
            so that only x is kept, for two more GEMMs.

    Returns:
        [..., d] in the dtype of x, a new tensor; sums in float32, of float64 in float64.
        Differentiable once, in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit, or another
            `recompute`; on a GPU a last dimension that is not contiguous.
    """
    inputs = (x, norm_weight, gate_weight, up_weight, down_weight, gate)
    check_gated_swiglu(*inputs, recompute)
    if needs_gradient(*inputs):
        return functions.gated_swiglu.apply(*inputs, eps, recompute == "cheap")
    wide = norm_swiglu(x, norm_weight, gate_weight, up_weight, eps)
    return gated_residual(x, wide, down_weight, gate)
