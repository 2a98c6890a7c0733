"""SwiGLU between GEMMs and its gradient: the kernels and their formulas against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, DTYPES, TRACED
from harness import assert_matches
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from comemo_kernels.reference import fused_linear_gradient as formulas

pytestmark = pytest.mark.kernel(reference=True)


@pytest.fixture(scope="module")
def steps():
    """Forward and gradient: the operators where kernels run, elsewhere their formulas."""
    from comemo_kernels._op import on_triton

    if not on_triton(torch.empty(0, device=DEVICE)):
        return formulas.swiglu, formulas.swiglu_gradient
    from comemo_kernels._swiglu import swiglu_gradient_op, swiglu_op

    return swiglu_op, swiglu_gradient_op


def plain(g, u):
    return F.silu(g) * u


def plain_gradient(e, g, u, gate=None, to_inner=True, to_product=True, to_gate=True):
    g, u = (t.detach().requires_grad_() for t in (g, u))
    with torch.enable_grad():
        p = plain(g, u)
    s = 1 if gate is None else gate.tanh()
    dg, du = torch.autograd.grad(p, (g, u), (e * s).to(p.dtype))
    wide = torch.promote_types(p.dtype, torch.float32)
    nothing, total = e.new_empty(0), (e * p.detach()).sum(dtype=wide).view(1)
    inner = (dg, du) if to_inner else (nothing, nothing)
    return *inner, p.detach() if to_product else nothing, total if to_gate else total[:0]


def make_inputs(shape, dtype, gate=0.6, size=1.0, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    e, g, u = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    gate = None if gate is None else torch.tensor([gate]).to(device, dtype)
    return {"e": e, "g": size * g, "u": u, "gate": gate}


FLAGS = ("to_inner", "to_product", "to_gate")
SHAPES = [(1, 1), (3, 7), (2, 24), (5, 411), (9, 456), (1, 4096)]  # also of several programs


@given(
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from(DTYPES),
    gate=st.sampled_from([None, 0.0, 0.6, -1e-3, 30.0]),
    to=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_matches_pytorchs_gradient(device, steps, shape, dtype, gate, to):
    flags = dict(zip(FLAGS, to, strict=True))
    inputs = make_inputs(shape, dtype, gate, device=device)
    assert_matches(
        lambda **given: steps[1](**given, **flags),
        lambda **given: plain_gradient(**given, **flags),
        inputs,
    )
    parts = {name: inputs[name] for name in "gu"}
    assert_matches(lambda g, u: steps[0](g, u), plain, parts)


def test_large_values(device, steps):
    """exp overflows: silu is x or 0, and its slope 1 or 0."""
    inputs = make_inputs((2, 300), torch.float32, size=1e3, device=device)
    assert_matches(
        lambda **given: steps[1](**given, **dict.fromkeys(FLAGS, True)), plain_gradient, inputs
    )
    assert_matches(lambda g, u: steps[0](g, u), plain, {name: inputs[name] for name in "gu"})


def test_nothing_gives_nothing(device, steps):
    inputs = make_inputs((0, 24), torch.float32, device=device)
    dg, du, p, total = steps[1](*inputs.values(), True, True, True)
    assert dg.shape == du.shape == p.shape == steps[0](inputs["g"], inputs["u"]).shape == (0, 24)
    assert total.tolist() == [0.0]


def test_the_gate_of_another_dtype(device, steps):
    """As under autocast."""
    inputs = make_inputs((3, 40), torch.float16, device=device)
    wanted = steps[1](*inputs.values(), True, True, True)
    found = steps[1](*(inputs | {"gate": inputs["gate"].float()}).values(), True, True, True)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-5)


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    from comemo_kernels._swiglu import swiglu_gradient_op, swiglu_op

    e, g, u, gate = make_inputs((3, 24), torch.float16, device=real_device).values()
    opcheck(swiglu_op, (g, u))
    opcheck(swiglu_gradient_op, (e, g, u, gate, True, True, True))
    opcheck(swiglu_gradient_op, (e, g, u, None, True, False, False))
