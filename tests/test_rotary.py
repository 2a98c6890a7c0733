"""apply_rotary: values and gradients against its reference, and its laws."""

import pytest
import torch
from conftest import DEVICE, DTYPES, INTERPRET, SLOW
from harness import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st
from rotary_inputs import KINDS, LAYOUTS, ROWS, make_inputs
from torch.autograd import gradcheck, gradgradcheck

from comemo_kernels import apply_rotary, reference
from comemo_kernels import rotary as kernels

pytestmark = pytest.mark.kernel(reference=True)  # its laws are the reference's too

WIDTHS = ((2, 2), (6, 6), (64, 64), (80, 32), (7, 4))  # D and R


# All pairs of layout, kind, dtype, widths and rounding; all combinations would be 600 cases.
PAIRS = [
    (LAYOUTS[i % 4], KINDS[i % 5], DTYPES[i % len(DTYPES)], WIDTHS[i // 5], i // 3 % 2 == 0)
    for i in range(25)
]


def check(layout, kind, dtype, widths, published, B=2, N=13, H=3, G=1):
    inputs = make_inputs(B, N, H, G, *widths, dtype, layout, kind, DEVICE)
    assert_matches(apply_rotary, reference.apply_rotary, inputs | {"published": published})


@pytest.mark.kernel
@pytest.mark.parametrize(("layout", "kind", "dtype", "widths", "published"), PAIRS)
def test_pairs_match_reference(layout, kind, dtype, widths, published):
    check(layout, kind, dtype, widths, published)


@pytest.mark.kernel
@given(
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    widths=st.sampled_from(WIDTHS),
    published=st.booleans(),
    B=st.integers(1, 3),
    N=st.integers(1, 20),
    H=st.integers(1, 5),
    G=st.integers(1, 2),
)
def test_matches_reference(layout, kind, dtype, widths, published, B, N, H, G):
    check(layout, kind, dtype, widths, published, B, N, H, G)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("kind", "N", "layout", "D"),
    [
        ("int64", 41, "bnhd", 10),
        ("int32", 16, "tokens", 8),
        ("grids", 29, "packed qkv", 8),
        ("one table for all", 3, "bhnd", 10),
    ],
)
def test_programs_of_several_blocks_change_no_bit(device, kind, N, layout, D):
    """Programs end within a block, at its end, and before their last block; gradients, in place."""
    several = [config for config in kernels.rotary_kernel.configs if config["STEPS"] > 1]
    assert several
    B = 1 if kind == "grids" else 2
    inputs = make_inputs(B, N, 3, 1, D, 8, torch.float16, layout, kind, device)
    wanted = evaluate(apply_rotary, inputs)
    for config in several[:1] if INTERPRET else several:  # the interpreter has no warps
        with kernels.rotary_kernel.using(config):
            found = evaluate(apply_rotary, inputs)
            copies = {name: inputs[name].detach().clone() for name in "qk"}
            with torch.no_grad():
                apply_rotary(**inputs | copies, inplace=True)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), name
        for i, name in enumerate("qk"):
            assert torch.equal(copies[name], wanted[f"output {i}"])


@pytest.mark.parametrize(
    "kind",
    ["int64", *(pytest.param(x, marks=SLOW if INTERPRET else ()) for x in ("grids", "table"))],
)
def test_gradients_of_any_order(device, kind):
    inputs = make_inputs(1, 2, 1, D=4, R=2, dtype=torch.float64, kind=kind, device=device)
    q, k = inputs.pop("q"), inputs.pop("k")
    rotate = lambda q, k: apply_rotary(q, k, **inputs)  # noqa: E731
    assert gradcheck(rotate, (q, k))
    assert gradgradcheck(rotate, (q, k), fast_mode=True)  # along random directions


@pytest.mark.kernel
def test_only_required_gradients_are_computed(device, monkeypatch):
    inputs = make_inputs(device=device)
    launched, operator = [], kernels._rotary
    counting = lambda xs, *args: (launched.append(len(xs)), operator(xs, *args))[1]  # noqa: E731
    monkeypatch.setattr(kernels, "_rotary", counting)
    q, k = apply_rotary(**inputs)
    (q.sum() + k.sum()).backward()
    q, k = apply_rotary(**inputs | {"k": inputs["k"].detach()})
    (q.sum() + k.sum()).backward()
    assert launched == [2, 2, 2, 1]


def test_an_unused_output_has_no_gradient(device):
    inputs = make_inputs(device=device)
    q, k = inputs["q"], inputs["k"]
    rotated, _ = apply_rotary(**inputs)
    assert torch.autograd.grad(rotated.sum(), [q, k], allow_unused=True)[1] is None
    frozen = inputs | {"k": k.detach()}
    for ours, theirs in zip(apply_rotary(**frozen), apply_rotary(**inputs), strict=True):
        assert torch.equal(ours, theirs)
    (gradient,) = torch.autograd.grad(apply_rotary(**frozen)[0].sum(), [q])  # strides of 0
    (expected,) = torch.autograd.grad(reference.apply_rotary(**frozen)[0].sum(), [q])
    torch.testing.assert_close(gradient, expected)


# --- laws ---


