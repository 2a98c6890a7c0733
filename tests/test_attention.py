"""attend_spans: softmax(q k^T) v over spans, queries rotated on load."""

import math

import numpy as np
import pytest
import torch
from conftest import DEVICE, DTYPES, GPU, INTERPRET, TRACED, every_two
from harness import assert_errs_no_more, assert_matches, red_zones
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

pytest.importorskip("triton")

import triton
import triton.language as tl

from comemo_kernels import (
    AttentionWorkspace,
    MemoryScales,
    QueryRotation,
    attend_spans,
    attention_workspace,
    capture,
    reference,
    rotary_table,
)

pytestmark = pytest.mark.kernel(reference=True)

if INTERPRET or GPU:
    from comemo_kernels import _attend_tma, attention
    from comemo_kernels._blocks_attention import share_of


def make_inputs(
    B=2,
    N=3,
    H=2,
    G=1,
    D=16,
    M=70,
    spans="token",
    starts=(0, 32),
    biases=1,
    P=90,
    dtype=torch.float32,
    ids=torch.int64,
    device=DEVICE,
):
    """Arguments of `attend_spans`; `starts` None for queries that are rotated already."""
    g = torch.Generator().manual_seed(B * N + M + D)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    def integers(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=g).to(device, dtype)

    places = integers(0, M + 1, B, N if spans == "token" else 1, 2, dtype=ids)
    inputs = {
        "q": draw(B, N, H, D),
        "k": draw(M, G, D),
        "v": draw(M, G, D),
        "spans": places.sort(-1).values,
        "cos": None,
        "sin": None,
    }
    rest = {"positions": integers(0, P // 2, B, N, dtype=ids), "starts": None, "biases": None}
    if starts is not None:
        cos, sin = rotary_table(torch.arange(P, device=device)[None], D, theta=100.0)
        inputs |= {"cos": cos[0], "sin": sin[0]}
        if starts:
            rest["starts"] = torch.tensor(starts, dtype=torch.int32, device=device)
            rest["biases"] = integers(0, P // 2, biases, len(starts))
    return inputs, rest


def ways(rest, **kwargs):
    """The operation and its reference, as functions of the tensors that have a dtype."""

    def call(attend, q, k, v, spans, cos, sin):
        rotation = None if cos is None else QueryRotation(cos, sin, **rest)
        return attend(q, k, v, spans, rotation, **kwargs)

    return (
        lambda **inputs: call(attend_spans, **inputs),
        lambda **inputs: call(reference.attend_spans, **inputs),
    )


def check(inputs, rest, **kwargs):
    ours, theirs = ways(rest, **kwargs)
    assert_matches(ours, theirs, inputs)


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
    """Rows for attend_many, some blocks of keys with a mask and some without."""
    inputs, rest = make_inputs(2, 75, 2, 1, 32, 300, spans, starts, 2, dtype=dtype)
    if spans == "prompt":
        inputs["spans"] = torch.tensor([[[0, 128]], [[128, 300]]], device=DEVICE)
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


def test_the_reference_is_its_definition():
    """Softmax over a loop, in float64, every image's queries rotated by hand."""
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
                    turn = torch.polar(torch.ones_like(angle), angle * (1 if distance > 0 else -1))
                    q = torch.complex(*inputs["q"][b, n, h].chunk(2)) * turn
                    k = torch.complex(*inputs["k"][m, h // 2].chunk(2))
                    scores.append((q * k.conj()).real.sum() / 4)
                if scores:
                    weights = torch.stack(scores).softmax(0)
                    wanted = weights @ inputs["v"][start:end, h // 2]
                    torch.testing.assert_close(out[b, n, h], wanted)
                    torch.testing.assert_close(lse[b, n, h], torch.stack(scores).logsumexp(0))


@pytest.mark.parametrize("starts", [None, (0, 32)])
def test_rows_that_nobody_reads_may_hold_anything(starts):
    inputs, rest = make_inputs(2, 3, spans="prompt", starts=starts)
    inputs["spans"] = torch.tensor([[[8, 40]], [[20, 20]]], device=DEVICE)
    spoilt = {name: inputs[name].clone() for name in ("k", "v")}
    for x in spoilt.values():
        x[:8] = x[40:] = math.nan
    for attend in ways(rest):
        assert torch.equal(attend(**inputs | spoilt), attend(**inputs))


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_every_configuration_and_split(rows):
    inputs, rest = make_inputs(rows, 1, 2, 1, 32, 400, "prompt", (0, 256, 300))
    inputs = {n: t if n == "spans" or t is None else t.half() for n, t in inputs.items()}
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    wanted = reference.attend_spans(**inputs, rotation=rotation)
    kernel = attention._kernel_for(torch.float16, 2 * rows)
    # What L2 is asked for, and when a launch begins, is nothing to the interpreter.
    hidden = {"AHEAD", "EARLY"} if INTERPRET else set()
    distinct = {str({n: v for n, v in c.items() if n not in hidden}): c for c in kernel.configs}
    for config in distinct.values():
        with kernel.using(config):
            for splits in (1, 3, 64) if rows == 1 else (1, 7):
                workspace = attention_workspace(inputs["q"], inputs["k"], splits)
                for tensor in workspace[:-1]:
                    tensor.fill_(math.nan) if splits > 1 else None
                for _ in range(2):  # a workspace is left as it was found
                    out = attend_spans(**inputs, rotation=rotation, workspace=workspace)
                    assert out is workspace.out
                    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=2e-3)
                assert not workspace.counts.any()


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRET, reason="only the interpreter's pointers can be seen")
@pytest.mark.parametrize("span", [(0, 300), (70, 290), (300, 300)])
def test_what_is_asked_for_ahead_is_there(monkeypatch, span):
    """Each line of 128 bytes of every key and value of a span, once, and nothing else."""
    inputs, rest = make_inputs(1, 1, 2, 2, 128, 300, "prompt", (0,), dtype=torch.float16)
    inputs["spans"][:] = torch.tensor(span)
    asked = []

    def prefetch(ptrs, mask):
        there = np.broadcast_to(mask.handle.data, ptrs.handle.data.shape)
        asked.extend(ptrs.handle.data[there.astype(bool)])

    monkeypatch.setattr(attention, "prefetch", prefetch)
    config = next(config for config in attention.attend_one.configs if config["AHEAD"])
    with attention.attend_one.using(config):
        monkeypatch.setattr(attention, "_choose_splits", lambda q, k: 2)
        ways(rest)[0](**inputs)
    wanted = {
        inputs[name].data_ptr() + ((key * 2 + head) * 128 + line * 64) * 2
        for name in ("k", "v")
        for key in range(*span)
        for head in range(2)
        for line in range(2)
    }
    assert {int(address) for address in asked} == wanted
    assert len(asked) == len(wanted)


@pytest.mark.kernel
def test_shapes_decide_the_splits():
    """Every multiprocessor has work, and no split is left without two blocks of keys."""

    def splits(B, N, H, M):
        q = torch.empty(B, N, H, 128, dtype=torch.float16, device=DEVICE)
        return attention._choose_splits(q, torch.empty(M, H, 128, device=DEVICE))

    sms = attention.multiprocessors(torch.empty(0, device=DEVICE).get_device())
    assert splits(1, 1, 16, 3328) == {132: 13}.get(sms, splits(1, 1, 16, 3328)), (
        "52 blocks, 16 slots"
    )
    assert splits(1, 1, 16, 3328) <= min(2 * sms // 16, 26)
    assert splits(1, 1, 16, 256) == 2
    assert splits(1, 8192, 16, 13312) == 1
    assert splits(1, 300, 16, 13312) == sms // 48
    assert splits(1, 1, 1, 2**20) == attention.MAX_SPLITS


@triton.jit
def share_keys(bounds_ptr, low, high, num_splits, BLOCK: tl.constexpr):
    split = tl.program_id(0)
    first, last = share_of(low, high, split, num_splits, BLOCK)
    tl.store(bounds_ptr + 2 * split, first)
    tl.store(bounds_ptr + 2 * split + 1, last)


@pytest.mark.kernel
@pytest.mark.skipif(not (GPU or INTERPRET), reason="needs the interpreter or a GPU")
@pytest.mark.parametrize(
    ("low", "high", "splits"),
    [(0, 3328, 13), (0, 3328, 16), (70, 200, 3), (5, 6, 4), (9, 9, 2), (40, 0, 3), (0, 64, 1)],
)
def test_splits_share_whole_blocks_evenly(low, high, splits):
    bounds = torch.full((splits, 2), -1, dtype=torch.int32, device=DEVICE)
    share_keys[(splits, 1, 1)](bounds, low, high, splits, BLOCK=64)
    shares = [range(first, last) for first, last in bounds.tolist()]
    assert [key for share in shares for key in share] == list(range(low, high))
    blocks = [-(-len(share) // 64) for share in shares]
    assert max(blocks) - min(blocks) <= 1
    assert all(len(share) % 64 == 0 or share.stop == high for share in shares)


@pytest.mark.parametrize(
    ("N", "tile"), [(3, 16), (3, 64), (18, 64)], ids=["scales", "a scale a block", "a prompt"]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float8_memory(dtype, N, tile):
    """Images and spans begin anywhere in a tile; a row of queries may be of any size."""
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


@pytest.mark.parametrize("N", [1, 40])
def test_a_row_alone_is_the_row_in_a_batch(N):
    inputs, rest = make_inputs(3, N, 2, 1, 16, 150, "prompt", (0, 50, 100))
    inputs["spans"] = torch.tensor([[[0, 50]], [[50, 100]], [[100, 150]]], device=DEVICE)
    attend = ways(rest)[0]
    whole = attend(**inputs)
    for b in range(3):
        row = rest | {"positions": rest["positions"][b : b + 1]}
        alone = ways(row)[0](**inputs | {name: inputs[name][b : b + 1] for name in ("q", "spans")})
        torch.testing.assert_close(alone[0], whole[b])


def test_a_row_is_blind_to_others_keys():
    """What a row may not read cannot reach it, not even NaN among the keys."""
    inputs, rest = make_inputs(2, 1, 2, 1, 16, 96, "prompt", (0, 50))
    inputs["spans"] = torch.tensor([[[0, 50]], [[50, 96]]], device=DEVICE)
    attend = ways(rest)[0]
    clean = attend(**inputs)
    inputs["k"][50:] = math.nan
    inputs["v"][50:] = 0  # as `build_memory` writes them then
    out = attend(**inputs)
    torch.testing.assert_close(out[0], clean[0])
    assert out[1].isnan().all()


@pytest.mark.parametrize("tile", [16, 64])
def test_a_row_is_blind_to_others_scales(tile):
    """What lies between the spans of a block's rows: keys of NaN, and tiles never written."""
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
def test_position_free_is_absolute(dtype):
    """Keys at their place in the image and shifted queries; keys at their ids in the prompt."""
    inputs, rest = make_inputs(1, 5, 2, 1, 32, 64, "prompt", (0, 24), dtype=dtype)
    inputs["spans"][:] = torch.tensor([0, 64])
    cos, sin = inputs["cos"], inputs["sin"]
    raw, place = inputs.pop("k"), torch.arange(64, device=DEVICE) % 24
    bias = rest["biases"][0, (torch.arange(64, device=DEVICE) >= 24).long()]

    def keys(ids, like):
        return reference.attention.turn(raw.to(like), ids, cos, sin)

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


def test_queries_ahead_of_an_image():
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
    with pytest.raises(ValueError, match=r"must lie in \[0, 40\], the memory, got -50 to 90"):
        attend_spans(q, inside, inside, spans, validate=True)


# --- by tensor descriptors ---

DESCRIPTORS = pytest.mark.skipif(
    not hasattr(tl, "make_tensor_descriptor"), reason="triton below 3.4 makes none in a kernel"
)

TMA = {"plain": 0, "small": 1, "specialised": 2}  # of the configurations


@DESCRIPTORS
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("config", "starts", "dtype"),
    [
        *((config, starts, torch.bfloat16) for config in TMA for starts in ((0,), (0, 90, 170))),
        ("plain", None, torch.float16),
        ("plain", (), torch.bfloat16),
    ],
    ids=str,
)
def test_descriptors_match_the_reference(monkeypatch, config, starts, dtype):
    several = len(starts or ()) > 1
    B, splits = (1, 3) if config == "small" else (2, 1)
    inputs, rest = make_inputs(B, 72, 2, 1, 64, 300, "prompt", starts, B, dtype=dtype)
    inputs["spans"] = torch.tensor([[[95, 298]], [[200, 300]]][:B], device=DEVICE)
    inputs["k"][:95] = math.nan  # not read, and not turned
    launched = []
    launch = _attend_tma.launch
    monkeypatch.setattr(attention, "USE_TMA", True)
    monkeypatch.setattr(attention, "_choose_splits", lambda q, k: splits)
    monkeypatch.setattr(_attend_tma, "launch", lambda *args: launched.append(1) or launch(*args))
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper alone")
    with _attend_tma.attend_tma.using(_attend_tma.attend_tma.configs[TMA[config]]):
        check(inputs, rest)
        assert launched
        if several:  # only distances count: ids may lie far behind the table
            far = {name: rest[name] + 100_000 for name in ("positions", "biases")}
            there = [ways(how)[0](**inputs) for how in (rest, rest | far)]
            torch.testing.assert_close(*there, rtol=0, atol=0)
        inputs["spans"][-1] = 300  # an empty span behind the last key
        inputs["v"][-1] = math.nan
        out, lse = ways(rest, return_lse=True)[0](**inputs)
    assert (out[-1] == 0).all()
    assert (lse[-1] == -math.inf).all()


@DESCRIPTORS
@pytest.mark.kernel
@pytest.mark.parametrize(
    "change", ["float32", "tokens' spans", "split batch of images", "float8", "odd strides", "no"]
)
def test_what_descriptors_do_not_take(change):
    B = 2 if change == "split batch of images" else 1
    inputs, rest = make_inputs(
        *(B, 80, 2, 1, 64, 128, "token" if change == "tokens' spans" else "prompt"),
        dtype=torch.float32 if change == "float32" else torch.bfloat16,
    )
    if change == "odd strides":
        inputs["q"] = torch.cat([inputs["q"], inputs["q"]], -1)[..., 4:68]
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper alone")
    scale = torch.ones(1, 1, device=DEVICE) if change == "float8" else None
    arguments = [inputs[n] for n in ("q", "k", "v", "spans", "cos", "sin")]
    arguments += [rest[n] for n in ("positions", "starts", "biases")]
    assert _attend_tma.fits(2, *arguments, scale) == (change == "no")
    assert _attend_tma.fits(1, *arguments, scale) == (change in ("no", "split batch of images"))


@DESCRIPTORS
@pytest.mark.gpu
def test_descriptors_give_the_same_bits(monkeypatch):
    """What has to pass, with a race check, before a configuration may come first."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper alone")
    inputs, rest = make_inputs(
        1, 2048, 16, 16, 128, 3328, "prompt", (0,), P=4096, dtype=torch.bfloat16
    )
    inputs["spans"][:] = torch.tensor([0, 3328])
    plain = ways(rest)[0](**inputs)
    monkeypatch.setattr(attention, "USE_TMA", True)
    for config in _attend_tma.attend_tma.configs:
        with _attend_tma.attend_tma.using(config):
            assert_repeats(lambda: ways(rest)[0](**inputs), plain)


@pytest.mark.gpu
def test_a_decode_step_gives_the_same_bits():
    """Of every configuration: some lean on the order of memory accesses, or of launches."""
    inputs, rest = make_inputs(
        1, 1, 16, 16, 128, 3328, "prompt", (0,), P=4096, dtype=torch.bfloat16
    )
    inputs["spans"][:] = torch.tensor([0, 3328])
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    plain = attend_spans(**inputs, rotation=rotation)
    for config in attention.attend_one.configs:
        with attention.attend_one.using(config):
            room = attention_workspace(inputs["q"], inputs["k"])
            assert_repeats(
                lambda room=room: attend_spans(**inputs, rotation=rotation, workspace=room), plain
            )


def assert_repeats(call, plain):
    """A call gives what another way does, and the same bits 1,000 times."""
    first = call().clone()
    torch.testing.assert_close(first, plain, atol=2e-2, rtol=2e-2)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        same &= (call() == first).all()
    assert same


# --- layouts, gradients, operator ---


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
    inputs["spans"][0, 0] = 3  # nothing seen, no gradient
    leaves = [inputs.pop(name).double().requires_grad_() for name in ("q", "k", "v")]
    inputs |= {name: inputs[name].double() for name in ("cos", "sin")}

    def attend(q, k, v):
        return ways(rest)[0](q=q, k=k, v=v, **inputs)

    assert gradcheck(attend, leaves)
    (gradient,) = torch.autograd.grad(attend(*leaves).sum(), leaves[:1])
    assert (gradient[0, 0] == 0).all()


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    for starts in (None, (0, 32)):
        inputs, rest = make_inputs(starts=starts, dtype=torch.float16, device=real_device)
        rotation = [inputs["cos"], inputs["sin"]]
        rotation += [rest[n] if starts else None for n in ("positions", "starts", "biases")]
        arguments = [inputs[n] for n in ("q", "k", "v", "spans")] + [*rotation, None, None, 1]
        torch.library.opcheck(attention._attend, arguments)
        workspace = attention_workspace(inputs["q"], inputs["k"], 2)
        torch.library.opcheck(attention._attend_, [*workspace, *arguments])


@pytest.mark.kernel
def test_a_written_workspace_gets_a_new_version():
    inputs, rest = make_inputs()
    workspace = attention_workspace(inputs["q"], inputs["k"])
    before = workspace.out._version
    ways(rest, workspace=workspace)[0](**inputs)
    assert workspace.out._version > before


@TRACED
def test_compiles_whole_for_any_length(real_device):
    counted = []

    def backend(graph, _):
        counted.append(graph)
        return graph.forward

    compiled = torch.compile(ways_compiled, fullgraph=True, backend=backend, dynamic=True)
    for N, M in ((3, 64), (5, 96), (9, 70), (4, 33)):
        inputs, rest = make_inputs(2, N, 2, 1, 16, M, "prompt", (0, 32), device=real_device)
        arguments = (*inputs.values(), *rest.values())
        torch.testing.assert_close(compiled(*arguments), ways_compiled(*arguments))
    assert len(counted) == 1


def ways_compiled(q, k, v, spans, cos, sin, positions, starts, biases):
    return attend_spans(q, k, v, spans, QueryRotation(cos, sin, positions, starts, biases))


@pytest.mark.gpu
def test_a_captured_step_replays_with_other_lengths():
    """Fixed grid, no allocation, no wait: what a CUDA graph of a decode step needs."""
    inputs, rest = make_inputs(2, 1, 16, 16, 128, 2048, "prompt", (0, 1024), dtype=torch.bfloat16)
    workspace = attention_workspace(inputs["q"], inputs["k"])
    attend = ways(rest, workspace=workspace)[0]
    attend(**inputs)
    held = torch.cuda.memory_allocated()
    replay = capture(lambda: attend(**inputs), DEVICE)
    assert torch.cuda.memory_allocated() == held
    for spans in ([[0, 1024], [1024, 2048]], [[0, 256], [0, 0]], [[512, 513], [100, 2000]]):
        inputs["spans"].copy_(torch.tensor(spans, device=DEVICE)[:, None])
        rest["positions"].add_(1)
        workspace.out.fill_(math.nan)
        replay()
        replayed = workspace.out.clone()
        assert torch.equal(replayed, attend(**inputs))
        torch.testing.assert_close(replayed, ways(rest)[1](**inputs), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_the_same_bits_every_time():
    """Every configuration, the fused ones above all: 1,000 repeats."""
    for B in (1, 8):
        inputs, rest = make_inputs(B, 1, 16, 16, 128, 3328, "prompt", (0,), dtype=torch.bfloat16)
        kernel = attention._kernel_for(torch.bfloat16, B)
        for config in kernel.configs:
            with kernel.using(config):
                workspace = attention_workspace(inputs["q"], inputs["k"])
                attend = ways(rest, workspace=workspace)[0]
                first = attend(**inputs).clone()
                torch.testing.assert_close(first, ways(rest)[1](**inputs), atol=2e-2, rtol=2e-2)
                same = torch.ones((), dtype=torch.bool, device=DEVICE)
                for _ in range(1000):
                    workspace.out.fill_(math.nan)
                    same &= (attend(**inputs) == first).all()
                assert same, config


# --- errors ---


def test_says_what_is_wrong():
    inputs, rest = make_inputs()
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)

    def wrong(message, *, rotation=rotation, **changes):
        with pytest.raises(ValueError, match=message):
            attend_spans(**inputs | changes, rotation=rotation)

    q, k, spans = inputs["q"], inputs["k"], inputs["spans"]
    wrong(r"q must be \[B, N, H, D\]", q=q[0])
    wrong("with G dividing 2", k=k.expand(-1, 3, -1), v=k.expand(-1, 3, -1))
    wrong("of one dtype", v=inputs["v"].half())
    wrong("k and v must be of torch.float32 as q", k=k.half(), v=k.half())
    wrong(r"spans must be .* \(2, 3, 2\) or \(2, 1, 2\)", spans=spans[:, :2])
    wrong("spans must be int32 or int64", spans=spans.float())
    wrong("with R at most 16", rotation=rotation._replace(cos=torch.ones(9, 9)))
    wrong("rotation.positions must be", rotation=rotation._replace(positions=spans))
    wrong("or both None, got torch.int32", rotation=rotation._replace(biases=None))
    wrong("or both None", rotation=rotation._replace(biases=rotation.biases[:, :1]))
    scales = MemoryScales(torch.ones(5, 1), torch.ones(5, 1), 16)
    wrong("or of torch.float8_e4m3fn with scales", scales=scales)
    eight = {"k": k.to(torch.float8_e4m3fn), "v": k.to(torch.float8_e4m3fn)}
    wrong("got torch.float8_e4m3fn without scales", **eight)
    wrong("for 70 rows in tiles of 32", **eight, scales=scales._replace(tile=32))
    for starts in ([1, 32], [0, 0], [32, 0]):
        wrong(
            "must ascend from 0",
            rotation=rotation._replace(starts=torch.tensor(starts, dtype=torch.int32).to(DEVICE)),
            validate=True,
        )
    with pytest.raises(ValueError, match="the workspace must be that of attention_workspace for"):
        attend_spans(**inputs, workspace=attention_workspace(q[:1], k))
    workspace = attention_workspace(q, k, 2)
    for wrong_part in (
        {"lse": workspace.lse[:1]},
        {"lse": workspace.lse.double()},
        {"counts": workspace.counts.float()},
        *([{"counts": workspace.counts[:1]}] if INTERPRET or GPU else []),
    ):
        with pytest.raises(ValueError, match="the workspace must be that of attention_workspace"):
            attend_spans(**inputs, workspace=workspace._replace(**wrong_part))
    with pytest.raises(ValueError, match="splits must be an integer from 1 to 65536, got 0"):
        attention_workspace(q, k, 0)
    with pytest.raises(ValueError, match="with G dividing H"):
        attention_workspace(q, k.expand(-1, 3, -1))


@pytest.mark.kernel
def test_says_what_a_kernel_cannot_do():
    inputs, rest = make_inputs()
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    for message, changes in (
        ("float64 has no kernel", {n: inputs[n].double() for n in ("q", "k", "v")}),
        ("D must be contiguous", {"q": inputs["q"].transpose(2, 3).contiguous().transpose(2, 3)}),
        ("one layout", {"v": inputs["v"].repeat(1, 2, 1)[:, :1]}),
        (
            "start and end of a span must be adjacent",
            {"spans": inputs["spans"].transpose(1, 2).contiguous().transpose(1, 2)},
        ),
        (
            "the whole head must be rotated, got 8 of 16",
            {
                "rotation": rotation._replace(
                    cos=rotation.cos[:, :4].contiguous(), sin=rotation.sin[:, :4].contiguous()
                )
            },
        ),
    ):
        with pytest.raises(ValueError, match=f"on a GPU .*{message}"):
            attend_spans(**{**inputs, "rotation": rotation, **changes})
    inputs["q"].requires_grad_()
    workspace = attention_workspace(inputs["q"], inputs["k"])
    with pytest.raises(ValueError, match="a workspace excludes gradients"):
        attend_spans(**inputs, workspace=workspace)
    assert isinstance(workspace, AttentionWorkspace)
