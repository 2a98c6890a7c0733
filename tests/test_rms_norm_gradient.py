"""Gradient of RMSNorm: the kernel and its formula against PyTorch's own gradient."""

import pytest
import torch
from conftest import DEVICE, DTYPES, TRACED
from fused_linear_inputs import normed
from harness import assert_matches
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from comemo_kernels.reference.norms import rms_norm_gradient

pytestmark = pytest.mark.kernel(reference=True)


@pytest.fixture(scope="module")
def gradient():
    """The operator where kernels run, elsewhere its formula."""
    from comemo_kernels._op import on_triton

    if not on_triton(torch.empty(0, device=DEVICE)):
        return rms_norm_gradient
    from comemo_kernels._rms_norm_gradient import rms_norm_gradient_op

    return rms_norm_gradient_op


def pytorchs(dy, x, weight, added, eps=1e-5, to_x=True, to_weight=True):
    """Gradients of the norm written out; what is not computed is empty."""
    leaves = [x.detach().requires_grad_()]
    leaves += [] if weight is None else [weight.detach().requires_grad_()]
    with torch.enable_grad():
        y = normed(leaves[0], leaves[-1] if len(leaves) > 1 else None, eps)
    dx, *rest = torch.autograd.grad(y, leaves, dy.to(y.dtype))
    dx = dx if added is None else dx + added
    dweight = rest[0] if rest and to_weight else x.new_empty(0)
    return dx.to(x.dtype) if to_x else x.new_empty(0, x.shape[1]), dweight


def make_inputs(R, d, dtype, weighted=True, added=True, device="cpu"):
    g = torch.Generator().manual_seed(d)
    dy, x, plus = (torch.randn(R, d, generator=g).to(device, dtype) for _ in range(3))
    weight = (1 + torch.randn(d, generator=g)).to(device, dtype) if weighted else None
    return {"dy": dy, "x": 3 * x, "weight": weight, "added": plus if added else None}


@given(
    rows=st.integers(1, 20),
    d=st.sampled_from([1, 7, 24, 128, 255, 264, 520]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    added=st.booleans(),
    to=st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_matches_pytorchs_gradient(device, gradient, rows, d, dtype, weighted, added, to):
    def ours(**inputs):
        return gradient(**inputs, eps=1e-5, to_x=to[0], to_weight=to[1] and weighted)

    def theirs(**inputs):
        return pytorchs(**inputs, to_x=to[0], to_weight=to[1])

    assert_matches(ours, theirs, make_inputs(rows, d, dtype, weighted, added, device))


@pytest.mark.kernel
@pytest.mark.parametrize("d", [24, 264, 517])
@pytest.mark.parametrize("weighted", [False, True])
def test_wide_rows_and_several_rows_a_program(device, gradient, monkeypatch, d, weighted):
    """As on a GPU with one multiprocessor, for 4, 2 and 1 programs."""
    from comemo_kernels import _rms_norm_gradient as kernels

    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(kernels, "NARROW", 32)
    monkeypatch.setattr(kernels, "WIDE", 512)
    launched = []
    for name in ("rms_norm_gradient", "rms_norm_gradient_wide", "rms_norm_gradient_widest"):
        kernel = getattr(kernels, name)
        launch = kernel.launch

        def watched(programs, *args, name=name, launch=launch):
            launched.append((name, programs))
            launch(programs, *args)

        monkeypatch.setattr(kernel, "launch", watched)

    def ours(**inputs):
        return gradient(**inputs, eps=1e-5, to_x=True, to_weight=weighted)

    assert_matches(ours, pytorchs, make_inputs(9, d, DTYPES[0], weighted, device=device))
    wanted = {24: ("rms_norm_gradient", 4), 264: ("rms_norm_gradient_wide", 2)}
    passes = 1 + (d > 512 and weighted)
    assert launched == [wanted.get(d, ("rms_norm_gradient_widest", 1))] * passes


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rows_that_overflow_or_vanish_when_squared(device, gradient, size):
    inputs = make_inputs(3, 300, torch.float32, added=False, device=device)
    inputs["x"] *= size

    def ours(**inputs):
        return gradient(**inputs, eps=1e-5, to_x=True, to_weight=True)

    assert_matches(ours, pytorchs, inputs)


@pytest.mark.parametrize("shift", [0, 3])
def test_strided_rows(device, gradient, shift):
    """Views that start and continue anywhere, aligned to 128 bits or not."""
    given = make_inputs(5, 48, torch.float32, device=device)
    wanted = gradient(**given, eps=1e-5, to_x=True, to_weight=True)
    for name in ("x", "added"):
        held = torch.full((5, 64 + shift), float("nan"), device=device)
        held[:, shift : 48 + shift] = given[name]
        given[name] = held[:, shift : 48 + shift]
    again = gradient(**given, eps=1e-5, to_x=True, to_weight=True)
    for found, right in zip(again, wanted, strict=True):
        torch.testing.assert_close(found, right)


def test_mixed_dtypes(device, gradient):
    """As under autocast: rows and weight in float32, gradients of the product in 16 bits."""
    given = make_inputs(5, 48, torch.float32, device=device)
    given["dy"] = given["dy"].half()

    def ours(**inputs):
        return gradient(**inputs, eps=1e-5, to_x=True, to_weight=True)

    assert_matches(ours, pytorchs, given)
    dx, dweight = ours(**given)
    assert dx.dtype == dweight.dtype == torch.float32


def test_rows_add_up(device, gradient):
    """A row alone has the bits of the row in a batch; no rows give zero."""
    given = make_inputs(5, 48, torch.float32, device=device)
    dx, dweight = gradient(**given, eps=1e-5, to_x=True, to_weight=True)
    total = torch.zeros_like(dweight)
    for i in range(5):
        row = {n: t if n == "weight" else t[i : i + 1] for n, t in given.items()}
        dx_of_row, dweight_of_row = gradient(**row, eps=1e-5, to_x=True, to_weight=True)
        assert torch.equal(dx_of_row[0], dx[i])
        total += dweight_of_row
    torch.testing.assert_close(total, dweight)
    none = {n: t if n == "weight" else t[:0] for n, t in given.items()}
    dx, dweight = gradient(**none, eps=1e-5, to_x=True, to_weight=True)
    assert dx.shape == (0, 48)
    assert torch.equal(dweight, torch.zeros_like(dweight))


def test_the_formula_in_float64():
    given = make_inputs(6, 40, torch.float64)
    for weighted, added in ((True, True), (False, False)):
        inputs = given | ({} if weighted else {"weight": None}) | ({} if added else {"added": None})
        found = rms_norm_gradient(**inputs, eps=1e-5, to_x=True, to_weight=weighted)
        for ours, theirs in zip(found, pytorchs(**inputs), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.kernel
@TRACED
@pytest.mark.parametrize("weighted", [False, True])
def test_operator_contract(real_device, weighted):
    from comemo_kernels._rms_norm_gradient import rms_norm_gradient_op

    inputs = make_inputs(5, 24, torch.float16, weighted, weighted, device=real_device)
    for to in ((True, weighted), (False, True)):
        if weighted or to[0]:
            opcheck(rms_norm_gradient_op, (*inputs.values(), 1e-5, *to))
