"""The rotary kernel: against its reference, its laws, its contract with torch, its errors."""

import pytest
import torch
from conftest import DEVICE, DTYPES, GPU, INTERPRET, SLOW, TRACED
from harness import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from comemo_kernels import TEXT, ImageGrids, apply_rotary, reference, rotary_table
from comemo_kernels import rotary as kernels

pytestmark = pytest.mark.kernel(reference=True)  # its laws are the reference's too

LAYOUTS = ("bnhd", "bhnd", "packed qkv", "tokens")
KINDS = ("int32", "int64", "grids", "table", "one table for all")
ROWS = 80  # of the table


def heads(layout, B, N, H, G, D, dtype, device):
    """q and k in a memory layout: both orders of tokens and heads, views of one qkv, no batch."""
    generator = torch.Generator().manual_seed(B + 10 * N)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "packed qkv":
        return draw(B, N, H + 2 * G, D).split([H, G, G], dim=2)[:2]
    if layout == "bhnd":
        return draw(B, H, N, D).transpose(1, 2), draw(B, G, N, D).transpose(1, 2)
    q, k = draw(B, N, H, D), draw(B, N, G, D)
    return (q.flatten(0, 1), k.flatten(0, 1)) if layout == "tokens" else (q, k)


def make_inputs(
    B=2, N=5, H=2, G=1, D=8, R=8, dtype=torch.float32, layout="bnhd", kind="int64", device="cpu"
):
    q, k = heads(layout, B, N, H, G, D, dtype, device)
    tokens, P = q.shape[:-2], ROWS
    generator = torch.Generator().manual_seed(N)
    table = rotary_table(torch.arange(P)[None], R, 100.0)
    cos, sin = (t[0].to(torch.promote_types(dtype, torch.float32)) for t in table)
    ids = torch.randint(P, tokens, generator=generator)  # repeated, in any order
    positions = None
    if kind in ("int32", "int64"):
        positions = ids.to(getattr(torch, kind)).to(device)
    elif kind == "grids":
        positions = grids_within(tokens.numel(), device)
    else:
        rows = ids[:1] if kind == "one table for all" and layout != "tokens" else ids
        cos, sin = cos[rows], sin[rows]
    cos, sin = cos.to(device), sin.to(device)
    return {
        "q": q.requires_grad_(),
        "k": k.requires_grad_(),
        "cos": cos,
        "sin": sin,
        "positions": positions,
    }


def grids_within(tokens, device):
    """Text, an image of 2 x 2 tiles of 4 tokens, text that begins anew, a frame: what has room."""
    order = ("row", "column")[tokens % 2]
    entries = [((2, 2), 2, 2, 22), (TEXT, 25, 0, 25), ((0, 0), 26, 1, 30)]
    fitting = [entry[:3] for entry in entries if entry[3] <= tokens]
    grids, offsets, biases = zip(*fitting, strict=True) if fitting else ((), (), ())
    return ImageGrids.pack(grids, offsets, biases, side=2, tile_order=order, device=device)


# --- values and gradients ---


WIDTHS = ((2, 2), (6, 6), (64, 64), (80, 32), (7, 4))  # D and R
# Every two values of layout, kind, dtype, widths and rounding meet; all of them would be 600 cases.
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
    """They end within a block, at one's end, and before their last one; forth, back, in place."""
    several = [config for config in kernels.rotary_kernel.configs if config["STEPS"] > 1]
    assert several
    B = 1 if kind == "grids" else 2
    inputs = make_inputs(B, N, 3, 1, D, 8, torch.float16, layout, kind, device)
    wanted = evaluate(apply_rotary, inputs)
    for config in several[:1] if INTERPRET else several:  # there their warps are all the same
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
    assert gradgradcheck(rotate, (q, k), fast_mode=True)  # along directions drawn at random


@pytest.mark.kernel
def test_only_gradients_that_are_asked_for_are_computed(device, monkeypatch):
    inputs = make_inputs(device=device)
    launched, operator = [], kernels._rotary
    counting = lambda xs, *args: (launched.append(len(xs)), operator(xs, *args))[1]  # noqa: E731
    monkeypatch.setattr(kernels, "_rotary", counting)
    q, k = apply_rotary(**inputs)
    (q.sum() + k.sum()).backward()
    q, k = apply_rotary(**inputs | {"k": inputs["k"].detach()})
    (q.sum() + k.sum()).backward()
    assert launched == [2, 2, 2, 1]


def test_an_output_that_is_not_used_costs_no_gradient(device):
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


def test_turning_back_undoes_it(device):
    inputs = make_inputs(N=33, D=64, R=64, device=device)
    q, k = apply_rotary(**inputs)
    back = {"cos": inputs["cos"], "sin": -inputs["sin"], "positions": inputs["positions"]}
    for turned, given_ in zip(apply_rotary(q, k, **back), (inputs["q"], inputs["k"]), strict=True):
        torch.testing.assert_close(turned, given_)


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
def test_an_id_beyond_the_table_becomes_nan_or_an_error(device, bad):
    inputs = make_inputs(N=9, D=10, R=8, device=device)
    inputs["positions"][1, 4] = bad
    for op in (apply_rotary, reference.apply_rotary):
        for x, y in zip((inputs["q"], inputs["k"]), op(**inputs), strict=True):
            assert y[1, 4, :, :8].isnan().all()
            assert torch.equal(y[1, 4, :, 8:], x[1, 4, :, 8:])
            y = y.detach()
            y[1, 4] = 0
            assert not y.isnan().any()
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, {ROWS}\).*got .*{bad}"):
            op(**inputs, validate=True)


