"""Fused RMSNorm + linear, SwiGLU and gated residual: reference, laws, torch's contract, errors."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, GPU, INTERPRET, TRACED
from harness import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

import comemo_kernels
from comemo_kernels import _rows_kernel, gated_residual, norm_linear, reference

pytestmark = pytest.mark.kernel(reference=True)  # its laws are the reference's too

VERBS = ["norm_linear", "norm_swiglu", "gated_residual"]
BACKENDS = ["inductor"] if GPU else ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
FORMS = [verb + how for verb in VERBS for how in ("", " folded")]  # norm_weight or gate None
ROWS = [(1,), (3, 1), (2, 8), (2, 3, 5), (17,), (0,)]  # a launch for up to 16


def make_inputs(form, rows=(2,), K=24, outputs=10, dtype=torch.float32, gate=0.6, device="cpu"):
    verb, _, folded = form.partition(" ")
    generator = torch.Generator().manual_seed(K)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    x, weight = draw(*rows, K), draw(outputs, K, scale=K**-0.5)
    if verb == "gated_residual":
        gate = None if folded else torch.tensor([gate]).to(device, dtype)
        return {"x": draw(*rows, outputs), "a": x, "weight": weight, "gate": gate}
    inputs = {"x": x, "norm_weight": None if folded else draw(K) + 1}
    if verb == "norm_linear":
        return inputs | {"weight": weight}
    return inputs | {"gate_weight": weight, "up_weight": draw(outputs, K, scale=K**-0.5)}


def requiring_grad(inputs):
    return {n: None if t is None else t.detach().requires_grad_() for n, t in inputs.items()}


def both(form):
    verb = form.split()[0]
    return getattr(comemo_kernels, verb), getattr(reference, verb)


# --- values and gradients ---


@pytest.mark.parametrize("form", FORMS)
@given(
    rows=st.integers(1, 20),
    K=st.sampled_from([1, 7, 24, 128, 255, 256, 520]),
    outputs=st.sampled_from([1, 5, 16, 33, 64]),
    dtype=st.sampled_from(DTYPES),
    gradients=st.booleans(),
)
def test_matches_reference(device, form, rows, K, outputs, dtype, gradients):
    inputs = make_inputs(form, (rows,), K, outputs, dtype, device=device)
    assert_matches(*both(form), requiring_grad(inputs) if gradients else inputs)


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


def test_the_reference_is_what_is_published():
    x, norm, gate_weight, up_weight = make_inputs("norm_swiglu", dtype=torch.bfloat16).values()
    exact = x.float()
    y = norm * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5)).bfloat16()
    linear = F.linear(y, gate_weight)
    assert torch.equal(reference.norm_linear(x, norm, gate_weight), linear)
    swiglu = F.silu(linear) * F.linear(y, up_weight)
    assert torch.equal(reference.norm_swiglu(x, norm, gate_weight, up_weight), swiglu)
    x, a, weight, gate = make_inputs("gated_residual", dtype=torch.bfloat16).values()
    wanted = x + gate.tanh() * F.linear(a, weight)
    assert torch.equal(reference.gated_residual(x, a, weight, gate), wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_a_row_alone_is_the_row_in_a_batch(device, form):
    for dtype in DTYPES:
        inputs = make_inputs(form, (16,), 300, dtype=dtype, device=device)
        whole = both(form)[0](**inputs)
        for i in range(16):
            row = {name: inputs[name][i : i + 1] for name in ("x", "a") if name in inputs}
            assert torch.equal(both(form)[0](**inputs | row), whole[i : i + 1])


@pytest.mark.kernel
@pytest.mark.parametrize("verb", ["norm_linear", "norm_swiglu"])
def test_prefetching_changes_no_bit(device, verb):
    kernel = (
        _rows_kernel.one_weight_kernel if verb == "norm_linear" else _rows_kernel.two_weights_kernel
    )
    inputs = make_inputs(verb, (3,), 2048, 40, torch.float16, device=device)
    for config in kernel.configs:
        if config["AHEAD"]:
            with kernel.using(config | {"AHEAD": 0}):
                wanted = both(verb)[0](**inputs)
            with kernel.using(config):
                assert torch.equal(both(verb)[0](**inputs), wanted)


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRET, reason="only the interpreter's pointers can be seen")
@pytest.mark.parametrize("K", [300, 2048])
def test_prefetched_addresses_are_in_bounds(device, monkeypatch, K):
    """Each line of 128 bytes from a row's start; nothing after its end or the last row."""
    prefetched = []
    monkeypatch.setattr(
        _rows_kernel, "prefetch", lambda ptrs: prefetched.extend(ptrs.handle.data.flatten())
    )
    inputs = make_inputs("norm_swiglu", (1,), K, 20, torch.float16, device=device)
    config = {"BLOCK_O": 16, "BLOCK_BYTES": 512, "AHEAD": 1024, "num_warps": 4}
    with _rows_kernel.two_weights_kernel.using(config):
        comemo_kernels.norm_swiglu(**inputs)
    wanted = {
        weight.data_ptr() + 2 * (row * K + min(64 * line, K - 1))
        for weight in (inputs["gate_weight"], inputs["up_weight"])
        for row in range(20)
        for line in range(8)
    }
    assert {int(address) for address in prefetched} == wanted
    assert len(prefetched) == 2 * 32 * 8


