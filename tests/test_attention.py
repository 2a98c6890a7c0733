"""attend_spans: values against its reference and definition, laws, gradients."""

import math

import pytest
import torch
from attention_inputs import check, make_inputs, ways
from conftest import DEVICE, DTYPES, GPU, every_two
from harness import assert_errs_no_more, red_zones
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

pytest.importorskip("triton")


from comemo_kernels import MemoryScales, QueryRotation, attend_spans, reference

pytestmark = pytest.mark.kernel(reference=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    B=st.integers(1, 3),
    N=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    D=st.sampled_from([24, 64] if GPU else [2, 16, 24, 64]),  # each compiles
    M=st.integers(1, 150),
    spans=st.sampled_from(["token", "prompt"]),
    starts=st.sampled_from([None, (), (0,), (0, 1), (0, 16, 40, 41)]),
    own=st.booleans(),
    ids=st.sampled_from([torch.int32, torch.int64]),
)
def test_matches_reference(B, N, heads, D, M, spans, starts, own, ids, dtype):
    if starts:
        starts = tuple(start for start in starts if start < M)
    (H, G), biases = heads, B if own else 1
    check(*make_inputs(B, N, H, G, D, M, spans, starts, biases, dtype=dtype, ids=ids))


@pytest.mark.parametrize(
    ("dtype", "starts", "spans"),
    every_two(DTYPES, [None, (0,), (0, 64, 100)], ["token", "prompt"]),
)
def test_blocks_of_a_prompt(dtype, spans, starts):
    """Rows for attend_many; some key blocks need a mask and some do not."""
    N, M = (20, 60) if dtype == torch.float32 else (75, 200)  # float32 has small blocks
    starts = starts and tuple(start * M // 200 for start in starts)
    inputs, rest = make_inputs(2, N, 2, 1, 32, M, spans, starts, 2, dtype=dtype)
    if spans == "prompt":
        inputs["spans"] = torch.tensor([[[0, M // 2]], [[M // 2, M]]], device=DEVICE)
    check(inputs, rest)


@pytest.mark.parametrize("starts", [None, (0,), (0, 30)])
def test_log_sum_exp(starts):
    inputs, rest = make_inputs(2, 4, 2, 1, 16, 70, "token", starts)
    inputs["spans"][0, 1] = 9  # an empty span
    ours, theirs = ways(rest, return_lse=True)
    with red_zones():
        out, lse = ours(**inputs)
    _, wanted = theirs(**inputs)
    assert (lse[0, 1] == -math.inf).all()
    assert (out[0, 1] == 0).all()
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, wanted.float())


def test_the_reference_matches_its_definition():
    """A loop over heads and keys in float64, with queries rotated for each image."""
    inputs, rest = make_inputs(2, 3, 4, 2, 16, 70, "token", (0, 32), 2)
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    out, lse = ways(rest, return_lse=True)[1](**inputs)
    for b in range(2):
        for n in range(3):
            start, end = inputs["spans"][b, n].tolist()
            for h in range(4):
                scores = []
                for m in range(start, end):
                    distance = int(rest["positions"][b, n] - rest["biases"][b, int(m >= 32)])
                    angle = torch.atan2(inputs["sin"], inputs["cos"])[abs(distance)]
                    phase = torch.polar(torch.ones_like(angle), angle * (1 if distance > 0 else -1))
                    q = torch.complex(*inputs["q"][b, n, h].chunk(2)) * phase
                    k = torch.complex(*inputs["k"][m, h // 2].chunk(2))
                    scores.append((q * k.conj()).real.sum() / 4)
                if scores:
                    weights = torch.stack(scores).softmax(0)
                    wanted = weights @ inputs["v"][start:end, h // 2]
                    torch.testing.assert_close(out[b, n, h], wanted)
                    torch.testing.assert_close(lse[b, n, h], torch.stack(scores).logsumexp(0))


@pytest.mark.parametrize("starts", [None, (0, 32)])
def test_memory_rows_outside_all_spans_may_hold_anything(starts):
    inputs, rest = make_inputs(2, 3, spans="prompt", starts=starts)
    inputs["spans"] = torch.tensor([[[8, 40]], [[20, 20]]], device=DEVICE)
    spoilt = {name: inputs[name].clone() for name in ("k", "v")}
    for x in spoilt.values():
        x[:8] = x[40:] = math.nan
    for attend in ways(rest):
        assert torch.equal(attend(**inputs | spoilt), attend(**inputs))


@pytest.mark.parametrize(
    ("N", "tile"), [(3, 16), (3, 64), (18, 64)], ids=["scales", "a scale a block", "a prompt"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_memory(dtype, N, tile):
    """Images and spans start anywhere in a tile; queries have very different magnitudes."""
    starts = (0, 32) if tile == 16 else (0, 100)
    inputs, rest = make_inputs(2, N, 2, 1, 32, 4 * tile, "token", starts, dtype=dtype)
    inputs["q"][0] *= 2000
    inputs["q"][1, 0] = 0
    factors = torch.rand(2, 4, 1, device=DEVICE) + 0.5
    factors[:, 1] *= 1e-3
    factors[1, 2] = 0
    scales = MemoryScales(*factors, tile=tile)
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    for name in ("k", "v"):
        inputs[name] = inputs[name].to(torch.float8_e4m3fn)
    exact = inputs | {
        name: inputs[name].double() * scale.double().repeat_interleave(tile, 0)[..., None]
        for name, scale in (("k", scales.keys), ("v", scales.values))
    }
    rounded = reference.attend_spans(
        **{name: x if name == "spans" else x.to(dtype) for name, x in exact.items()},
        rotation=rotation,
    )
    exact["q"] = exact["q"].double()
    turned = rotation._replace(cos=rotation.cos.double(), sin=rotation.sin.double())
    truth = reference.attend_spans(**exact, rotation=turned)
    for attend in (attend_spans, reference.attend_spans):
        out = attend(**inputs, rotation=rotation, scales=scales)
        assert_errs_no_more(out, rounded, truth)


# --- laws ---


@pytest.mark.parametrize("N", [1, 20])
def test_a_row_alone_is_the_row_in_a_batch(N):
    inputs, rest = make_inputs(3, N, 2, 1, 16, 150, "prompt", (0, 50, 100))
    inputs["spans"] = torch.tensor([[[0, 50]], [[50, 100]], [[100, 150]]], device=DEVICE)
    attend = ways(rest)[0]
    whole = attend(**inputs)
    for b in range(3):
        row = rest | {"positions": rest["positions"][b : b + 1]}
        alone = ways(row)[0](**inputs | {name: inputs[name][b : b + 1] for name in ("q", "spans")})
        torch.testing.assert_close(alone[0], whole[b])


def test_keys_of_other_rows_do_not_reach_a_row():
    """Not even NaN keys outside its span reach a row."""
    inputs, rest = make_inputs(2, 1, 2, 1, 16, 96, "prompt", (0, 50))
    inputs["spans"] = torch.tensor([[[0, 50]], [[50, 96]]], device=DEVICE)
    attend = ways(rest)[0]
    clean = attend(**inputs)
    inputs["k"][50:] = math.nan
    inputs["v"][50:] = 0  # as `build_memory` writes them for NaN keys
    out = attend(**inputs)
    torch.testing.assert_close(out[0], clean[0])
    assert out[1].isnan().all()


@pytest.mark.parametrize("tile", [16, 64])
def test_scales_of_other_rows_do_not_reach_a_row(tile):
    """Between the spans of a block's rows: NaN keys, and tiles that were never written."""
    inputs, rest = make_inputs(2, 1, 2, 1, 16, 4 * tile, "prompt", (0,), dtype=torch.bfloat16)
    inputs["spans"] = torch.tensor([[[0, tile + 5]], [[3 * tile, 4 * tile]]], device=DEVICE)
    for name in ("k", "v"):
        inputs[name] = inputs[name].to(torch.float8_e4m3fn)
    scales = MemoryScales(*(torch.rand(2, 4, 1, device=DEVICE) + 0.5), tile=tile)
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    clean = attend_spans(**inputs, rotation=rotation, scales=scales)
    scales.keys[2], scales.values[2] = math.nan, 0
    out = attend_spans(**inputs, rotation=rotation, scales=scales)
    torch.testing.assert_close(out, clean)


def test_order_of_images_is_irrelevant():
    inputs, rest = make_inputs(1, 3, 2, 1, 16, 80, "prompt", (0, 32))
    inputs["spans"][:] = torch.tensor([0, 80])
    there = ways(rest)[0](**inputs)
    order = torch.cat([torch.arange(32, 80), torch.arange(32)]).to(DEVICE)
    swapped = rest | {
        "starts": torch.tensor([0, 48], dtype=torch.int32, device=DEVICE),
        "biases": rest["biases"].flip(1),
    }
    inputs |= {name: inputs[name][order] for name in ("k", "v")}
    torch.testing.assert_close(ways(swapped)[0](**inputs), there)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_relative_keys_match_absolute_keys(dtype):
    """Keys rotated by index in the image and shifted queries; keys rotated by ids in the prompt."""
    inputs, rest = make_inputs(1, 5, 2, 1, 32, 64, "prompt", (0, 24), dtype=dtype)
    inputs["spans"][:] = torch.tensor([0, 64])
    cos, sin = inputs["cos"], inputs["sin"]
    raw, place = inputs.pop("k"), torch.arange(64, device=DEVICE) % 24
    bias = rest["biases"][0, (torch.arange(64, device=DEVICE) >= 24).long()]

    def keys(ids, like):
        return reference.attention_groups.rotate_by_distance(raw.to(like), ids, cos, sin)

    exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    absolute = rest | {"starts": None, "biases": None}
    truth = ways(absolute)[1](**exact, k=keys(place + bias, torch.float64))
    errors = [
        (ways(how)[0](**inputs, k=keys(ids, dtype)).double() - truth).abs().mean().item()
        for how, ids in ((rest, place), (absolute, place + bias))
    ]
    floor = torch.finfo(dtype).eps * truth.abs().mean().item()
    assert errors[0] <= 2 * errors[1] + floor


def test_a_distance_beyond_the_table_is_nan():
    inputs, rest = make_inputs(1, 2, 2, 1, 16, 40, "prompt", (0,))
    inputs["spans"][:] = torch.tensor([0, 40])
    rest["biases"][:] = 0
    rest["positions"] = torch.tensor([[5, 90]], device=DEVICE)
    out = ways(rest)[0](**inputs)
    assert out[0, 0].isfinite().all()
    assert out[0, 1].isnan().all()


def test_queries_before_an_image():
    inputs, rest = make_inputs(1, 4, 2, 1, 16, 40, "prompt", (0,))
    inputs["spans"][:] = torch.tensor([0, 40])
    rest["biases"][:] = 30
    rest["positions"] = torch.tensor([[0, 29, 30, 31]], device=DEVICE)
    check(inputs, rest)


@pytest.mark.kernel
def test_spans_outside_the_memory_read_nothing_there():
    q, k = torch.randn(1, 2, 1, 16, device=DEVICE), torch.randn(200, 1, 16, device=DEVICE)
    inside = k[100:140]
    spans = torch.tensor([[[-50, 20], [30, 90]]], device=DEVICE)
    clamped = torch.tensor([[[0, 20], [30, 40]]], device=DEVICE)
    out = attend_spans(q, inside, inside, spans)
    torch.testing.assert_close(out, attend_spans(q, inside, inside, clamped))
    with pytest.raises(ValueError, match=r"must be in \[0, 40\], the memory, got -50 to 90"):
        attend_spans(q, inside, inside, spans, validate=True)


# --- layouts and gradients ---


def test_strided_inputs():
    inputs, rest = make_inputs(2, 3, 4, 2, 16, 70)
    kv = torch.stack([inputs["k"], inputs["v"]], 1)  # [M, 2, G, D]
    strided = inputs | {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": kv[:, 0],
        "v": kv[:, 1],
    }
    ours = ways(rest)[0]
    torch.testing.assert_close(ours(**strided), ours(**inputs))
    odd = torch.randn(2, 3, 4, 19, device=DEVICE)[..., :16].copy_(inputs["q"])
    torch.testing.assert_close(ours(**strided | {"q": odd}), ours(**inputs))


def test_gradients():
    inputs, rest = make_inputs(2, 2, 2, 1, 4, 9, "token", (0, 4), P=20)
    inputs["spans"][0, 0] = 3  # an empty span, no gradient
    leaves = [inputs.pop(name).double().requires_grad_() for name in ("q", "k", "v")]
    inputs |= {name: inputs[name].double() for name in ("cos", "sin")}

    def attend(q, k, v):
        return ways(rest)[1](q=q, k=k, v=v, **inputs)

    assert gradcheck(attend, leaves)
    (gradient,) = torch.autograd.grad(attend(*leaves).sum(), leaves[:1])
    assert (gradient[0, 0] == 0).all()
