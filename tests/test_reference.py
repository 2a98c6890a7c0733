"""The references: recorded values, laws, gradients and errors."""

import pytest
import torch
from conftest import TRACED
from harness import assert_matches, recorded
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

import comemo_kernels as ops
from comemo_kernels import reference


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- rotary ---


def test_recorded_tables(golden):
    tensors = recorded(golden, "components.safetensors", "rope/")
    cos, sin = ops.rotary_table(tensors["positions"][None], 32, 1e6)
    for kind in ("self", "cross"):
        for ours, name in ((cos[0], "cos"), (sin[0], "sin")):
            assert torch.equal(torch.cat([ours, ours], -1), tensors[f"{kind}/{name}"])
            half = tensors[f"{kind}/{name}_bf16"][:, :16]
            assert torch.equal(ours.bfloat16(), half)


def test_dynamic_scaling_starts_after_its_length_and_keeps_no_state():
    position_ids = torch.arange(9)[None].expand(3, -1)
    plain, _ = ops.rotary_table(position_ids, 16, 1e4)
    for _ in range(2):
        lengths = torch.tensor([1, 64, 128])
        cos, _ = ops.rotary_table(position_ids, 16, 1e4, 2.0, lengths, 64)
        assert torch.equal(cos[:2], plain[:2])
        base = 1e4 * (2.0 * 128 / 64 - 1) ** (16 / 14)
        scaled, _ = ops.rotary_table(position_ids[:1], 16, base)
        torch.testing.assert_close(cos[2:], scaled)


@given(offset=st.integers(-50, 50), D=st.sampled_from([2, 6, 64]))
def test_scores_depend_only_on_the_difference_of_ids(offset, D):
    q, k = random(1, 4, 2, D, dtype=torch.float64), random(1, 4, 2, D, dtype=torch.float64, seed=1)
    ids = torch.tensor([[60, 61, 70, 99]])

    def scores(shift):
        table = [t.double() for t in ops.rotary_table(ids + shift, D)]
        a, b = ops.apply_rotary(q, k, *table)
        return torch.einsum("bnhd,bmhd->bhnm", a, b)

    # The angles are float32: 99 radians are exact to 1e-5.
    torch.testing.assert_close(scores(offset), scores(0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_rotation_is_computed_in_float32(dtype):
    table = ops.rotary_table(torch.arange(7)[None], 64)
    x = random(1, 7, 3, 64).to(dtype)
    exact, _ = ops.apply_rotary(x.double(), None, *table)
    error = ops.apply_rotary(x, None, *table)[0].double() - exact
    assert error.abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


def test_invalid_tables_raise():
    with pytest.raises(ValueError, match="even"):
        ops.rotary_table(torch.arange(3)[None], 5)
    with pytest.raises(ValueError, match="length"):
        ops.rotary_table(torch.arange(3)[None], 4, factor=2.0)


# --- attention over the image memory ---


def naive_attention(q, k, v, spans):
    """All scores, by the definition, with matrix products, which round differently from SDPA."""
    groups = q.shape[2] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))  # [H, M, D]
    start, end = spans.unsqueeze(1).unbind(-1)
    place = torch.arange(k.shape[1])
    seen = (start[..., None] <= place) & (place < end[..., None])  # [B, 1, N or 1, M]
    scores = q.transpose(1, 2) @ k.mT / q.shape[-1] ** 0.5
    shares = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)  # of empty spans
    return (shares @ v).transpose(1, 2)


def memory_case(B, N, H, G, D, M, seed, per_token=True, dtype=torch.float32):
    bounds = torch.randint(
        0, M + 1, (B, N if per_token else 1, 2), generator=torch.Generator().manual_seed(seed)
    )
    return {
        "q": random(B, N, H, D, seed=seed, dtype=dtype),
        "k": random(M, G, D, seed=seed + 1, dtype=dtype),
        "v": random(M, G, D, seed=seed + 2, dtype=dtype),
        "spans": bounds.sort(-1).values,
    }