@pytest.mark.parametrize("form", [form for form in FORMS if "folded" in form])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_folded_is_a_norm_of_ones_and_an_open_gate(form, dtype):
    inputs = make_inputs(form, dtype=dtype)
    neutral = (
        {"gate": torch.tensor([20.0])} if "gate" in inputs else {"norm_weight": torch.ones(24)}
    )
    neutral = {name: t.to(dtype) for name, t in neutral.items()}
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


# --- contract with torch ---


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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
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
    assert ours.dtype == theirs.dtype == (torch.float32 if "a" in inputs else torch.bfloat16)
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


# --- errors ---


WRONG = {
    "norm_linear": {
        "x of integers": ("x", lambda t: t.int(), r"x must be .* float64, got torch.int32 \(2, 24"),
        "x of no dimension": ("x", lambda t: t[0, 0], r"x must be .*got torch.float32 \(\)"),
        "a norm too short": ("norm_weight", lambda t: t[1:], r"norm_weight .*\(24,\).* \(23,\)"),
        "a weight turned": ("weight", lambda t: t.T, r"weight .*\(24, 24\).* got .*\(24, 10\)"),
        "a weight of one dimension": ("weight", lambda t: t[0], r"weight .*got .*\(24,\)"),
        "a weight of another dtype": ("weight", lambda t: t.half(), "weight must be torch.float32"),
        "a weight elsewhere": ("weight", lambda t: t.to("meta"), "weight .* on meta"),
    },
    "norm_swiglu": {
        "x of integers": ("x", lambda t: t.int(), "x must be .*got torch.int32"),
        "a gate too narrow": ("gate_weight", lambda t: t[:, 1:], r"gate_weight .*\(10, 23\)"),
        "weights of two widths": ("up_weight", lambda t: t[1:], r"up_weight .*\(10, 24\).*\(9, 24"),
        "a norm of float16": ("norm_weight", lambda t: t.half(), "norm_weight .*torch.float16"),
    },
    "gated_residual": {
        "x of float8": ("x", lambda t: t.to(torch.float8_e4m3fn), "x must be .*float8_e4m3fn"),
        "other rows": ("a", lambda t: t[:1], r"a must be .*\(2, 24\).* got .*\(1, 24\)"),
        "a of another dtype": ("a", lambda t: t.half(), "a must be torch.float32.*torch.float16"),
        "a weight turned": ("weight", lambda t: t.T, r"weight .*\(10, 24\).* got .*\(24, 10\)"),
        "a gate of no dimension": ("gate", lambda t: t[0], r"gate must be .*\(1,\).* got .*\(\)"),
        "a gate for each element": ("gate", lambda t: t.expand(10), r"gate .*got .*\(10,\)"),
    },
}


@pytest.mark.parametrize(("verb", "case"), [(verb, case) for verb in VERBS for case in WRONG[verb]])
@pytest.mark.parametrize("which", [0, 1], ids=["kernel", "reference"])
def test_says_what_is_wrong(device, verb, case, which):
    name, change, message = WRONG[verb][case]
    inputs = make_inputs(verb, device=device)
    with pytest.raises(ValueError, match=rf"^{verb}: {message}"):
        both(verb)[which](**inputs | {name: change(inputs[name])})


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_says_what_a_kernel_cannot_do(device, form):
    verb, inputs = form.split()[0], make_inputs(form, device=device)
    for name in (name for name, t in inputs.items() if t is not None and name != "gate"):
        turned = {name: torch.stack([inputs[name]] * 2, -1)[..., 0]}
        for grad in (False, True):  # for every number of rows, with gradients or without
            turned[name].requires_grad_(grad)
            with pytest.raises(ValueError, match=rf"^{verb}: .*contiguous, got .* of {name} \("):
                both(verb)[0](**inputs | turned)
