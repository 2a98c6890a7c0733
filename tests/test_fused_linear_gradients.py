"""Fused linear layers in training: gradients, what is kept for them, what is not computed."""

import functools
import itertools

import pytest
import torch
from conftest import DTYPES, SLOW
from fused_linear_inputs import FORMS, both, make_inputs, plain, requiring_grad
from harness import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import comemo_kernels
from comemo_kernels import gated_swiglu
from comemo_kernels.reference import fused_linear_gradient

pytestmark = [pytest.mark.kernel(reference=True), pytest.mark.usefixtures("one_thread")]


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in PRODUCTS
        return func(*args, **kwargs or {})


def learning(inputs, names):
    """Inputs of which those in `names` require gradients."""
    return {
        n: t.detach().requires_grad_(n in names) if t is not None else t for n, t in inputs.items()
    }


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=SLOW if "folded" in form else ()) for form in FORMS]
)
@given(data=st.data(), rows=st.sampled_from([(17,), (3, 7), (2, 3, 5)]), recompute=st.booleans())
def test_any_parts_that_learn(device, form, data, rows, recompute):
    """The others are frozen; PyTorch's own error is the yardstick."""
    dtype = data.draw(st.sampled_from(DTYPES))
    inputs = make_inputs(form, rows, 40, 24, dtype, device=device)
    names = [name for name, t in inputs.items() if t is not None]
    chosen = data.draw(st.sets(st.sampled_from(names), min_size=1))
    op = both(form)[0]
    if recompute and op is gated_swiglu:
        op = functools.partial(op, recompute="projections")
    assert_matches(op, plain(form), learning(inputs, chosen))


