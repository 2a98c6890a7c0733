"""Gradients of attend_spans: values against the reference, laws, what is saved."""

import math

import pytest
import torch
from attention_inputs import make_inputs, ways
from conftest import DEVICE, DTYPES, GPU, TRACED, WITHOUT_HALF, every_two
from harness import assert_matches, red_zones
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from comemo_kernels import MemoryScales, QueryRotation, attend_spans

pytestmark = pytest.mark.kernel


def check(inputs, rest, learning="qkv", **kwargs):
    """Values and gradients of `learning` against the reference's."""
    for name in learning:
        inputs[name].requires_grad_()
    ours, theirs = ways(rest, **kwargs)
    assert_matches(ours, theirs, inputs)


def gradients(inputs, rest, attend=0):
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    with red_zones():
        out = ways(rest)[attend](**inputs)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))


@pytest.mark.parametrize("dtype", WITHOUT_HALF, ids=str)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    D=st.sampled_from([24, 64] if GPU else [2, 16, 24, 64]),  # each compiles
    M=st.integers(8, 150),
    spans=st.sampled_from(["token", "prompt"]),
    starts=st.sampled_from([None, (), (0,), (0, 1), (0, 16, 40, 41)]),
    own=st.booleans(),
    learning=st.sampled_from(["qkv", "q", "kv", "v"]),
)
def test_matches_reference(B, N, heads, D, M, spans, starts, own, learning, dtype):
    if starts:
        starts = tuple(start for start in starts if start < M)
    (H, G), biases = heads, B if own else 1
    if dtype == torch.float32:
        # The log-sum-exp is rounded at its own magnitude, a few times the error of PyTorch's
        # softmax of one row; over several rows that error varies as much.
        N += 8
    inputs, rest = make_inputs(B, N, H, G, D, M, spans, starts, biases, dtype=dtype)
    # If all read one or two keys, gradients of q and k are small differences of large numbers. By
    # the row sum of FlashAttention their error is that of the large ones, in PyTorch's softmax not.
    inputs["spans"][0, 0] = torch.tensor([0, M])
    check(inputs, rest, learning)


