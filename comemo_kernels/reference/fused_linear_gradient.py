"""Gradients of the fused linear layers: the same algebra on a CPU and on a GPU.

    norm_linear      z = y W^T              dW = dz^T y;  dy = dz W
    norm_swiglu      p = silu(g) u          dg, du by `swiglu_gradient`;  g = y Wg^T, u = y Wu^T
    gated_residual   z = x + s (a W^T)      e = dz W;  da = s e;  ds = sum(a e);  dW = s dz^T a
    gated_swiglu     z = x + s (p W^T)      the same with p for a;  dx = dz + that of the norm

y is x after RMSNorm, and s = tanh(gate). Kept for the backward pass are inputs and weights, and of
gated_swiglu g and u. What is cheap to compute again is: y and p.
A backend gives the steps, and gets an autograd.Function for each layer.

Letters: R rows, d elements of x, F of g and u.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo_kernels._once import once
from comemo_kernels._writes import may_overwrite, needs_gradient

# A network's gradient takes its rows in so many parts, unless they are few: it holds five matrices
# [part, F] at a time. Gradients of weights are rounded once for each part.
PARTS, FEW = 4, 512


class Steps(NamedTuple):
    """What a backend computes; signatures are those of the functions of the same names."""

    rms_norm: Callable[..., Tensor]
    rms_norm_gradient: Callable[..., tuple[Tensor, Tensor]]
    product: Callable[..., Tensor]  # x weight^T
    swiglu: Callable[..., Tensor]
    swiglu_gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    add_gated: Callable[..., Tensor]  # x + tanh(gate) * added


class Functions(NamedTuple):
    """An autograd.Function for each layer."""

    norm_linear: Any
    norm_swiglu: Any
    gated_residual: Any
    gated_swiglu: Any


def swiglu(g: Tensor, u: Tensor) -> Tensor:
    """silu(g) * u, in place after silu: on a CPU new memory costs more than a pass."""
    return F.silu(g).mul_(u)


def swiglu_gradient(
    e: Tensor,
    g: Tensor,
    u: Tensor,
    gate: Tensor | None,
    to_inner: bool,
    to_product: bool,
    to_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of p = silu(g) u by `e`, the gradient before the factor tanh(gate), and p again.

    Args:
        e, g, u: [R, F].
        gate: [1], or None for a factor of 1.
        to_inner, to_product, to_gate: what to compute.

    Returns:
        dg, du [R, F] (to_inner), p [R, F] (to_product), sum(e p) [1] at least in float32 (to_gate);
        each of no elements if it is not computed.
    """
    dg = du = e.new_empty(0)
    total = e.new_empty(0, dtype=torch.promote_types(e.dtype, torch.float32))
    p = F.silu(g)
    if to_inner:
        inner = e if gate is None else _scaled(e, gate)
        du = inner * p
        inner = inner * u if gate is None else inner.mul_(u)
        dg = torch.ops.aten.silu_backward(inner, g)
        del inner
    if to_product or to_gate:
        p.mul_(u)
    if to_gate:
        total = sum_of_products(e, p)
    return dg, du, p if to_product else p.new_empty(0), total


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """sum(a b) [1], in float32 or float64."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a * b).sum(dtype=wide).view(1)


def add_gated(x: Tensor, added: Tensor, gate: Tensor | None) -> Tensor:
    """x + tanh(gate) * added; in the memory of `added`, which is the caller's own, if possible."""
    mixed = {t.dtype for t in (x, added, gate) if t is not None} != {added.dtype}
    if mixed or not may_overwrite() or needs_gradient(x, added, gate):
        return x + (added if gate is None else gate.tanh() * added)
    return (added if gate is None else added.mul_(gate.tanh())).add_(x)


