"""Fused RMSNorm + linear, SwiGLU, gated residual and feed-forward network: reference and laws."""

import pytest
import torch
from conftest import DTYPES
from fused_linear_inputs import FORMS, both, make_inputs, plain, requiring_grad
from harness import assert_matches
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from comemo_kernels import gated_residual, norm_linear

pytestmark = pytest.mark.kernel(reference=True)  # its laws are the reference's too

ROWS = [(1,), (3, 1), (2, 8), (2, 3, 5), (17,), (0,)]  # a launch for up to 16


# --- values and gradients ---


@pytest.mark.parametrize("form", FORMS)
@given(
    rows=st.integers(1, 20),
    K=st.sampled_from([1, 7, 24, 128, 255, 256, 520]),
    outputs=st.sampled_from([1, 5, 16, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    gradients=st.booleans(),
)
def test_matches_what_pytorch_computes(device, form, rows, K, outputs, dtype, gradients):
    inputs = make_inputs(form, (rows,), K, outputs, dtype, device=device)
    inputs = requiring_grad(inputs) if gradients else inputs
    assert_matches(both(form)[0], plain(form), inputs)


@pytest.mark.parametrize("gate", [0.0, 1e-4, -0.2, 0.3, -3.0, 60.0, -6e4])
def test_every_gate(device, gate):
    for dtype in DTYPES:
        inputs = make_inputs("gated_residual", dtype=dtype, gate=gate, device=device)
        assert_matches(*both("gated_residual"), inputs)
        alone = inputs | {"x": torch.zeros_like(inputs["x"])}  # no residual hides a small gate
        assert_matches(*both("gated_residual"), alone)


@pytest.mark.parametrize("form", FORMS)
def test_rows_that_overflow_or_vanish_when_squared(device, form):
    for size in (1e-12, 1e12):
        inputs = make_inputs(form, K=300, device=device)
        inputs["x"] *= size
        assert_matches(*both(form), inputs)


def test_silu_of_large_values(device):
    inputs = make_inputs("norm_swiglu", K=300, device=device)
    inputs["gate_weight"] *= 1e4
    assert_matches(*both("norm_swiglu"), inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_any_number_of_dimensions(device, form, rows):
    ours, theirs = (op(**make_inputs(form, rows, device=device)) for op in both(form))
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(device, form):
    inputs = requiring_grad(make_inputs(form, (2, 1), 5, 3, torch.float64, device=device))
    for op in both(form):
        assert gradcheck(lambda *args, op=op: op(*args), tuple(inputs.values()))


@pytest.mark.parametrize("form", FORMS)
def test_one_operand_that_requires_grad_is_enough(device, form):
    inputs = make_inputs(form, device=device)
    for name in (name for name, t in inputs.items() if t is not None):
        leaf = requiring_grad({name: inputs[name]})
        out = both(form)[0](**inputs | leaf)
        assert torch.autograd.grad(out.sum(), leaf[name])[0].abs().sum() > 0
        with torch.no_grad():
            assert not both(form)[0](**inputs | leaf).requires_grad


# --- laws ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_reference_is_what_is_published(form, gradients):
    """Also the forward pass that is recorded for gradients."""
    inputs = make_inputs(form, dtype=torch.bfloat16)
    inputs = requiring_grad(inputs) if gradients else inputs
    assert torch.equal(both(form)[1](**inputs), plain(form)(**inputs))


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS[:-2])  # a network is its parts
def test_a_row_alone_is_the_row_in_a_batch(device, form):
    for dtype in DTYPES:
        inputs = make_inputs(form, (16,), 300, dtype=dtype, device=device)
        whole = both(form)[0](**inputs)
        for i in range(16):
            row = {name: inputs[name][i : i + 1] for name in ("x", "a") if name in inputs}
            assert torch.equal(both(form)[0](**inputs | row), whole[i : i + 1])


@pytest.mark.parametrize("form", [form for form in FORMS if "folded" in form])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_folded_is_a_norm_of_ones_and_an_open_gate(form, dtype):
    inputs = make_inputs(form, dtype=dtype)
    neutral = {"gate": torch.tensor([20.0]), "norm_weight": torch.ones(24)}
    neutral = {name: t.to(dtype) for name, t in neutral.items() if name in inputs}
    op = both(form)[1]
    assert torch.equal(op(**inputs), op(**inputs | neutral))


@pytest.mark.parametrize("rows", [(1,), (16,), (17,)], ids=str)
def test_a_closed_gate_changes_nothing(device, rows):
    for dtype in DTYPES:
        inputs = make_inputs("gated_residual", rows, dtype=dtype, gate=0.0, device=device)
        out = gated_residual(**inputs)
        assert torch.equal(out, inputs["x"])
        assert out.data_ptr() != inputs["x"].data_ptr()


@pytest.mark.parametrize("form", FORMS)
def test_strides_change_nothing(device, form):
    inputs = make_inputs(form, (2, 3), device=device)
    wanted = both(form)[0](**inputs)

    def spread(t):
        """Views whose start and strides are not aligned to 128 bits."""
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), float("nan"))
        wide[..., 3:-2] = t
        return wide[..., 3:-2]

    def turned(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim == 3 else t

    for change in (spread, turned):
        given = {name: None if t is None else change(t) for name, t in inputs.items()}
        again = both(form)[0](**given)
        torch.testing.assert_close(again, wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_the_last_position_of_a_prompt(device, form):
    """A slice of hidden states, as from a decoder."""
    inputs = make_inputs(form, (3, 4), device=device)
    last = {name: inputs[name][:, -1:] for name in ("x", "a") if name in inputs}
    packed = {name: t.contiguous() for name, t in last.items()}
    assert torch.equal(both(form)[0](**inputs | last), both(form)[0](**inputs | packed))


def test_eps_counts(device):
    inputs = make_inputs("norm_linear", device=device)
    for eps in (0, 1e-6, 1.0):
        assert_matches(*both("norm_linear"), inputs | {"eps": eps})
    assert not torch.equal(norm_linear(**inputs), norm_linear(**inputs, eps=1.0))
    inputs["x"] = torch.zeros_like(inputs["x"])
    assert norm_linear(**inputs).eq(0).all()
