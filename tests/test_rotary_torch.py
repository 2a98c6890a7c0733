"""apply_rotary and torch: in place, operator contract, torch.compile, autocast."""

import pytest
import torch
from conftest import GPU, INTERPRET, SLOW, TRACED
from harness import evaluate
from rotary_inputs import LAYOUTS, make_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from comemo_kernels import apply_rotary, reference
from comemo_kernels import rotary as kernels

pytestmark = pytest.mark.kernel(reference=True)  # its laws are the reference's too


# --- in place ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_gives_the_same_bits(device, layout):
    inputs = make_inputs(N=9, D=10, R=8, layout=layout, device=device)
    wanted = apply_rotary(**inputs)
    copies = {name: torch.empty_like(inputs[name]).copy_(inputs[name]).detach() for name in "qk"}
    if layout == "packed qkv":
        packed = torch.cat([inputs["q"], inputs["k"]], dim=2).detach()
        copies = dict(zip("qk", packed.split([2, 1], dim=2), strict=True))
    with torch.no_grad():
        ours = apply_rotary(**inputs | copies, inplace=True)
    for name, mine, value in zip("qk", ours, wanted, strict=True):
        assert mine is copies[name]
        assert torch.equal(mine, value)


def test_autograd_follows_writes_in_place(device):
    inputs = make_inputs(N=9, device=device)

    def through(op, q, k, **kwargs):
        x, y = 2 * q, (3 * k.flatten(2)).view(k.shape)  # y is a view, as from a projection
        return op(**inputs | {"q": x, "k": y}, **kwargs)

    leaves = inputs["q"], inputs["k"]
    weights = [torch.randn_like(x) for x in leaves]
    for op in (apply_rotary, reference.apply_rotary):
        grads = [
            torch.autograd.grad(
                sum(
                    (y * w).sum() for y, w in zip(through(op, *leaves, **kw), weights, strict=True)
                ),
                leaves,
            )
            for kw in ({}, {"inplace": True})
        ]
        for plain, inplace in zip(*grads, strict=True):
            torch.testing.assert_close(plain, inplace)
        with pytest.raises(ValueError, match="q, which is written, must not be a leaf"):
            op(**inputs, inplace=True)
    x = 2 * inputs["q"]
    square = x.square()  # saves x
    apply_rotary(**inputs | {"q": x, "k": None}, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()
    x = inputs["q"].detach().clone()
    version = x._version
    apply_rotary(**inputs | {"q": x, "k": None}, inplace=True)
    assert x._version > version
    with torch.inference_mode():
        x = x.clone()
        apply_rotary(**inputs | {"q": x, "k": None}, inplace=True)


# --- operator, torch.compile, autocast ---


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        pytest.param(layout, kind, marks=() if kind in ("int64", "grids") else SLOW)
        for layout, kind in zip(LAYOUTS, ("int64", "grids", "table", "int32"), strict=True)
    ],
)
@TRACED
def test_operator_contract(real_device, layout, kind):
    inputs = make_inputs(N=15, layout=layout, kind=kind, device=real_device)
    q, k, cos, sin, positions = (
        x.detach() if isinstance(x, torch.Tensor) else x for x in inputs.values()
    )
    flags = (0, False, False, False, False)
    if kind == "grids":
        positions, flags = positions.table, (2, True, True, False, False)
    opcheck(kernels._rotary, ([q, k], cos, sin, positions, *flags))
    written = [q.clone(), k.clone()]
    opcheck(kernels._rotary_, (written, cos, sin, positions, *flags))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("kind", "dynamic", "backend"),
    [
        ("int64", False, "inductor"),
        pytest.param("int64", True, "aot_eager", marks=SLOW),
        pytest.param("grids", True, "aot_eager", marks=SLOW),
        pytest.param("table", True, "inductor" if GPU else "aot_eager", marks=SLOW),
    ],
)
@TRACED
def test_compiles_whole(real_device, kind, dynamic, backend):
    torch._dynamo.reset()
    compiled = torch.compile(apply_rotary, fullgraph=True, dynamic=dynamic, backend=backend)
    for N in (15, 30):
        inputs = make_inputs(N=N, kind=kind, device=real_device)
        ours, eager = evaluate(compiled, inputs), evaluate(apply_rotary, inputs)
        for name, value in eager.items():
            assert torch.equal(ours[name], value), name
    with torch.no_grad():
        copies = inputs | {name: inputs[name].detach().clone() for name in "qk"}
        compiled(**copies, inplace=True)
        assert torch.equal(copies["q"], eager["output 0"])


@TRACED
def test_fifty_lengths_are_one_graph(real_device, monkeypatch):
    torch._dynamo.reset()
    if INTERPRET:  # only graphs are counted
        monkeypatch.setattr(kernels.rotary_kernel, "launch", lambda *_: None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(apply_rotary, fullgraph=True, backend=counter)
    for N in range(4, 54):
        with torch.no_grad():
            inputs = make_inputs(B=1, N=N, kind="int64", device=real_device)
            compiled(**inputs)
    assert counter.frame_count <= 2  # the first length, then any length


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(device, dtype):
    inputs = make_inputs(dtype=dtype, device=device)
    with torch.autocast(device, dtype):
        mixed = evaluate(apply_rotary, inputs)
    for name, value in evaluate(apply_rotary, inputs).items():
        assert torch.equal(mixed[name], value)