def test_nothing_to_rotate(device):
    for empty in ({"B": 0}, {"N": 0}, {"H": 0}, {"H": 0, "G": 0}):
        inputs = make_inputs(**{"kind": "int64"} | empty, device=device)
        for op in (apply_rotary, reference.apply_rotary):
            q, k = op(**inputs, validate=True)
            assert q.shape == inputs["q"].shape
            assert k.shape == inputs["k"].shape


@pytest.mark.parametrize("inplace", [False, True])
def test_offsets_past_two_to_the_31(device, inplace):
    """The second row of q begins beyond what 32 bits can address; only touched pages exist."""
    far = 2**31 + 64
    memory = torch.empty(far + 1024, dtype=torch.float16, device=device)
    q = memory.as_strided((2, 3, 2, 8), (far, 16, 8, 1))
    small = make_inputs(N=3, dtype=torch.float16, device=device)
    q.copy_(small["q"])
    with torch.no_grad():
        ours, _ = apply_rotary(**small | {"q": q}, inplace=inplace)
    small = make_inputs(N=3, dtype=torch.float16, device=device)
    assert torch.equal(ours, reference.apply_rotary(**small)[0].detach())


# --- in place ---


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_is_the_same(device, layout):
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


def test_autograd_sees_what_was_written(device):
    inputs = make_inputs(N=9, device=device)

    def through(op, q, k, **kwargs):
        x, y = 2 * q, (3 * k.flatten(2)).view(k.shape)  # y is a view, as of a projection
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


# --- contract with torch ---


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("layout", "kind"), zip(LAYOUTS, ("int64", "grids", "table", "int32"), strict=True)
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
        ("table", True, "inductor" if GPU else "aot_eager"),
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
    if INTERPRET:  # what is counted are graphs
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


# --- errors ---


def wrong(device):
    """Arguments that do not fit, and what must be said of them."""
    inputs = make_inputs(N=5, device=device)
    q, k, cos, sin, positions = inputs.values()
    long = ImageGrids.pack([(2, 1)], side=2, device=device)
    return {
        "q of integers": ({"q": q.int()}, r"q must be .* float64, got torch.int32 \(2, 5, 2, 8\)"),
        "q of 2 dimensions": ({"q": q[0, 0]}, r"got torch.float32 \(2, 8\)"),
        "q of float8": ({"q": q.to(torch.float8_e4m3fn)}, "got torch.float8_e4m3fn"),
        "a table of no dimension": ({"cos": cos[0, 0], "sin": sin[0, 0]}, "got 0"),
        "k of other tokens": ({"k": k[:, :4]}, r"\(2, 4, 1, 8\).* for .*\(2, 5, 2, 8\)"),
        "k of another dtype": ({"k": k.half()}, "k must be as q.*float16"),
        "k without a batch": ({"k": k[0]}, r"k must be as q.*\(5, 1, 8\)"),
        "sin of another shape": ({"sin": sin[:3]}, r"one shape.*\(80, 4\).*\(3, 4\)"),
        "a table of integers": ({"cos": cos.int(), "sin": sin.int()}, "one shape, floating dtype"),
        "a table too wide": (
            {"cos": torch.cat([cos, cos], 1), "sin": torch.cat([sin, sin], 1)},
            r"even number of the 8 elements .* got 16: .* give the first",
        ),
        "ids of other tokens": ({"positions": positions[:, :4]}, r"\[2, 5\].* got .*\[2, 4\]"),
        "ids in a list": ({"positions": [0, 1]}, "a tensor of ids, ImageGrids or None, got list"),
        "ids of floats": ({"positions": positions.float()}, "int32 or int64.*float32"),
        "a table for each token beside ids": (
            {"cos": cos[positions], "sin": sin[positions]},
            r"with positions cos must be \[P, R/2\]",
        ),
        "a table without ids": ({"positions": None}, r"must be \[2, 5, 4\].*got \[80, 4\]"),
        "an expanded tensor in place": (
            {"q": q[:, :1].detach().expand(2, 5, 2, 8), "inplace": True},
            r"q, which is written, must not be expanded, got strides \(.*0.*\)",
        ),
        "grids that overrun": (
            {"positions": long, "q": q[:, :1, :], "k": k[:, :1, :]},
            "end at token 12 overrun a sequence of 2",
        ),
    }


@pytest.mark.parametrize("case", wrong("cpu"))
@pytest.mark.parametrize("op", [apply_rotary, reference.apply_rotary], ids=["kernel", "reference"])
def test_says_what_is_wrong(device, op, case):
    change, message = wrong(device)[case]
    with pytest.raises(ValueError, match=rf"(?s)^apply_rotary: .*{message}"):
        op(**make_inputs(N=5, device=device) | change)


@pytest.mark.kernel
def test_says_what_a_kernel_cannot_do(device):
    inputs = make_inputs(N=5, device=device)
    q = inputs["q"].transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(
        ValueError, match=r"last dimension must be contiguous.*\(80, 2, 1, 10\)|got"
    ):
        apply_rotary(**inputs | {"q": q})
    spread = torch.cat([inputs["sin"]] * 2, 1)[:, :4]
    with pytest.raises(ValueError, match="one layout"):
        apply_rotary(**inputs | {"sin": spread})
    with pytest.raises(ValueError, match="must not require grad"):
        apply_rotary(**inputs | {"cos": inputs["cos"].requires_grad_()})