def test_the_inverse_rotation_undoes_it(device):
    inputs = make_inputs(N=33, D=64, R=64, device=device)
    q, k = apply_rotary(**inputs)
    back = {"cos": inputs["cos"], "sin": -inputs["sin"], "positions": inputs["positions"]}
    for undone, given_ in zip(apply_rotary(q, k, **back), (inputs["q"], inputs["k"]), strict=True):
        torch.testing.assert_close(undone, given_)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_and_kind_of_position_gives_the_same_bits(device, dtype):
    B, N = 1, 30
    wanted = make_inputs(B, N, 4, 2, dtype=dtype, layout="packed qkv", kind="grids", device=device)
    first = evaluate(apply_rotary, wanted)
    ids = wanted["positions"].position_ids(N).to(device)[None]
    cos, sin = wanted["cos"], wanted["sin"]
    q, k = (wanted[name].detach() for name in "qk")
    positions = {"positions": ids, "cos": cos, "sin": sin}
    for layout in (
        {"q": q.contiguous(), "k": k.contiguous()},
        {n: x.transpose(1, 2).contiguous().transpose(1, 2) for n, x in (("q", q), ("k", k))},
    ):
        for change in (
            positions,
            positions | {"positions": ids.int()},
            {"positions": None, "cos": cos[ids], "sin": sin[ids]},
        ):
            leaves = {name: x.requires_grad_() for name, x in layout.items()}
            again = evaluate(apply_rotary, wanted | leaves | change)
            for name, value in first.items():
                assert torch.equal(again[name], value), name
    flat = apply_rotary(q[0], k[0], cos, sin, ids[0])
    for i, value in enumerate(flat):
        assert torch.equal(value[None], first[f"output {i}"])


def test_a_row_alone_is_the_row_in_a_batch(device):
    inputs = make_inputs(B=3, N=13, H=5, device=device)
    whole = apply_rotary(**inputs)
    for b in range(3):
        row = {name: inputs[name][b : b + 1] for name in ("q", "k", "positions")}
        for alone, together in zip(apply_rotary(**inputs | row), whole, strict=True):
            assert torch.equal(alone, together[b : b + 1])


def test_queries_alone(device):
    inputs = make_inputs(device=device)
    q, k = apply_rotary(**inputs)
    alone, none = apply_rotary(**inputs | {"k": None})
    assert none is None
    assert torch.equal(alone, q)
    assert torch.equal(apply_rotary(**inputs | {"q": inputs["k"], "k": None})[0], k)


def test_only_the_rotary_part_is_touched(device):
    inputs = make_inputs(N=9, D=24, R=6, device=device)
    narrow = inputs | {name: inputs[name][..., :6].contiguous() for name in "qk"}
    for wide, part, given_ in zip(
        apply_rotary(**inputs), apply_rotary(**narrow), (inputs["q"], inputs["k"]), strict=True
    ):
        assert torch.equal(wide[..., :6], part)
        assert torch.equal(wide[..., 6:], given_[..., 6:])


def test_published_rounds_the_table(device):
    inputs = make_inputs(N=9, dtype=torch.float16, device=device)
    rounded = inputs | {name: inputs[name].half() for name in ("cos", "sin")}
    ours = evaluate(apply_rotary, inputs | {"published": True})
    for name, value in evaluate(apply_rotary, rounded).items():
        assert torch.equal(ours[name], value), name
    plain = evaluate(apply_rotary, inputs)
    assert not any(torch.equal(ours[name], value) for name, value in plain.items())


@pytest.mark.parametrize("bad", [-1, ROWS, 2**31 - 1])
def test_an_id_outside_the_table_gives_nan_or_an_error(device, bad):
    inputs = make_inputs(N=9, D=10, R=8, device=device)
    inputs["positions"][1, 4] = bad
    for op in (apply_rotary, reference.apply_rotary):
        for x, y in zip((inputs["q"], inputs["k"]), op(**inputs), strict=True):
            assert y[1, 4, :, :8].isnan().all()
            assert torch.equal(y[1, 4, :, 8:], x[1, 4, :, 8:])
            y = y.detach()
            y[1, 4] = 0
            assert not y.isnan().any()
        with pytest.raises(ValueError, match=rf"ids must be in \[0, {ROWS}\).*got .*{bad}"):
            op(**inputs, validate=True)


def test_empty_tensors(device):
    for empty in ({"B": 0}, {"N": 0}, {"H": 0}, {"H": 0, "G": 0}):
        inputs = make_inputs(**{"kind": "int64"} | empty, device=device)
        for op in (apply_rotary, reference.apply_rotary):
            q, k = op(**inputs, validate=True)
            assert q.shape == inputs["q"].shape
            assert k.shape == inputs["k"].shape


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_past_two_to_the_31(device, inplace):
    """The second row of q starts beyond 32-bit offsets; only touched pages are allocated."""
    far = 2**31 + 64
    memory = torch.empty(far + 1024, dtype=torch.float16, device=device)
    q = memory.as_strided((2, 3, 2, 8), (far, 16, 8, 1))
    small = make_inputs(N=3, dtype=torch.float16, device=device)
    q.copy_(small["q"])
    with torch.no_grad():
        ours, _ = apply_rotary(**small | {"q": q}, inplace=inplace)
    small = make_inputs(N=3, dtype=torch.float16, device=device)
    assert torch.equal(ours, reference.apply_rotary(**small)[0].detach())
