"""Fused RMSNorm + linear, SwiGLU, gated residual and feed-forward network.

    norm_linear     y weight^T                               y = rmsnorm(x) * norm_weight
    norm_swiglu     silu(y gate_weight^T) * (y up_weight^T)
    gated_residual  x + tanh(gate) * (a weight^T)
    gated_swiglu    x + tanh(gate) * (norm_swiglu(x) down_weight^T)

Up to 16 rows without gradients are one launch (`_rows_kernel`). More rows are the GEMMs of
PyTorch's libraries, which leave nothing to gain, and one pass over the rows between them.
Gradients: `reference.fused_linear_gradient` with the kernels of `_rms_norm_gradient` and `_swiglu`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._op import documented, on_triton
from comemo_kernels._rms_norm_gradient import WIDEST, rms_norm_gradient_op
from comemo_kernels._rows_kernel import ROWS, rows_op
from comemo_kernels._swiglu import swiglu_gradient_op, swiglu_op
from comemo_kernels._writes import needs_gradient
from comemo_kernels.reference.fused_linear import functions as reference_functions
from comemo_kernels.reference.fused_linear_checks import (
    check_gated_residual,
    check_gated_swiglu,
    check_norm_linear,
    check_norm_swiglu,
    check_strides,
)
from comemo_kernels.reference.fused_linear_gradient import (
    Functions,
    Steps,
    make_functions,
)

# --- steps ---


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """The reference's `rms_norm` in one or two passes over the rows instead of five or six."""
    normed = F.rms_norm(x, x.shape[-1:], None, eps)
    return normed if weight is None else weight * normed


def _swiglu(g: Tensor, u: Tensor) -> Tensor:
    return F.silu(g) * u if g.dtype == torch.float64 else swiglu_op(g, u)


def _add_gated(x: Tensor, added: Tensor, gate: Tensor | None) -> Tensor:
    """One pass of 4 R d elements after the GEMM.

    addmm with the gate folded into the weight moves as many, because PyTorch copies x first, and
    makes a pass over the weight besides.
    """
    return x + added if gate is None else torch.addcmul(x, added, gate.tanh())


_functions = make_functions(
    Steps(_rms_norm, rms_norm_gradient_op, F.linear, _swiglu, swiglu_gradient_op, _add_gated)
)


def _functions_for(x: Tensor) -> Functions:
    """With kernels, or for what these do not support in PyTorch."""
    supported = x.dtype != torch.float64 and x.shape[-1] <= WIDEST
    return _functions if supported else reference_functions


# --- public ---


@documented(reference.norm_linear)
def norm_linear(x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float = 1e-5) -> Tensor:
    if not on_triton(x):
        return reference.norm_linear(x, norm_weight, weight, eps)
    check_norm_linear(x, norm_weight, weight)
    check_strides("norm_linear", x=x, norm_weight=norm_weight, weight=weight)
    if _is_one_launch(x, norm_weight, weight):
        return _launch_flat(x, norm_weight, weight, None, None, None, eps)
    if needs_gradient(x, norm_weight, weight):
        return _functions_for(x).norm_linear.apply(x, norm_weight, weight, eps)
    return F.linear(_rms_norm(x, norm_weight, eps), weight)


@documented(reference.norm_swiglu)
def norm_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    if not on_triton(x):
        return reference.norm_swiglu(x, norm_weight, gate_weight, up_weight, eps)
    check_norm_swiglu(x, norm_weight, gate_weight, up_weight)
    weights = {"norm_weight": norm_weight, "gate_weight": gate_weight, "up_weight": up_weight}
    check_strides("norm_swiglu", x=x, **weights)
    if _is_one_launch(x, *weights.values()):
        return _launch_flat(x, norm_weight, gate_weight, up_weight, None, None, eps)
    if needs_gradient(x, *weights.values()):
        return _functions_for(x).norm_swiglu.apply(x, *weights.values(), eps)
    y = _rms_norm(x, norm_weight, eps)
    return _swiglu(F.linear(y, gate_weight), F.linear(y, up_weight))


@documented(reference.gated_residual)
def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    if not on_triton(x):
        return reference.gated_residual(x, a, weight, gate)
    check_gated_residual(x, a, weight, gate)
    check_strides("gated_residual", x=x, a=a, weight=weight)
    if _is_one_launch(x, a, weight, gate):
        return _launch_flat(a, None, weight, None, x, gate, None)
    if needs_gradient(x, a, weight, gate):
        return _functions_for(x).gated_residual.apply(x, a, weight, gate)
    return _add_gated(x, F.linear(a, weight), gate)


@documented(reference.gated_swiglu)
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
    inputs = (x, norm_weight, gate_weight, up_weight, down_weight, gate)
    if not on_triton(x):
        return reference.gated_swiglu(*inputs, eps, recompute)
    check_gated_swiglu(*inputs, recompute)
    weights = {"norm_weight": norm_weight, "gate_weight": gate_weight, "up_weight": up_weight}
    check_strides("gated_swiglu", x=x, **weights, down_weight=down_weight)
    if needs_gradient(*inputs):
        return _functions_for(x).gated_swiglu.apply(*inputs, eps, recompute == "cheap")
    wide = norm_swiglu(x, norm_weight, gate_weight, up_weight, eps)
    return gated_residual(x, wide, down_weight, gate)


def _is_one_launch(x: Tensor, *operands: Tensor | None) -> bool:
    return (
        math.prod(x.shape[:-1]) <= ROWS
        and x.dtype != torch.float64
        and not torch.is_autocast_enabled(x.device.type)
        and not needs_gradient(x, *operands)
    )


def _launch_flat(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    up_weight: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    eps: float | None,
) -> Tensor:
    flat, residual = (
        None if t is None else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
        for t in (x, residual)
    )
    out = rows_op(flat, norm_weight, weight, up_weight, residual, gate, eps)
    return out.view(*x.shape[:-1], weight.shape[0])
