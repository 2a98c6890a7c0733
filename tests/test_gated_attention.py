"""attend_gated: attention, output projection and gated residual, and their gradient."""

import pytest
import torch
from attention_inputs import make_inputs
from conftest import DEVICE, DTYPES, INTERPRET, TRACED, every_two
from harness import assert_matches
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from comemo_kernels import (
    MemoryScales,
    QueryRotation,
    attend_gated,
    attend_spans,
    gated_residual,
    reference,
)

pytestmark = pytest.mark.kernel(reference=True)

WIDTH = 24


def layer(gate=0.5, *args, learning=True, **kwargs):
    """Inputs of a layer of width 24, all of them leaves, and the rotation of its queries."""
    inputs, rest = make_inputs(*args, **kwargs)
    q = inputs["q"]
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (*q.shape[:2], WIDTH), "weight": (WIDTH, q.shape[2] * q.shape[3])}
    for name, shape in shapes.items():
        inputs[name] = torch.randn(shape, generator=generator).to(q)
    inputs["gate"] = None if gate is None else torch.full_like(q[0, 0, 0, :1], gate)
    if learning:
        for name in ("x", "q", "k", "v", "weight", "gate"):
            if inputs[name] is not None:
                inputs[name].requires_grad_()
    return inputs, rest


def ways(rest):
    def call(attend, cos, sin, **inputs):
        rotation = None if cos is None else QueryRotation(cos, sin, **rest)
        return attend(**inputs, rotation=rotation)

    return (
        lambda **inputs: call(attend_gated, **inputs),
        lambda **inputs: call(reference.attend_gated, **inputs),
    )


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("dtype", "starts", "gate"), every_two(DTYPES, [None, (0,), (0, 32)], [0.0, -0.7, None])
)
def test_matches_reference(dtype, starts, gate):
    inputs, rest = layer(gate, 2, 4, 4, 2, 16, 40, "token", starts, 2, dtype=dtype)
    inputs["spans"][0, 1] = 9  # an empty span
    assert_matches(*ways(rest), inputs)


@pytest.mark.skipif(INTERPRET, reason="of the reference alone")
def test_gradients_by_differences():
    """Of the reference, which is the truth for the kernels."""
    inputs, rest = layer(0.3, 1, 2, 2, 1, 2, 5, "token", (0, 2), P=20, learning=False)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    names = ("x", "q", "k", "v", "weight", "gate")
    leaves = [inputs.pop(name).requires_grad_() for name in names]

    def attend(*leaves):
        return ways(rest)[1](**inputs, **dict(zip(names, leaves, strict=True)))

    for gate in (0.3, 0.0):
        leaves[-1] = torch.full_like(leaves[-1], gate).requires_grad_()
        assert gradcheck(attend, leaves)


def test_a_closed_gate_learns():
    """At gate 0, where training begins, only the gate and the residual have gradients."""
    inputs, rest = layer(0.0, 2, 9, 2, 1, 16, 70, "token", (0, 32))
    y = ways(rest)[0](**inputs)
    assert torch.equal(y, inputs["x"])
    rotation = QueryRotation(inputs["cos"], inputs["sin"], **rest)
    read = attend_spans(*(inputs[n] for n in ("q", "k", "v", "spans")), rotation)
    wanted = (read.flatten(2) @ inputs["weight"].T).sum()
    names = ("gate", "x", "q", "k", "v", "weight")
    grads = torch.autograd.grad(y.sum(), [inputs[name] for name in names])
    torch.testing.assert_close(grads[0], wanted[None].detach(), atol=1e-3, rtol=1e-4)
    assert (grads[1] == 1).all()
    for grad in grads[2:]:
        assert not grad.any()


def test_without_gradients_it_is_two_operations():
    inputs, rest = layer(0.5, 2, 9, 2, 1, 16, 70, "token", (0, 32), learning=False)
    rotation = QueryRotation(inputs["cos"], inputs["sin"], **rest)
    q, k, v, spans = (inputs[name] for name in ("q", "k", "v", "spans"))
    read = attend_spans(q, k, v, spans, rotation)
    wanted = gated_residual(inputs["x"], read.flatten(2), inputs["weight"], inputs["gate"])
    assert torch.equal(ways(rest)[0](**inputs), wanted)


@pytest.mark.parametrize("learning", ["x", "q", "k", "v", "weight", "gate"])
def test_each_input_learns_alone(learning):
    inputs, rest = layer(0.5, 1, 5, 2, 1, 16, 40, "token", (0, 20))
    leaf = inputs[learning]
    (wanted,) = torch.autograd.grad(ways(rest)[0](**inputs).square().sum(), leaf)
    frozen = {n: t if t is None or n == learning else t.detach() for n, t in inputs.items()}
    (found,) = torch.autograd.grad(ways(rest)[0](**frozen).square().sum(), leaf)
    assert torch.equal(found, wanted)


