"""Gated cross-attention over the image memory, with its output projection.

    y = x + s (a W^T)              a = attend_spans(q, k, v),  s = tanh(gate)

Without gradients it is the two operations. Their gradient is one function: with e = dy W

    dW = s dy^T a;  dgate = (1 - s^2) sum(e * a)
    dq, dk, dv: s times the gradients of attention for e

The gradient of attention needs rowsum(e * a), whose sum is in dgate. It never divides by s, so it
is right at s = 0, where training begins. Saved: q, k, v, a, the log-sum-exp, W; neither scores nor
a W^T. The three GEMMs are the library's.
Source: CoMemo (arXiv:2506.06279).

Letters: B batch, N tokens, d width, H query heads, M memory, G key heads, D head dimension.
"""

import torch
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._attend_gradient import attend_gradient_op
from comemo_kernels._once import once
from comemo_kernels._op import documented, on_triton
from comemo_kernels.attention import attend_op, attend_spans
from comemo_kernels.attention_types import MemoryScales, QueryRotation
from comemo_kernels.fused_linear import gated_residual
from comemo_kernels.reference.attention import unscaled
from comemo_kernels.reference.attention_checks import check_attention_kernel, check_read
from comemo_kernels.reference.fused_linear_checks import check_strides
from comemo_kernels.reference.gated_attention import check_attend_gated, check_stream


class _AttendGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q, k, v, weight, gate, *rest):
        out, lse = attend_op(q, k, v, *rest, None, None, 1)
        ctx.save_for_backward(q, k, v, out, lse, weight, gate, *rest)
        return gated_residual(x, out.flatten(2), weight, gate)

    @staticmethod
    @once("attend_gated")
    def backward(ctx, saved, dy):
        q, k, v, out, lse, weight, gate, *rest = saved
        to_x, to_q, to_k, to_v, to_weight, to_gate = ctx.needs_input_grad[:6]
        dq = dk = dv = dweight = dgate = None
        factor = None if gate is None else gate.float().tanh()
        rows = dy.reshape(-1, dy.shape[-1]).to(out.dtype)
        if to_weight:
            dweight = rows.t() @ out.flatten(0, 1).flatten(1)
            dweight = (dweight if factor is None else dweight * factor).to(weight.dtype)
        if to_q or to_k or to_v or to_gate:
            e = (rows @ weight.to(out.dtype)).view(out.shape)
            inputs = (e, q, k, v, out, lse, None, *rest, gate, to_q, to_k or to_v)
            dq, dk, dv, delta = attend_gradient_op(*inputs)
            if factor is not None and to_gate:
                dgate = ((1 - factor * factor) * delta.sum()).to(gate.dtype)
        return (
            dy if to_x else None,
            dq if to_q else None,
            dk if to_k else None,
            dv if to_v else None,
            dweight,
            dgate,
            *[None] * 6,
        )


@documented(reference.attend_gated)
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
    if not on_triton(q):
        return reference.attend_gated(x, q, k, v, spans, weight, gate, rotation, scales, validate)
    learning = (x, q, k, v, weight) if gate is None else (x, q, k, v, weight, gate)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in learning)):
        check_stream(x, q)
        read = attend_spans(q, k, v, spans, rotation, scales, validate=validate)
        return gated_residual(x, read.flatten(2), weight, gate)
    check_attend_gated(x, q, k, v, spans, weight, gate, rotation, scales)
    check_attention_kernel(q, k, v, spans, rotation, scales, None, True)
    check_strides("attend_gated", x=x, weight=weight)
    if validate:
        check_read(k.shape[0], spans, None if rotation is None else rotation.starts)
    if scales is not None:
        k, v = unscaled(k, v, scales, q.dtype)
    rotate = (None,) * 5 if rotation is None else rotation
    return _AttendGated.apply(x, q, k, v, weight, gate, spans, *rotate)
