"""Fused linear layers: opcheck, torch.compile, autocast, CUDA graphs."""

import pytest
import torch
from conftest import GPU, SLOW, TRACED
from fused_linear_inputs import FORMS, both, make_inputs, requiring_grad
from harness import evaluate
from torch.library import opcheck

import comemo_kernels
from comemo_kernels import _rows_kernel

pytestmark = pytest.mark.kernel(reference=True)

BACKENDS = ["inductor"] if GPU else ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    x, norm, gate_weight, up_weight = make_inputs("norm_swiglu", device=real_device).values()
    opcheck(_rows_kernel.rows_op, (x, norm, gate_weight, None, None, None, 1e-5))
    opcheck(_rows_kernel.rows_op, (x, norm, gate_weight, up_weight, None, None, 1e-5))
    opcheck(_rows_kernel.rows_op, (x, None, gate_weight, up_weight, None, None, 1e-5))
    x, a, weight, gate = make_inputs("gated_residual", device=real_device).values()
    opcheck(_rows_kernel.rows_op, (a, None, weight, None, x, gate, None))
    opcheck(_rows_kernel.rows_op, (a, None, weight, None, x, None, None))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("form", "dynamic"),
    [("gated_swiglu", True), ("norm_linear", True), ("gated_residual folded", True)]
    + [pytest.param(form, False, marks=SLOW) for form in FORMS]
    + [pytest.param("norm_swiglu", True, marks=SLOW)],
)
@pytest.mark.parametrize("backend", BACKENDS)
@TRACED
def test_compiles_whole(real_device, form, dynamic, backend):
    torch._dynamo.reset()
    op = both(form)[0]
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=backend)
    for rows in (3, 5):
        inputs = make_inputs(form, (rows,), device=real_device)
        assert torch.equal(compiled(**inputs), op(**inputs))
    inputs = requiring_grad(make_inputs(form, (20,), device=real_device))
    ours = evaluate(compiled, inputs)
    for name, value in evaluate(op, inputs).items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_is_pytorchs(device, form):
    inputs = make_inputs(form, device=device)
    mixed = inputs | ({"a": inputs["a"].bfloat16()} if "a" in inputs else {})
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = (op(**mixed) for op in both(form))
    assert (
        ours.dtype
        == theirs.dtype
        == (torch.float32 if form.startswith("gated") else torch.bfloat16)
    )
    assert torch.isfinite(ours).all()


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_replays_it(form):
    inputs = make_inputs(form, K=512, outputs=64, dtype=torch.bfloat16, device="cuda")
    op = both(form)[0]
    wanted = op(**inputs)
    found = []
    replay = comemo_kernels.capture(lambda: found.append(op(**inputs)), "cuda")
    for _ in range(3):
        found[-1].fill_(float("nan"))
        replay()
        assert torch.equal(found[-1], wanted)