def test_saves_neither_scores_nor_products():
    inputs, rest = layer(0.5, 1, 50, 2, 1, 16, 90, "token", (0, 32))
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ways(rest)[0](**inputs)
    held = [t for t in (*inputs.values(), *rest.values()) if t is not None]
    for t in held:
        saved.pop(t.untyped_storage().data_ptr(), None)
    rows = 50 * 2
    assert sum(saved.values()) in (4 * rows * 16, 4 * rows * 17)  # out; and its log-sum-exp


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    inputs, rest = layer(0.5, 1, 5, 2, 1, 16, 40, "token", (0, 20))
    names = ("x", "q", "k", "v", "weight", "gate")
    leaves = [inputs[name] for name in names]
    fixed = {name: t for name, t in inputs.items() if name not in names}

    def attend(*leaves):
        return ways(rest)[0](**fixed, **dict(zip(names, leaves, strict=True)))

    attend(*leaves).square().sum().backward()
    wanted = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    checkpoint(attend, *leaves, use_reentrant=reentrant).square().sum().backward()
    for leaf, grad in zip(leaves, wanted, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_autocast():
    """Weights in float32, a stream in float32, products in bfloat16."""
    inputs, rest = layer(0.5, 1, 9, 2, 1, 16, 40, "token", (0, 20))
    half = {n: inputs[n].detach().bfloat16().requires_grad_() for n in ("q", "k", "v")}
    grads = []
    for attend in ways(rest):
        with torch.autocast(DEVICE, torch.bfloat16):
            y = attend(**inputs | half)
        assert y.dtype == torch.float32
        leaves = [inputs["x"], *half.values(), inputs["weight"], inputs["gate"]]
        grads.append(torch.autograd.grad(y.sum(), leaves))
        assert [t.dtype for t in grads[-1]] == [t.dtype for t in leaves]
    torch.testing.assert_close(*grads, atol=0.1, rtol=0.1)


@pytest.mark.kernel
def test_float8_memory():
    inputs, rest = layer(0.5, 1, 9, 2, 1, 16, 40, "token", (0, 20), dtype=torch.bfloat16)
    scales = MemoryScales(*(torch.rand(2, 3, 1, device=DEVICE) + 0.5), tile=16)
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    for name in ("k", "v"):
        inputs[name] = inputs[name].detach().to(torch.float8_e4m3fn)
    y = attend_gated(**inputs, rotation=rotation, scales=scales)
    wanted = reference.attend_gated(**inputs, rotation=rotation, scales=scales)
    leaves = [inputs[name] for name in ("x", "q", "weight", "gate")]
    grads = [torch.autograd.grad(t.sum(), leaves) for t in (y, wanted)]
    torch.testing.assert_close(*grads, atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(2, 9, WIDTH), r"x must be \[B, N, d\]"),
        ("weight", torch.zeros(WIDTH, 31), "weight must be torch.float32"),
        ("gate", torch.zeros(2), r"gate must be torch.float32 \(1,\)"),
        ("k", torch.zeros(40, 3, 16), "k and v must be"),
        ("spans", torch.zeros(1, 9, 3, dtype=torch.int64), "spans must be"),
    ],
)
@pytest.mark.parametrize("learning", [False, True])
def test_bad_input(name, wrong, message, learning):
    inputs, rest = layer(0.5, 1, 9, 2, 1, 16, 40, "token", None, learning=learning)
    inputs[name] = wrong.to(DEVICE)
    with pytest.raises(ValueError, match=f"attend_gated: .*{message}"):
        ways(rest)[0](**inputs)


@pytest.mark.kernel
@TRACED
def test_compiles_whole(real_device):
    def attend(x, q, k, v, spans, weight, gate, cos, sin, positions, starts, biases):
        rotation = QueryRotation(cos, sin, positions, starts, biases)
        return attend_gated(x, q, k, v, spans, weight, gate, rotation)

    inputs, rest = layer(0.5, 1, 5, 2, 1, 16, 40, "token", (0, 20), device=real_device)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    leaves = [inputs[name] for name in ("x", "q", "k", "v", "weight", "gate")]
    grads = [
        torch.autograd.grad(call(**inputs, **rest).square().sum(), leaves)
        for call in (compiled, attend)
    ]
    torch.testing.assert_close(*grads)
