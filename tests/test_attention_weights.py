"""span_weights: a softmax in float64; what a row holds; its errors."""

import math

import pytest
import torch
import valid_calls as valid
from attention_inputs import make_inputs
from conftest import DEVICE, DTYPES, every_two
from harness import red_zones
from odd import refuses

pytest.importorskip("triton")

from comemo_kernels import MemoryScales, QueryRotation, attend_spans, span_weights

pytestmark = pytest.mark.kernel(reference=True)
FLOAT8 = torch.float8_e4m3fn
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def weights_of(inputs, rest, scales=None):
    """From the log-sum-exp of the operation, as a caller gets it."""
    cos, sin = (inputs[name] for name in ("cos", "sin"))
    rotation = None if cos is None else QueryRotation(cos, sin, **rest)
    q, k, v, spans = (inputs[name] for name in ("q", "k", "v", "spans"))
    _, lse = attend_spans(q, k, v, spans, rotation, scales, return_lse=True)
    with red_zones():
        return span_weights(q, k, lse, spans, rotation, scales)


def defined(inputs, rest, k):
    """Token by token, in float64 with complex rotations by angles."""
    q, spans = inputs["q"].double(), inputs["spans"]
    (B, N, H, D), (M, G) = q.shape, k.shape[:2]
    spans, starts = spans.expand(B, N, 2).tolist(), rest["starts"]
    starts = [0] if starts is None else starts.tolist()
    image = (torch.tensor(starts or [0])[None] <= torch.arange(M)[:, None]).sum(1) - 1
    keys = torch.complex(*k.double().cpu().chunk(2, -1)).repeat_interleave(H // G, 1).conj()
    table = None
    if inputs["cos"] is not None:
        table = torch.atan2(inputs["sin"].double(), inputs["cos"].double()).cpu()
    found = torch.zeros(B, N, M, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            start, end = spans[b][n]
            angles = torch.zeros(M, 1, D // 2, dtype=torch.float64)
            if table is not None:
                distance = rest["positions"][b, n].cpu().expand(M)
                if rest["biases"] is not None and starts:
                    distance = distance - rest["biases"][b].cpu()[image]
                angles = (table[distance.abs()] * distance.sign()[:, None])[:, None]
            turned = torch.complex(*q[b, n].cpu().chunk(2, -1)) * torch.exp(1j * angles)
            scores = (turned * keys).real.sum(-1)
            found[b, n, start:end] = (scores[start:end] / math.sqrt(D)).softmax(0).mean(1)
    return found


@pytest.mark.parametrize(
    ("starts", "spans", "dtype"),
    every_two([None, (), (0,), (0, 32, 50)], ["token", "prompt"], DTYPES),
)
def test_it_is_a_softmax(starts, spans, dtype):
    """Several images, two query heads for a key head, 19 tokens: more than a block of rows."""
    inputs, rest = make_inputs(2, 19, 4, 2, 16, 70, spans, starts, 2, dtype=dtype)
    inputs["spans"][0, 0] = 40  # an empty span
    weights = weights_of(inputs, rest)
    assert weights.dtype == torch.float32
    wanted = defined(inputs, rest, inputs["k"])
    # Half precision rounds the rotated queries and, on a CPU, the scores that lse sums up.
    bound = 1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert ((weights.cpu() - wanted).abs() / wanted.clamp(min=1e-3)).max() < bound
    place, bounds = torch.arange(70, device=DEVICE), inputs["spans"].expand(2, -1, 2)
    outside = (place < bounds[..., :1]) | (place >= bounds[..., 1:])
    assert (weights[outside.expand_as(weights)] == 0).all()
    sums = (bounds[..., 1] > bounds[..., 0]).float().expand(2, 19)
    torch.testing.assert_close(weights.sum(-1), sums, atol=bound, rtol=0)
    assert (sums == 0).any()


def test_a_float8_memory():
    """Its keys times the scales of their tiles; spans and images begin anywhere in a tile."""
    inputs, rest = make_inputs(2, 3, 4, 2, 16, 64, "token", (0, 40), 2)
    factors = torch.rand(2, 4, 2, device=DEVICE) + 0.5
    inputs |= {name: inputs[name].to(FLOAT8) for name in ("k", "v")}
    weights = weights_of(inputs, rest, MemoryScales(*factors, tile=16))
    keys = inputs["k"].double() * factors[0].double().repeat_interleave(16, 0)[..., None]
    torch.testing.assert_close(weights.cpu().double(), defined(inputs, rest, keys), **CLOSE)


def test_rows_that_nobody_reads_may_hold_anything():
    inputs, rest = make_inputs(1, 3, spans="prompt", starts=(0, 32))
    inputs["spans"] = torch.tensor([[[8, 40]]], device=DEVICE)
    weights = weights_of(inputs, rest)
    inputs["k"][:8] = inputs["k"][40:] = math.nan
    assert torch.equal(weights_of(inputs, rest), weights)


def test_it_has_no_gradient():
    inputs, rest = make_inputs(1, 2, starts=None)
    inputs["q"].requires_grad_()
    assert not weights_of(inputs, rest).requires_grad


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lse": torch.zeros(1, 2, 3, device=DEVICE)}, r"lse must be float32 or .* \(1, 2, 2\)"),
        ({"lse": torch.zeros(1, 2, 2, dtype=torch.int32, device=DEVICE)}, "lse must be float32"),
        ({"spans": torch.tensor([[[0, 9]]], device=DEVICE)}, r".*spans must be in \[0, 8\]"),
        ({"k": torch.zeros(8, 3, 16, device=DEVICE)}, ".*k and v must be"),
    ],
)
def test_says_what_is_wrong(change, told):
    refuses(span_weights, valid.weighed(DEVICE) | change, told=told)
