"""Gradients of attend_spans in PyTorch: against autograd, laws, memory."""

import math

import pytest
import torch
from conftest import WITHOUT_HALF
from harness import assert_matches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from comemo_kernels import MemoryScales, QueryRotation, rotary_table
from comemo_kernels.reference import attend_spans, attention_gradient
from comemo_kernels.reference.attention import _attend_spans


def make_inputs(B, N, heads, D, M, spans, starts, own, dtype=torch.float32, dim=None):
    """Tensors and rotation; `dim` of D are rotated."""
    (H, G), g = heads, torch.Generator().manual_seed(B * N + M + D)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    def integers(high, *shape):
        return torch.randint(high, shape, generator=g)

    tensors = {"q": draw(B, N, H, D), "k": draw(M, G, D), "v": draw(M, G, D)}
    tensors["spans"] = integers(M + 1, B, N if spans == "token" else 1, 2).sort(-1).values
    if starts is None:
        return tensors, None
    cos, sin = rotary_table(torch.arange(90)[None], dim or D, theta=100.0)
    where = torch.tensor(starts, dtype=torch.int32)
    biases = integers(40, B if own else 1, len(starts)).int()
    rotation = QueryRotation(cos[0], sin[0], integers(40, B, N), where, biases)
    return tensors, rotation if starts else rotation._replace(starts=None, biases=None)


def composed(q, k, v, spans, rotation, return_lse=True):
    """The same by PyTorch's own gradients, which are zero if all spans are empty."""
    out, lse = _attend_spans(q, k, v, spans, rotation, return_lse)
    nothing = 0 * sum(t.sum() for t in (q, k, v))
    return out + nothing, lse if lse is None else lse + nothing


def ways(rotation):
    """Both as functions of tensors, for `assert_matches`; exact tables for exact inputs."""

    def of(attend):
        def op(q, k, v, spans):
            table = rotation
            if table is not None and q.dtype == torch.float64:
                table = table._replace(cos=table.cos.double(), sin=table.sin.double())
            out, lse = attend(q, k, v, spans, table, return_lse=True)
            # An empty span has a log-sum-exp of -inf.
            return out, lse.where(lse.isfinite(), 0)

        return op

    return of(attend_spans), of(composed)


def with_grad(tensors, names="qkv"):
    for name in names:
        tensors[name].requires_grad_()
    return tensors


@pytest.mark.parametrize("dtype", WITHOUT_HALF, ids=str)
@settings(max_examples=15)
@given(
    B=st.integers(1, 2),
    N=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3)]),
    D=st.sampled_from([8, 24]),
    M=st.integers(1, 60),
    spans=st.sampled_from(["token", "prompt"]),
    starts=st.sampled_from([None, (), (0,), (0, 1, 20)]),
    own=st.booleans(),
)
def test_gradients_match_autograd(B, N, heads, D, M, spans, starts, own, dtype):
    starts = starts and tuple(start for start in starts if start < M)
    tensors, rotation = make_inputs(B, N, heads, D, M, spans, starts, own, dtype)
    assert_matches(*ways(rotation), with_grad(tensors))


@pytest.mark.parametrize(
    ("spans", "starts", "own", "dim", "return_lse"),
    [
        ("token", (0, 2), True, 4, True),
        ("prompt", (0,), False, 2, False),
        ("prompt", None, False, 4, True),
    ],
)
def test_gradcheck(spans, starts, own, dim, return_lse, monkeypatch):
    """Two rows of a group at a time; one span is empty."""
    monkeypatch.setattr(attention_gradient, "FEW", 2)
    monkeypatch.setattr(attention_gradient, "MOST", 1)
    tensors, rotation = make_inputs(2, 3, (2, 1), 4, 6, spans, starts, own, torch.float64, dim)
    tensors["spans"][0, 0] = 3
    tensors["spans"][1, -1] = torch.tensor([1, 5])
    leaves = [with_grad(tensors)[name] for name in "qkv"]

    def attend(q, k, v):
        found = attend_spans(q, k, v, tensors["spans"], rotation, return_lse=return_lse)
        return (found[0], found[1].clamp(min=-9)) if return_lse else found

    assert gradcheck(attend, leaves)