@pytest.mark.parametrize("form", FORMS)
def test_in_float64_gradients_are_those_of_pytorch(device, form):
    inputs = requiring_grad(make_inputs(form, (3, 7), 40, 24, torch.float64, device=device))
    wanted = evaluate(plain(form), inputs)
    for op in both(form):
        for name, found in evaluate(op, inputs).items():
            torch.testing.assert_close(found, wanted[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("recompute", ["cheap", "projections"])
@pytest.mark.parametrize("gate", [0.0, 0.6, None])
def test_gradients_of_a_network(device, recompute, gate):
    form = "gated_swiglu" + " folded" * (gate is None)
    inputs = make_inputs(form, (2, 1), 5, 3, torch.float64, gate, device)
    for op in both(form):
        assert gradcheck(
            lambda *args, op=op: op(*args, 1e-5, recompute), tuple(requiring_grad(inputs).values())
        )


@pytest.mark.parametrize("recompute", ["cheap", "projections"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_network_takes_its_rows_in_parts(monkeypatch, device, recompute, dtype):
    """Four parts at most, the last one shorter."""
    monkeypatch.setattr(fused_linear_gradient, "FEW", 5)
    inputs = requiring_grad(make_inputs("gated_swiglu", (2, 11), 40, 24, dtype, device=device))
    op = functools.partial(gated_swiglu, recompute=recompute)
    out = op(**inputs)
    with Products() as products:
        out.sum().backward()
    assert products.count == 4 * (6 if recompute == "cheap" else 8)
    assert_matches(op, plain("gated_swiglu"), inputs)


@pytest.mark.parametrize("form", ["gated_residual", "gated_swiglu"])
def test_a_closed_gate_learns(device, form):
    """At 0, where training starts: its gradient is that of its tanh, the inner ones are 0."""
    for dtype in DTYPES:
        inputs = requiring_grad(make_inputs(form, (20,), dtype=dtype, gate=0.0, device=device))
        assert_matches(both(form)[0], plain(form), inputs)
        found = evaluate(both(form)[0], inputs)
        inner = {"a", "weight", "norm_weight", "gate_weight", "up_weight", "down_weight"}
        for name in inner & {*inputs}:
            assert found[f"gradient of {name}"].eq(0).all()
        assert found["gradient of gate"].abs() > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_strides_and_expanded_gradients(device, form):
    inputs = make_inputs(form, (2, 11), device=device)

    def gradients(given):
        leaves = {n: t for n, t in requiring_grad(given).items() if t is not None}
        out = both(form)[0](**given | leaves)
        return torch.autograd.grad(out.sum(), list(leaves.values()))  # one number, expanded

    def turned(t):
        return t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim == 3 else t

    def spread(t):
        return torch.cat([t, t.new_full((*t.shape[:-1], 5), float("nan"))], -1)[..., :-5]

    wanted = gradients(inputs)
    for change in (turned, spread):
        given = {name: None if t is None else change(t) for name, t in inputs.items()}
        for found, right in zip(gradients(given), wanted, strict=True):
            assert found.shape == right.shape
            torch.testing.assert_close(found, right)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_give_zero_gradients(device, form):
    found = evaluate(both(form)[0], requiring_grad(make_inputs(form, (2, 0), device=device)))
    assert found["output 0"].numel() == 0
    for name, t in found.items():
        assert t.eq(0).all(), name


@pytest.mark.parametrize("form", FORMS)
def test_one_row_without_dimensions(device, form):
    inputs = requiring_grad(make_inputs(form, (), device=device))
    wanted = evaluate(plain(form), inputs)
    for name, found in evaluate(both(form)[0], inputs).items():
        torch.testing.assert_close(found, wanted[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("linear", [False, True])
def test_second_derivatives_raise(device, form, linear):
    """Also where the gradient that comes in is a constant; the first derivative is right."""
    for op in both(form):
        inputs = requiring_grad(make_inputs(form, (20,), device=device))
        out, x = op(**inputs), inputs["x"]
        loss = out.sum() if linear else out.square().sum()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(dx, torch.autograd.grad(loss, x, retain_graph=True)[0])
        with pytest.raises(RuntimeError, match="second derivatives are not computed"):
            dx.sum().backward()


# --- memory ---

R, D, WIDE = 21, 24, 10  # rows, d or K, outputs or F
# Elements that are kept besides weights: inputs of the layer, and of a network g and u.
KEPT = {
    ("norm_linear", "cheap"): R * D,
    ("norm_swiglu", "cheap"): R * D,
    ("gated_residual", "cheap"): R * D,  # a; not x
    ("gated_swiglu", "cheap"): R * D + 2 * R * WIDE,
    ("gated_swiglu", "projections"): R * D,
}


def kept_bytes(run, weights):
    """Bytes of all storages that are kept for the backward pass, without those of weights."""
    found = {}

    def keep(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = run()
    for weight in weights:
        found.pop(weight.untyped_storage().data_ptr(), None)
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("verb", "recompute"), KEPT)
def test_what_is_kept(device, verb, recompute, dtype):
    """Exactly what is listed above, frozen or not, also by autocast."""
    options = {"recompute": recompute} if verb == "gated_swiglu" else {}
    for how, op in itertools.product(("", " folded"), both(verb)):
        inputs = requiring_grad(make_inputs(verb + how, (3, 7), D, WIDE, dtype, device=device))
        weights = [t for n, t in inputs.items() if n not in ("x", "a") and t is not None]
        size = inputs["x"].element_size()
        run = functools.partial(op, **inputs, **options)
        assert kept_bytes(run, weights) == KEPT[verb, recompute] * size
        if dtype == torch.float32:
            inner = KEPT[verb, recompute] - R * D
            with torch.autocast(device, torch.float16):
                assert kept_bytes(run, weights) == R * D * 4 + inner * 2


def test_a_frozen_projection_without_a_gate_keeps_nothing(device):
    for op in both("gated_residual"):
        inputs = make_inputs("gated_residual folded", (20,), device=device)
        inputs = learning(inputs, ("x", "a"))
        assert kept_bytes(lambda op=op, given=inputs: op(**given), [inputs["weight"]]) == 0


# Products of the backward pass, for what learns alone; everything at last.
COUNTS = {
    "norm_linear": {"x": 1, "norm_weight": 1, "weight": 1, "all": 2},
    "norm_swiglu": {"x": 4, "norm_weight": 4, "gate_weight": 3, "up_weight": 3, "all": 6},
    "gated_residual": {"x": 0, "a": 1, "weight": 1, "gate": 1, "all": 2},
    "gated_swiglu": {
        "x": 3,
        "norm_weight": 3,
        "gate_weight": 2,
        "up_weight": 2,
        "down_weight": 1,
        "gate": 1,
        "all": 6,
    },
}


@pytest.mark.parametrize(("verb", "name"), [(v, n) for v, names in COUNTS.items() for n in names])
def test_frozen_parts_cost_no_product(device, verb, name):
    inputs = make_inputs(verb, (20,), device=device)
    given = learning(inputs, [*inputs] if name == "all" else [name])
    more = {"cheap": 0, "projections": 2} if verb == "gated_swiglu" else {None: 0}
    for op, (recompute, again) in itertools.product(both(verb), more.items()):
        out = op(**given, **({"recompute": recompute} if recompute else {}))
        with Products() as products:
            out.sum().backward()
        assert products.count == COUNTS[verb][name] + again


def test_projections_computed_again_change_no_bit(device):
    inputs = requiring_grad(make_inputs("gated_swiglu", (20,), device=device))
    for op in both("gated_swiglu"):
        wanted = evaluate(op, inputs)
        found = evaluate(functools.partial(op, recompute="projections"), inputs)
        assert all(torch.equal(t, wanted[name]) for name, t in found.items())


def test_without_gradients_a_network_is_its_parts(device):
    for rows in ((2,), (20,)):
        inputs = make_inputs("gated_swiglu", rows, device=device)
        x, norm, gate_weight, up_weight, down_weight, gate = inputs.values()
        wide = comemo_kernels.norm_swiglu(x, norm, gate_weight, up_weight)
        wanted = comemo_kernels.gated_residual(x, wide, down_weight, gate)
        assert torch.equal(gated_swiglu(**inputs), wanted)
        with torch.no_grad():
            assert torch.equal(gated_swiglu(**requiring_grad(inputs)), wanted)


# --- autocast ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixed", [False, True])
def test_autocast_is_as_right_as_pytorchs(device, form, mixed):
    """Weights in float32; gradients in the dtype of their leaf, wherever the backward pass runs."""
    dtype = torch.bfloat16 if torch.bfloat16 in DTYPES else torch.float16
    inputs = requiring_grad(make_inputs(form, (20,), 40, 24, device=device))
    if mixed:
        name = "a" if "a" in inputs else "x"
        inputs[name] = inputs[name].detach().to(dtype).requires_grad_()

    def cast(op):
        def run(**given):
            with torch.autocast(device, dtype):
                return op(**given)

        return run

    ours = cast(both(form)[0])
    assert_matches(ours, cast(plain(form)), inputs)
    wanted = evaluate(ours, inputs)
    with torch.autocast(device, dtype):
        within = evaluate(ours, inputs)
    for name, t in within.items():
        assert torch.equal(t, wanted[name])
        leaf = name.removeprefix("gradient of ")
        assert leaf not in inputs or t.dtype == inputs[leaf].dtype
