"""Argument checks of the fused linear layers."""

import torch
from torch import Tensor

from comemo_kernels.reference.dtypes import DTYPES


def check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise the errors of `linear`."""
    rows = weight.shape[:1]
    _check("linear", x, ("weight", weight, rows + x.shape[-1:]), ("bias", bias, rows))


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


def check_gated_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    gate: Tensor | None,
    recompute: str,
) -> None:
    """Raise the errors of `gated_swiglu` that do not depend on the device."""
    d, F = x.shape[-1:], gate_weight.shape[:1]
    inner = ("norm_weight", norm_weight, d), ("gate_weight", gate_weight, F + d)
    outer = ("down_weight", down_weight, d + F), ("gate", gate, torch.Size([1]))
    _check("gated_swiglu", x, *inner, ("up_weight", up_weight, F + d), *outer)
    if recompute not in ("cheap", "projections"):
        raise ValueError(
            f"gated_swiglu: recompute must be 'cheap' or 'projections', got {recompute!r}"
        )


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