def test_second_derivatives_are_refused():
    tensors, rotation = make_inputs(1, 2, (2, 1), 8, 20, "prompt", (0,), False)
    tensors["spans"][:] = torch.tensor([0, 20])
    with_grad(tensors)
    out = attend_spans(**tensors, rotation=rotation)
    (first,) = torch.autograd.grad(out.sum(), tensors["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="attend_spans: second derivatives are not computed"):
        first.sum().backward()


def test_a_span_in_chunks_has_the_same_gradient(monkeypatch):
    tensors, rotation = make_inputs(1, 70, (4, 2), 16, 50, "prompt", (0, 20), False)
    leaves = [with_grad(tensors)[name] for name in "qkv"]
    cotangent = torch.randn(1, 70, 4, 16)

    def gradients():
        return torch.autograd.grad(attend_spans(**tensors, rotation=rotation), leaves, cotangent)

    whole = gradients()
    assert all(map(torch.equal, whole, gradients())), "the same bits"
    for name, rows in (("FEW", 16), ("MANY", 16), ("MOST", 1)):
        monkeypatch.setattr(attention_gradient, name, rows)
    for ours, theirs in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_memory_that_nobody_reads_has_no_gradient():
    """Even if it holds NaN; neither has a query that reads nothing."""
    tensors, rotation = make_inputs(2, 3, (2, 1), 8, 60, "prompt", (0, 30), False)
    tensors["spans"] = torch.tensor([[[8, 40]], [[20, 20]]])
    for name in ("k", "v"):
        tensors[name][:8] = tensors[name][40:] = math.nan
    with_grad(tensors)
    out, lse = attend_spans(**tensors, rotation=rotation, return_lse=True)
    (out.sum() + lse[0].sum()).backward()
    assert (tensors["q"].grad[1] == 0).all()
    assert tensors["q"].grad[0].ne(0).any()
    for name in ("k", "v"):
        gradient = tensors[name].grad
        assert gradient.isfinite().all()
        assert gradient[8:40].ne(0).any(1).all()
        assert (gradient[:8] == 0).all()
        assert (gradient[40:] == 0).all()


@pytest.mark.parametrize("names", ["q", "k", "v", "kv"])
def test_only_what_needs_a_gradient_gets_one(names):
    tensors, rotation = make_inputs(2, 3, (4, 2), 8, 40, "token", (0, 10), True)
    wanted, _ = make_inputs(2, 3, (4, 2), 8, 40, "token", (0, 10), True)
    for held, rest in ((with_grad(tensors, names), {}), (with_grad(wanted), {"return_lse": False})):
        attend = composed if rest else attend_spans
        found = attend(**held, rotation=rotation, **rest)
        (found[0] if rest else found).square().sum().backward()
    for name in "qkv":
        gradient = tensors[name].grad
        assert (gradient is not None) == (name in names)
        if gradient is not None:
            torch.testing.assert_close(gradient, wanted[name].grad)


@pytest.mark.parametrize("which", [0, 1], ids=["output", "log-sum-exp"])
def test_one_result_alone(which):
    """The gradient of v is zero where only the log-sum-exp counts."""
    tensors, rotation = make_inputs(1, 3, (2, 1), 8, 40, "prompt", (0, 10), False)
    tensors["spans"][:] = torch.tensor([3, 30])
    leaves = [with_grad(tensors)[name] for name in "qkv"]
    found = [
        torch.autograd.grad(
            attend(**tensors, rotation=rotation, return_lse=True)[which].square().sum(),
            leaves,
            allow_unused=True,
        )
        for attend in (attend_spans, composed)
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs)


def test_float8_memory_gives_queries_a_gradient():
    tensors, rotation = make_inputs(2, 3, (4, 2), 16, 64, "token", (0, 20), True)
    scales = MemoryScales(*(torch.rand(2, 4, 2) + 0.5), tile=16)
    stored = {name: tensors[name].to(torch.float8_e4m3fn) for name in ("k", "v")}
    loaded = {
        name: stored[name].float() * scale.repeat_interleave(16, 0)[..., None]
        for name, scale in (("k", scales.keys), ("v", scales.values))
    }
    with_grad(tensors, "q")
    cotangent = torch.randn(2, 3, 4, 16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attend_spans(**tensors | stored, rotation=rotation, scales=scales)
    (ours,) = torch.autograd.grad(out, tensors["q"], cotangent)
    plain = composed(**tensors | loaded, rotation=rotation)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(plain, tensors["q"], cotangent)[0])
    assert {t.dtype for t in kept if t.shape == (64, 2, 16)} == {torch.float8_e4m3fn}


def test_the_table_may_require_a_gradient():
    tensors, rotation = make_inputs(1, 3, (2, 1), 8, 40, "prompt", (0, 10), False)
    tensors["spans"][:] = torch.tensor([3, 30])
    with_grad(tensors, "q")
    cos = rotation.cos.clone().requires_grad_()
    attend_spans(**tensors, rotation=rotation._replace(cos=cos)).sum().backward()
    assert cos.grad.ne(0).any()


def test_only_the_arguments_are_kept():
    """However many spans and images there are: no scores, no rotated queries."""
    tensors, rotation = make_inputs(2, 40, (4, 2), 16, 300, "token", (0, 50, 200), True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        attend_spans(**with_grad(tensors), rotation=rotation, return_lse=True)
    arguments = [*tensors.values(), *rotation]
    assert sum(t.nbytes for t in kept) == sum(t.nbytes for t in arguments)


def test_backward_under_autocast():
    """The gradient is computed in the dtype of the inputs wherever it is called."""
    tensors, rotation = make_inputs(2, 3, (4, 2), 16, 60, "prompt", (0, 20), True)
    leaves = [with_grad(tensors)[name] for name in "qkv"]
    out = attend_spans(**tensors, rotation=rotation)
    plain = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(out.sum(), leaves)
    assert all(map(torch.equal, ours, plain))
