"""Gated cross-attention over the image memory, with its output projection, in PyTorch."""

from torch import Tensor

from comemo_kernels._arguments import public
from comemo_kernels.attention_types import MemoryScales, QueryRotation
from comemo_kernels.reference.attention import attend_spans
from comemo_kernels.reference.attention_checks import check_attention
from comemo_kernels.reference.fused_linear import check_gated_residual, gated_residual


@public
def attend_gated(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rotation: QueryRotation | None = None,
    scales: MemoryScales | None = None,
    validate: bool = False,
) -> Tensor:
    """x + tanh(gate) * (attend_spans(q, k, v) weight^T): attention, projection, gated residual.

    It is `attend_spans` and `gated_residual`. Under autograd it is one function: it saves q, k, v,
    the attention's output and its log-sum-exp, neither scores nor the projection's output; and the
    gradient of the gate is a sum of rows that the gradient of attention needs anyway, right where
    the gate is 0. Source: CoMemo (arXiv:2506.06279).

    Args:
        x: [B, N, d] in the dtype of q.
        q, k, v, spans, rotation, scales, validate: as in `attend_spans`.
        weight: [d, H * D] in the dtype of x; on a GPU H * D must be contiguous.
        gate: [1] in the dtype of x, before tanh; None means a factor of 1.

    Returns:
        [B, N, d] in the dtype of x, a new tensor. Differentiable in x, q, k, v, weight and gate,
        once.

    Raises:
        ValueError: as `attend_spans` and `gated_residual`.
    """
    check_attend_gated(x, q, k, v, spans, weight, gate, rotation, scales)
    read = attend_spans(q, k, v, spans, rotation, scales, validate=validate)
    assert isinstance(read, Tensor)
    return gated_residual(x, read.flatten(2), weight, gate)


def check_attend_gated(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    rotation: QueryRotation | None,
    scales: MemoryScales | None,
) -> None:
    """Raise the errors of `attend_gated` that do not depend on the device."""
    check_attention(q, k, v, spans, rotation, scales, None)
    check_stream(x, q)
    read = q.new_empty(1).expand(*q.shape[:2], q.shape[2] * q.shape[3])
    check_gated_residual(x, read, weight, gate)


def check_stream(x: Tensor, q: Tensor) -> None:
    """Raise unless x has the tokens of q."""
    if x.ndim != 3 or x.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"attend_gated: x must be [B, N, d] with the B, N of q {tuple(q.shape)}, got"
            f" {tuple(x.shape)}"
        )
