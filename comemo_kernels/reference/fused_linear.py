"""Fused RMSNorm + linear, SwiGLU and gated residual, in PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels.reference.dtypes import DTYPES


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of Llama: normalised in float32, rounded, then weighted unless `weight` is None."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    exact = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    return exact.to(x.dtype) if weight is None else weight * exact.to(x.dtype)


# Measured on an AMD EPYC, where MKL takes up to three times as long as oneDNN for a few rows: up to
# ROWS rows, and from ELEMENTS elements of a weight on, oneDNN is faster.
ROWS, ELEMENTS = 256, 2**18
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T, by the PyTorch library that is faster on a CPU."""
    rows = x.numel() // max(x.shape[-1], 1)
    if (
        1 < rows <= ROWS
        and weight.numel() >= ELEMENTS
        and _ONEDNN
        and x.device.type == "cpu"
        and type(x) is Tensor
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return F.linear(x, weight)


@public
def norm_linear(x: Tensor, norm_weight: Tensor | None, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMSNorm of x as in Llama, then a linear layer without bias.

    y = x / sqrt(mean(x^2) + eps) in float32, rounded, times norm_weight; then y weight^T.

    On a GPU up to 16 rows without gradients are one launch, which reads the weight once and never
    writes y to memory. More rows, gradients, float64 and autocast are PyTorch operations: its
    libraries leave nothing to gain on a plain GEMM.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        norm_weight: [d] in the dtype of x; None if it is folded into `weight`.
        weight: [O, d] in the dtype of x; on a GPU d must be contiguous.
        eps: added to the mean square.

    Returns:
        [..., O] in the dtype of x; sums in float32, of float64 in float64. With up to 16 rows a
        row's bits do not depend on the other rows. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit; on a GPU a
            last dimension that is not contiguous.
    """
    check_norm_linear(x, norm_weight, weight)
    return product(rms_norm(x, norm_weight, eps), weight)


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
    reads both weights once.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        norm_weight: [d] in the dtype of x; None if it is folded into both other weights.
        gate_weight, up_weight: [F, d] in the dtype of x; on a GPU d must be contiguous.
        eps: added to the mean square.

    Returns:
        [..., F] in the dtype of x; sums, and in one launch also silu and the product, in float32,
        of float64 in float64. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit; on a GPU a
            last dimension that is not contiguous.
    """
    check_norm_swiglu(x, norm_weight, gate_weight, up_weight)
    y = rms_norm(x, norm_weight, eps)
    return F.silu(product(y, gate_weight)) * product(y, up_weight)


@public
def gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor | None) -> Tensor:
    """x + tanh(gate) * (a weight^T): output projection and gated residual of a layer.

    On a GPU up to 16 rows without gradients are one launch, which reads the weight once. More
    rows, gradients, float64 and autocast are PyTorch's GEMM and one pass over the rows. The gate is
    read on the device: no sync.

    Args:
        x: [..., d]; float16, bfloat16, float32 or float64. On a GPU d must be contiguous; other
            strides are free.
        a: [..., K] with the rows and dtype of x; on a GPU K must be contiguous.
        weight: [d, K] in the dtype of x; on a GPU K must be contiguous.
        gate: [1] in the dtype of x, before tanh. At 0 the result is x. None means a factor of 1:
            for layers without gates, or with tanh(gate) folded into `weight`.

    Returns:
        [..., d] in the dtype of x, a new tensor; sums in float32, of float64 in float64.
        Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes (except under autocast) or devices that do not fit; on a GPU a
            last dimension that is not contiguous.
    """
    check_gated_residual(x, a, weight, gate)
    added = product(a, weight)
    return x + (added if gate is None else gate.tanh() * added)


def check_norm_linear(x: Tensor, norm_weight: Tensor | None, weight: Tensor) -> None:
    """Raise the errors of `norm_linear` that do not depend on the device."""
    d = x.shape[-1:]
    norm = ("norm_weight", norm_weight, d)
    _check("norm_linear", x, norm, ("weight", weight, weight.shape[:1] + d))


def check_norm_swiglu(
    x: Tensor, norm_weight: Tensor | None, gate_weight: Tensor, up_weight: Tensor
) -> None:
    """Raise the errors of `norm_swiglu` that do not depend on the device."""
    d = x.shape[-1:]
    wide = gate_weight.shape[:1] + d
    norm, gate = ("norm_weight", norm_weight, d), ("gate_weight", gate_weight, wide)
    _check("norm_swiglu", x, norm, gate, ("up_weight", up_weight, wide))


def check_gated_residual(x: Tensor, a: Tensor, weight: Tensor, gate: Tensor | None) -> None:
    """Raise the errors of `gated_residual` that do not depend on the device."""
    d, K = x.shape[-1:], a.shape[-1:]
    rows, scalar = ("a", a, x.shape[:-1] + K), ("gate", gate, torch.Size([1]))
    _check("gated_residual", x, rows, ("weight", weight, d + K), scalar)


def _check(verb: str, x: Tensor, *operands: tuple[str, Tensor | None, torch.Size]) -> None:
    """Raise unless all operands (name, tensor or None, shape that is wanted) fit x."""
    dtype, device = x.dtype, x.device
    if not x.ndim or dtype not in DTYPES:
        raise ValueError(
            f"{verb}: x must be [..., d] of float16, bfloat16, float32 or float64, got"
            f" {dtype} {tuple(x.shape)}"
        )
    mixed = torch.is_autocast_enabled(device.type)  # PyTorch then converts the operands
    for name, operand, shape in operands:
        if operand is not None and (
            operand.shape != shape
            or operand.device != device
            or (operand.dtype != dtype and not (mixed and operand.dtype in DTYPES))
        ):
            raise ValueError(
                f"{verb}: {name} must be {dtype} {tuple(shape)} on {device}, for x"
                f" {tuple(x.shape)}, got {operand.dtype} {tuple(operand.shape)} on"
                f" {operand.device}"
            )


def check_strides(verb: str, **tensors: Tensor | None) -> None:
    """Raise for what the reference supports and the kernel does not."""
    for name, t in tensors.items():
        if t is not None and t.stride(-1) != 1:
            raise ValueError(
                f"{verb}: on a GPU the last dimension must be contiguous, got strides {t.stride()}"
                f" of {name} {tuple(t.shape)}"
            )
