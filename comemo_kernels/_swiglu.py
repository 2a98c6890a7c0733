"""SwiGLU between the GEMMs of a feed-forward network, and its gradient.

    p = silu(g) u                                   silu(g) = g S(g), S: the logistic function
    dg = s e u S(g) (1 + g (1 - S(g)));  du = s e silu(g);  sum(e p)

e = dy W, with W the weight after p, is the gradient of p before its factor s = tanh(gate). So the
gradient of the gate, (1 - s^2) sum(e p), does not divide by s, which is 0 when training starts.
The gradient of W needs p, which the forward pass does not keep.
Traffic: g and u read, p written, once; the gradient reads e too, and writes dg, du and p. Each
program writes one number of the sum; then they are summed: no atomics.
Source: CoMemo (arXiv:2506.06279); the network is that of Llama.
"""

import torch
import triton.language as tl
from torch import Tensor

from comemo_kernels._blocks import tanh
from comemo_kernels._op import Kernel, jit, register

# --- kernels ---


@jit
def _swiglu_kernel(
    out_ptr,  # [count], all contiguous
    g_ptr,
    u_ptr,
    count,
    ALIGNED: tl.constexpr,  # count is a multiple of 8
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK elements."""
    if ALIGNED:  # unchanged; the compiler learns that masks are of 8 elements
        count = count // 8 * 8
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    out = g / (1.0 + tl.exp(-g)) * u
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_gradient_kernel(
    dg_ptr,  # [count], all contiguous
    du_ptr,
    out_ptr,  # p
    sums_ptr,  # [programs] float32
    e_ptr,
    g_ptr,
    u_ptr,
    gate_ptr,  # [1]
    count,
    TO_INNER: tl.constexpr,  # write dg and du
    TO_PRODUCT: tl.constexpr,  # write p
    TO_GATE: tl.constexpr,  # write sums
    GATED: tl.constexpr,  # there is a gate
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program computes BLOCK elements."""
    if ALIGNED:
        count = count // 8 * 8
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-g))
    silu = g * share
    if TO_PRODUCT:
        tl.store(out_ptr + offs, (silu * u).to(out_ptr.dtype.element_ty), mask=mask)
    if TO_INNER or TO_GATE:
        e = tl.load(e_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if TO_GATE:
            tl.store(sums_ptr + tl.program_id(0), tl.sum(e * silu * u, 0))
        if TO_INNER:
            if GATED:
                e *= tanh(tl.load(gate_ptr).to(tl.float32))
            dg = e * u * (share + silu * (1.0 - share))
            tl.store(du_ptr + offs, (e * silu).to(du_ptr.dtype.element_ty), mask=mask)
            tl.store(dg_ptr + offs, dg.to(dg_ptr.dtype.element_ty), mask=mask)


swiglu = Kernel(_swiglu_kernel, [{"BLOCK": 2048, "num_warps": 8}])
swiglu_gradient = Kernel(_swiglu_gradient_kernel, [{"BLOCK": 2048, "num_warps": 8}])

# --- operators ---


def _launch(g: Tensor, u: Tensor) -> Tensor:
    """Both contiguous and of one shape."""
    out, count = _fake(g, u), g.numel()
    programs = -(-count // swiglu.config["BLOCK"])
    swiglu.launch(programs, out, g, u, count, count % 8 == 0)
    return out


def _fake(g: Tensor, u: Tensor) -> Tensor:
    return torch.empty_like(g)


swiglu_op = register("swiglu(Tensor g, Tensor u) -> Tensor", _launch, _fake)


def _launch_gradient(
    e: Tensor,
    g: Tensor,
    u: Tensor,
    gate: Tensor | None,
    to_inner: bool,
    to_product: bool,
    to_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """e, g and u are contiguous and of one shape."""
    dg, du, out, _ = _fake_gradient(e, g, u, gate, to_inner, to_product, to_gate)
    count = g.numel()
    programs = -(-count // swiglu_gradient.config["BLOCK"])
    sums = g.new_empty(programs if to_gate else 0, dtype=torch.float32)
    constants = (to_inner, to_product, to_gate, gate is not None, count % 8 == 0)
    tensors = (dg, du, out, sums, e, g, u, g if gate is None else gate)
    swiglu_gradient.launch(programs, *tensors, count, *constants)
    return dg, du, out, sums.sum(0, keepdim=True) if to_gate else sums


def _fake_gradient(
    e: Tensor,
    g: Tensor,
    u: Tensor,
    gate: Tensor | None,
    to_inner: bool,
    to_product: bool,
    to_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(wanted: bool) -> Tensor:
        return torch.empty_like(g) if wanted else g.new_empty(0)

    total = g.new_empty(1 if to_gate else 0, dtype=torch.float32)
    return like(to_inner), like(to_inner), like(to_product), total


swiglu_gradient_op = register(
    "swiglu_gradient(Tensor e, Tensor g, Tensor u, Tensor? gate, bool to_inner, bool to_product,"
    " bool to_gate) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_gradient,
    _fake_gradient,
)