def make_functions(steps: Steps) -> Functions:
    """An autograd.Function for each layer, from the steps of a backend."""

    class NormLinear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, norm_weight, weight, eps):
            ctx.save_for_backward(x, norm_weight, weight)
            ctx.eps, ctx.dtype = eps, _product_dtype(x)
            y = steps.rms_norm(x, norm_weight, eps).to(ctx.dtype)
            return steps.product(y, weight.to(ctx.dtype))

        @staticmethod
        @once("norm_linear")
        def backward(ctx, saved, dz):
            x, norm_weight, weight = saved
            to_x, to_norm, to_weight, _ = ctx.needs_input_grad
            dx = dnorm = dweight = None
            rows, dz = _flat(x), _gradient(dz, ctx.dtype)
            if to_weight:
                y = steps.rms_norm(rows, norm_weight, ctx.eps).to(ctx.dtype)
                dweight = (dz.t() @ y).to(weight.dtype)
                del y
            if to_x or to_norm:
                dy = dz @ weight.to(ctx.dtype)
                dx, dnorm = _through_norm(dy, rows, norm_weight, None, ctx.eps, (to_x, to_norm))
            return dx if dx is None else dx.view(x.shape), dnorm, dweight, None

    class NormSwiglu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, norm_weight, gate_weight, up_weight, eps):
            ctx.save_for_backward(x, norm_weight, gate_weight, up_weight)
            ctx.eps, ctx.dtype = eps, _product_dtype(x)
            y = steps.rms_norm(x, norm_weight, eps).to(ctx.dtype)
            return steps.swiglu(*_inner(y, gate_weight, up_weight))

        @staticmethod
        @once("norm_swiglu")
        def backward(ctx, saved, dp):
            x, norm_weight, *inner_weights = saved
            rows, dp = _flat(x), _gradient(dp, ctx.dtype)
            y = steps.rms_norm(rows, norm_weight, ctx.eps).to(ctx.dtype)
            inner = _inner(y, *inner_weights)
            found = steps.swiglu_gradient(dp, *inner, None, True, False, False)
            del inner
            dinner, needed, sums = [*found[:2]], ctx.needs_input_grad[:4], Sums()
            del found
            weights = (norm_weight, *inner_weights)
            dx = _through_inner(dinner, y, rows, weights, None, ctx.eps, needed, sums)
            grads = (dx if dx is None else dx.view(x.shape), *sums.of(weights))
            return *grads, None

    class GatedResidual(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, a, weight, gate):
            kept = a if ctx.needs_input_grad[2] or ctx.needs_input_grad[3] else None
            ctx.save_for_backward(weight, kept, gate)
            ctx.dtype, ctx.dtypes, ctx.shape = _product_dtype(x), (x.dtype, a.dtype), a.shape
            return steps.add_gated(x, steps.product(a.to(ctx.dtype), weight.to(ctx.dtype)), gate)

        @staticmethod
        @once("gated_residual")
        def backward(ctx, saved, dz):
            weight, a, gate = saved
            to_x, to_a, to_weight, to_gate = ctx.needs_input_grad
            dx = da = dweight = dgate = None
            if to_x:
                dx = dz.to(ctx.dtypes[0])
            rows, dz = None if a is None else _flat(a).to(ctx.dtype), _gradient(dz, ctx.dtype)
            if to_weight:
                dweight = (_scaled(dz, gate).t() @ rows).to(weight.dtype)
            if to_a or to_gate:
                e = dz @ weight.to(ctx.dtype)
                if to_gate:
                    dgate = _through_tanh(sum_of_products(rows, e), gate)
                if to_a:
                    da = _scaled(e, gate).to(ctx.dtypes[1]).view(ctx.shape)
            return dx, da, dweight, dgate

    class GatedSwiglu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, norm_weight, gate_weight, up_weight, down_weight, gate, eps, keep):
            ctx.eps, ctx.dtype = eps, _product_dtype(x)
            y = steps.rms_norm(x, norm_weight, eps).to(ctx.dtype)
            inner = _inner(y, gate_weight, up_weight)
            del y
            weights = (norm_weight, gate_weight, up_weight, down_weight, gate)
            ctx.save_for_backward(x, *weights, *(inner if keep else ()))
            p = steps.swiglu(*inner)
            del inner
            return steps.add_gated(x, steps.product(p, down_weight.to(ctx.dtype)), gate)

        @staticmethod
        @once("gated_swiglu")
        def backward(ctx, saved, dz):
            x, *weights, gate = saved[:6]
            inner, needed, sums = saved[6:], ctx.needs_input_grad[:6], Sums()
            rows, dz = _flat(x), _gradient(dz, dz.dtype)
            parts = []
            for part in _parts(len(rows)):
                own = [_flat(t)[part] for t in inner]
                given = (rows[part], dz[part], own, weights, gate)
                parts.append(_through_network(ctx, *given, needed, sums))
            found = [part for part in parts if part is not None]
            dx = torch.cat(found).view(x.shape) if len(found) > 1 else None
            if len(found) == 1:
                dx = found[0].view(x.shape)
            dgate = _through_tanh(sums.gate, gate) if needed[5] else None
            return dx, *sums.of(weights), dgate, None, None

    def _inner(y: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(steps.product(y, weight.to(y.dtype)) for weight in weights)

    def _through_network(
        ctx: Any,
        rows: Tensor,
        residual: Tensor,
        inner: Sequence[Tensor],
        weights: Sequence[Tensor],
        gate: Tensor | None,
        needed: Sequence[bool],
        sums: "Sums",
    ) -> Tensor | None:
        """Gradient of some rows; those of the weights are added to `sums`."""
        dz, y, (*before, down_weight) = residual.to(ctx.dtype), None, weights
        *to_inner, to_down, to_gate = needed
        if not inner or needed[2] or needed[3]:
            y = steps.rms_norm(rows, weights[0], ctx.eps).to(ctx.dtype)
        g, u = inner or _inner(y, *before[1:])
        flags = (any(to_inner), to_down, to_gate)
        e = dz @ down_weight.to(ctx.dtype) if flags[0] or to_gate else g
        dg, du, p, total = steps.swiglu_gradient(e, g, u, gate, *flags)
        dinner = [dg, du]  # not `*dinner`: torch.compile makes a tuple of it
        del dg, du
        del e, g, u
        if to_down:
            sums.add(3, _scaled(dz, gate).t(), p)
        del p
        if to_gate:
            sums.gate = total if sums.gate is None else sums.gate + total
        if not flags[0]:
            return None
        return _through_inner(dinner, y, rows, before, residual, ctx.eps, to_inner, sums)

    def _through_norm(
        dy: Tensor,
        rows: Tensor,
        norm_weight: Tensor | None,
        added: Tensor | None,
        eps: float,
        needed: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of rows [R, d] and of the norm's weight from dy [R, d] of the normed rows."""
        dx, dnorm = steps.rms_norm_gradient(dy, rows, norm_weight, added, eps, *needed)
        return dx if needed[0] else None, dnorm if needed[1] else None

    def _through_inner(
        dinner: list[Tensor],
        y: Tensor | None,
        rows: Tensor,
        weights: Sequence[Tensor],
        added: Tensor | None,
        eps: float,
        needed: Sequence[bool],
        sums: "Sums",
    ) -> Tensor | None:
        """Gradient of rows [R, d]; those of the norm and of both weights are added to `sums`.

        `dinner` is dg and du. It is emptied, so that each is freed after its last product.
        """
        norm_weight, gate_weight, up_weight = weights
        to_x, to_norm, to_gate_weight, to_up_weight = needed
        dx = dy = None
        du, dg = dinner.pop(), dinner.pop()
        if to_x or to_norm:
            dy = torch.addmm(dg @ gate_weight.to(dg.dtype), du, up_weight.to(du.dtype))
        if to_gate_weight and y is not None:
            sums.add(1, dg.t(), y)
        del dg
        if to_up_weight and y is not None:
            sums.add(2, du.t(), y)
        del du
        if dy is not None:
            dx, dnorm = _through_norm(dy, rows, norm_weight, added, eps, (to_x, to_norm))
            if dnorm is not None:
                sums.found[0] = dnorm if sums.found[0] is None else sums.found[0] + dnorm
        return dx

    return Functions(NormLinear, NormSwiglu, GatedResidual, GatedSwiglu)


class Sums:
    """Gradients of a network's norm, gate, up and down weights, and of its gate, so far."""

    def __init__(self) -> None:
        self.found: list[Tensor | None] = [None] * 4
        self.gate: Tensor | None = None

    def add(self, index: int, a: Tensor, b: Tensor) -> None:
        """Add the product of two matrices to one of them."""
        total = self.found[index]
        self.found[index] = a @ b if total is None else total.addmm_(a, b)

    def of(self, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients in the dtypes of these weights."""
        return [
            total if total is None or weight is None else total.to(weight.dtype)
            for total, weight in zip(self.found, weights, strict=False)
        ]


def _parts(count: int) -> list[slice]:
    """Rows that a network's gradient takes at a time. A graph is one part."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    step = max(FEW, -(-count // PARTS))
    return [slice(first, first + step) for first in range(0, max(count, 1), step)]


def _flat(t: Tensor) -> Tensor:
    """[R, d] of [..., d]."""
    return t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def _gradient(dz: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, d], contiguous: a gradient may be one number, expanded."""
    return _flat(dz).to(dtype).contiguous()


def _product_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which matrices are multiplied: under autocast PyTorch converts all but float64."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _scaled(t: Tensor, gate: Tensor | None) -> Tensor:
    """t * tanh(gate)."""
    return t if gate is None else (t * gate.tanh()).to(t.dtype)


def _through_tanh(total: Tensor, gate: Tensor) -> Tensor:
    """Gradient of a gate [1] from that of its tanh."""
    return ((1 - gate.to(total.dtype).tanh().square()) * total).to(gate.dtype)