@pytest.mark.parametrize(
    ("dtype", "starts", "biases", "spans"),
    every_two(DTYPES, [None, (0,), (0, 64, 100)], [1, 2], ["token", "prompt", "packed"]),
)
def test_several_blocks(dtype, starts, biases, spans):
    """Blocks with and without a mask, blocks that straddle samples, blocks that never meet."""
    kind = "prompt" if spans == "prompt" else "token"
    N, M = (14, 40) if dtype == torch.float32 else (66, 160)  # float32 has small blocks
    starts = starts and tuple(start * M // 160 for start in starts)
    inputs, rest = make_inputs(2, N, 2, 1, 32, M, kind, starts, biases, dtype=dtype)
    if spans == "prompt":
        inputs["spans"] = torch.tensor([[[0, M // 2]], [[M // 2, M]]], device=DEVICE)
    if spans == "packed":
        samples = torch.tensor([[0, 3], [3, 3], [3, 20], [20, M]], device=DEVICE)
        counts = torch.tensor([N // 2, 5, N - 5, N - N // 2], device=DEVICE)
        inputs["spans"] = samples.repeat_interleave(counts, 0).view(2, N, 2)
    check(inputs, rest)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_wide_heads(dtype):
    check(*make_inputs(1, 20, 2, 1, 200, 90, "token", (0, 64), dtype=dtype))


@pytest.mark.parametrize("starts", [None, (0, 30)])
def test_log_sum_exp_has_its_own_gradient(starts):
    inputs, rest = make_inputs(2, 9, 4, 2, 16, 40, "token", starts)
    first = torch.arange(18, device=DEVICE).view(2, 9) % 9
    inputs["spans"] = torch.stack([first, first + 30], -1)
    check(inputs, rest, return_lse=True)


def test_the_log_sum_exp_alone():
    inputs, rest = make_inputs(1, 9, 2, 1, 16, 70, "prompt", None)
    inputs["spans"][:] = torch.tensor([0, 70])
    grads = []
    for attend in ways(rest, return_lse=True):
        leaves = [inputs[name].requires_grad_() for name in "qk"]
        grads.append(torch.autograd.grad(attend(**inputs)[1].sum(), leaves))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


# --- what nobody reads ---


@pytest.mark.parametrize("starts", [None, (0, 32)])
def test_keys_that_nobody_reads_have_zero_gradients(starts):
    """They may hold anything; so may what an empty span would have read."""
    inputs, rest = make_inputs(2, 40, 2, 1, 16, 150, "prompt", starts, dtype=torch.bfloat16)
    inputs["spans"] = torch.tensor([[[8, 40]], [[20, 20]]], device=DEVICE)
    clean = gradients(inputs, rest)
    assert not clean[0][1].any()
    for grad in clean[1:]:
        assert grad[8:40].any()
        assert not grad[:8].any()
        assert not grad[40:].any()
    spoilt = {name: inputs[name].detach().clone() for name in "kv"}
    for x in spoilt.values():
        x[:8] = x[40:] = math.nan
    for found, wanted in zip(gradients(inputs | spoilt, rest), clean, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("starts", [(0,), (0, 32)])
def test_a_token_that_reads_nothing_may_be_anywhere(starts):
    """Also beyond the table of angles, in a block with tokens that read."""
    inputs, rest = make_inputs(1, 9, 2, 1, 16, 70, "token", starts)
    inputs["spans"][0, 4] = 20
    clean = gradients(inputs, rest)
    rest["positions"][0, 4] = 10**6
    for found, wanted in zip(gradients(inputs, rest), clean, strict=True):
        assert torch.equal(found, wanted)
    assert not clean[0][0, 4].any()


def test_nobody_reads_anything():
    inputs, rest = make_inputs(2, 3, 2, 1, 16, 300, "prompt", (0,))
    inputs["spans"][:] = 7
    for grad in gradients(inputs, rest):
        assert not grad.any()


@pytest.mark.parametrize("sizes", [(0, 3, 9), (2, 0, 9), (2, 3, 0)])
def test_nothing_at_all(sizes):
    B, N, M = sizes
    q = torch.randn(B, N, 2, 16, device=DEVICE, requires_grad=True)
    k = torch.randn(M, 1, 16, device=DEVICE, requires_grad=True)
    spans = torch.zeros(B, 1, 2, dtype=torch.int64, device=DEVICE)
    for grad in torch.autograd.grad(attend_spans(q, k, k, spans).sum(), [q, k]):
        assert not grad.any()


def test_more_ranges_of_rows_than_are_kept():
    """Every other prompt reads the first keys; the ranges past the last kept one are merged."""
    inputs, rest = make_inputs(36, 16, 1, 1, 16, 32, "prompt", None)
    odd = torch.arange(36, device=DEVICE) % 2
    inputs["spans"] = torch.stack([16 * odd, 16 + 16 * odd], -1)[:, None]
    check(inputs, rest)


# --- layouts ---


def test_strided_inputs_and_gradients():
    inputs, rest = make_inputs(2, 3, 4, 2, 16, 30, "token", (0, 16))
    kv = torch.stack([inputs["k"], inputs["v"]], 1)  # [M, 2, G, D]
    strided = inputs | {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": kv[:, 0],
        "v": kv[:, 1],
    }
    for found, wanted in zip(gradients(strided, rest), gradients(inputs, rest), strict=True):
        torch.testing.assert_close(found, wanted)
    leaves = [inputs[name] for name in "qkv"]
    # The gradient of a sum is one expanded number; that of a transposed output is transposed.
    for reduced in (torch.sum, lambda out: (out.transpose(1, 2) * 1).sum()):
        found = torch.autograd.grad(reduced(ways(rest)[0](**inputs)), leaves)
        for actual, wanted in zip(found, gradients(inputs, rest), strict=True):
            torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float8_memory(dtype):
    """Queries learn to read a memory that is frozen in float8."""
    inputs, rest = make_inputs(2, 9, 2, 1, 32, 64, "token", (0, 20), dtype=dtype)
    scales = MemoryScales(*(torch.rand(2, 4, 1, device=DEVICE) + 0.5), tile=16)
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    exact = {}
    for name, scale in (("k", scales.keys), ("v", scales.values)):
        inputs[name] = inputs[name].to(torch.float8_e4m3fn)
        exact[name] = (inputs[name].float() * scale.repeat_interleave(16, 0)[..., None]).to(dtype)
    q = inputs.pop("q").requires_grad_()
    spans = inputs.pop("spans")
    out = attend_spans(q, **inputs, spans=spans, rotation=rotation, scales=scales)
    wanted = attend_spans(q, **exact, spans=spans, rotation=rotation)
    assert torch.equal(out, wanted)
    found, truth = (torch.autograd.grad(y, q, torch.ones_like(y))[0] for y in (out, wanted))
    assert torch.equal(found, truth)


# --- laws ---


@pytest.mark.parametrize("biases", [1, 3])
def test_gradients_of_a_batch_are_those_of_its_rows(biases):
    inputs, rest = make_inputs(3, 6, 2, 1, 16, 30, "token", (0, 12, 20), biases)
    whole = gradients(inputs, rest)
    sums = [torch.zeros_like(grad) for grad in whole[1:]]
    for b in range(3):
        own = {
            n: rest[n][b : b + 1] if len(rest[n]) > 1 else rest[n] for n in ("positions", "biases")
        }
        rows = {name: inputs[name].detach()[b : b + 1] for name in ("q", "spans")}
        dq, *rest_grads = gradients(inputs | rows, rest | own)
        torch.testing.assert_close(dq[0], whole[0][b])
        for total, grad in zip(sums, rest_grads, strict=True):
            total += grad
    torch.testing.assert_close(sums, list(whole[1:]))


def test_the_same_input_gives_the_same_bits():
    inputs, rest = make_inputs(2, 50, 4, 2, 32, 150, "token", (0, 64), dtype=torch.bfloat16)
    first = gradients(inputs, rest)
    for _ in range(100 if GPU else 1):
        assert all(map(torch.equal, gradients(inputs, rest), first))


def test_no_second_derivatives():
    inputs, rest = make_inputs(1, 2, 1, 1, 16, 9, "token", None)
    q = inputs["q"].requires_grad_()
    (grad,) = torch.autograd.grad(ways(rest)[0](**inputs).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attend_spans: second derivatives are not computed"):
        grad.sum().backward()


def test_saves_nothing_of_size_queries_times_keys():
    inputs, rest = make_inputs(1, 20, 2, 1, 16, 40, "token", (0, 16))
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    saved = {}

    def pack(x):
        saved[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out, lse = ways(rest, return_lse=True)[0](**inputs)
    given = [*leaves, *(t for t in (*inputs.values(), *rest.values()) if t is not None)]
    own = {t.data_ptr(): t.nbytes for t in (*given, out, lse)}
    assert saved == own


# --- operator ---


@TRACED
def test_operator_contract(real_device):
    from comemo_kernels import attention
    from comemo_kernels._attend_gradient import attend_gradient_op

    for starts, biases in ((None, 1), ((0, 32), 2)):
        inputs, rest = make_inputs(
            starts=starts, biases=biases, dtype=torch.float16, device=real_device
        )
        rotation = [inputs["cos"], inputs["sin"]]
        rotation += [rest[n] if starts else None for n in ("positions", "starts", "biases")]
        q, k, v, spans = (inputs[n] for n in ("q", "k", "v", "spans"))
        out, lse = attention.attend_op(q, k, v, spans, *rotation, None, None, 1)
        half = torch.ones(1, dtype=torch.float16, device=real_device)
        for dlse, gate, flags in ((None, half, (True, False)), (lse, None, (False, True))):
            arguments = (q, q, k, v, out, lse, dlse, spans, *rotation, gate, *flags)
            torch.library.opcheck(attend_gradient_op, arguments)


@pytest.mark.slow  # test_gated_attention compiles the same operator
@TRACED
def test_compiles_whole_for_any_length(real_device):
    def attend(q, k, v, spans, cos, sin, positions, starts, biases):
        rotation = QueryRotation(cos, sin, positions, starts, biases)
        return attend_spans(q, k, v, spans, rotation, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for N, M in ((3, 20), (5, 30)):
        inputs, rest = make_inputs(2, N, 2, 1, 16, M, "prompt", (0, 9), device=real_device)
        inputs["spans"][..., 0], inputs["spans"][..., 1] = 0, M
        leaves = [inputs[name].requires_grad_() for name in "qkv"]
        arguments = (*inputs.values(), *rest.values())
        grads = [
            torch.autograd.grad(sum(t.sum() for t in call(*arguments)), leaves)
            for call in (compiled, attend)
        ]
        torch.testing.assert_close(*grads)