@pytest.mark.parametrize("compiling", [False, True])
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2)]),
    D=st.sampled_from([2, 8, 64]),
    M=st.integers(1, 40),
    seed=st.integers(0, 99),
    per_token=st.booleans(),
)
def test_attention_matches_its_definition(B, N, heads, D, M, seed, per_token, compiling):
    case = memory_case(B, N, *heads, D, M, seed, per_token)
    op = reference.attention._attend_masked if compiling else ops.attend_spans
    assert_matches(op, naive_attention, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_half_precision(dtype):
    assert_matches(
        ops.attend_spans, naive_attention, memory_case(2, 5, 4, 4, 64, 33, 7, dtype=dtype)
    )


def test_attention_gradients_are_zero_for_empty_spans():
    case = memory_case(2, 3, 2, 2, 4, 6, 3, dtype=torch.float64)
    case["spans"] = torch.tensor([[[0, 4]], [[4, 4]]])
    leaves = [case[name].requires_grad_() for name in "qkv"]
    assert gradcheck(lambda q, k, v: ops.attend_spans(q, k, v, case["spans"]), leaves)
    out = ops.attend_spans(**case)
    assert (out[1] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert (grads[0][1] == 0).all()
    assert (grads[1][4:] == 0).all()


def test_a_row_alone_is_the_row_in_a_batch():
    case = memory_case(4, 3, 2, 2, 8, 30, 5, per_token=False)
    whole = ops.attend_spans(**case)
    for b in range(4):
        start, end = case["spans"][b, 0].tolist()
        alone = (
            ops.attend_spans(
                case["q"][b : b + 1],
                case["k"][start:end],
                case["v"][start:end],
                torch.tensor([[[0, end - start]]]),
            )
            if end > start
            else torch.zeros_like(whole[b : b + 1])
        )
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=1e-5, atol=1e-6)


@TRACED
def test_attention_compiles_whole():
    compiled = torch.compile(ops.attend_spans, fullgraph=True, backend="eager")
    case = memory_case(2, 3, 2, 2, 8, 30, 5)
    torch.testing.assert_close(compiled(**case), ops.attend_spans(**case), rtol=1e-5, atol=1e-6)


def test_invalid_attention_arguments_raise():
    case = memory_case(2, 3, 2, 2, 8, 30, 5)
    with pytest.raises(ValueError, match=r"spans must be .* \(2, 3, 2\) or \(2, 1, 2\)"):
        ops.attend_spans(**case | {"spans": case["spans"][:, :2]})
    with pytest.raises(ValueError, match=r"must be in \[0, 30\]"):
        ops.attend_spans(**case | {"spans": case["spans"] + 31})
    with pytest.raises(ValueError, match="dividing 2"):
        ops.attend_spans(**case | {"k": random(30, 3, 8), "v": random(30, 3, 8)})


# --- tile projection ---


@pytest.mark.parametrize("name", ["s05", "s025", "s05_rect"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_recorded_folds(golden, name, version):
    tensors = recorded(golden, "components.safetensors", f"pixel_shuffle/{name}/")
    folded = ops.fold_tiles(tensors["in"], 0.25 if name == "s025" else 0.5, version)
    assert torch.equal(folded, tensors[version])


def test_projection_gradient():
    shapes = [(2, 17, 3), (12,), (12,), (5, 12), (5,), (5, 5), (5,)]
    leaves = [
        random(*s, dtype=torch.float64, seed=i).requires_grad_() for i, s in enumerate(shapes)
    ]
    assert gradcheck(ops.project_tiles, leaves)


def test_invalid_projection_arguments_raise():
    weights = [random(*s) for s in [(12,), (12,), (5, 12), (5,), (5, 5), (5,)]]
    with pytest.raises(ValueError, match=r"1 \+ h\*h"):
        ops.project_tiles(random(2, 16, 3), *weights)
    with pytest.raises(ValueError, match=r"norm_weight must be .*\(16,\)"):
        ops.project_tiles(random(2, 17, 4), *weights)
    with pytest.raises(ValueError, match="cannot be folded"):
        ops.fold_tiles(random(1, 3, 4, 2))
    with pytest.raises(ValueError, match="version"):
        ops.fold_tiles(random(1, 4, 4, 2), version="v3")
