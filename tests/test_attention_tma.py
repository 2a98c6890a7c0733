"""The attention kernel with tensor descriptors (TMA)."""

import math

import pytest
import torch
from attention_inputs import assert_repeats, check, make_inputs, ways
from conftest import DEVICE, GPU, INTERPRET, SLOW

pytest.importorskip("triton")

import triton.language as tl

pytestmark = pytest.mark.kernel(reference=True)

if INTERPRET or GPU:
    from comemo_kernels import _attend_tma, attention

DESCRIPTORS = pytest.mark.skipif(
    not hasattr(tl, "make_tensor_descriptor"), reason="needs triton 3.4 or newer"
)
WIDTHS = (64, 128)  # keys of a block


def config_of(width):
    return next(c for c in _attend_tma.attend_tma.configs if c["BLOCK_N"] == width)


@DESCRIPTORS
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("width", "starts", "dtype"),
    [
        pytest.param(width, starts, torch.bfloat16, marks=() if width == 64 else SLOW)
        for width in WIDTHS
        for starts in ((0,), (0, 90, 170))
    ]
    + [(64, None, torch.float16), (64, (), torch.bfloat16)],
    ids=str,
)
def test_descriptors_match_the_reference(monkeypatch, width, starts, dtype):
    several = len(starts or ()) > 1
    B = 1 if width == 128 else 2
    inputs, rest = make_inputs(B, 72, 2, 1, 64, 300, "prompt", starts, B, dtype=dtype)
    inputs["spans"] = torch.tensor([[[95, 298]], [[200, 300]]][:B], device=DEVICE)
    inputs["k"][:95] = math.nan  # neither read nor rotated
    launched = []
    launch = _attend_tma.launch
    monkeypatch.setattr(attention, "USE_TMA", True)
    monkeypatch.setattr(attention, "_choose_splits", lambda q, k: 1)
    monkeypatch.setattr(_attend_tma, "launch", lambda *args: launched.append(1) or launch(*args))
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    with _attend_tma.attend_tma.using(config_of(width)):
        check(inputs, rest)
        assert launched
        if several:  # only distances matter: ids may be far beyond the table
            far = {name: rest[name] + 100_000 for name in ("positions", "biases")}
            there = [ways(how)[0](**inputs) for how in (rest, rest | far)]
            torch.testing.assert_close(*there, rtol=0, atol=0)
        inputs["spans"][-1] = 300  # an empty span after the last key
        inputs["v"][-1] = math.nan
        out, lse = ways(rest, return_lse=True)[0](**inputs)
    assert (out[-1] == 0).all()
    assert (lse[-1] == -math.inf).all()


@DESCRIPTORS
@pytest.mark.kernel
@pytest.mark.parametrize("change", ["float32", "tokens' spans", "float8", "odd strides", "no"])
def test_calls_that_the_tma_kernel_does_not_support(change):
    spans = "token" if change == "tokens' spans" else "prompt"
    dtype = torch.float32 if change == "float32" else torch.bfloat16
    inputs, rest = make_inputs(1, 80, 2, 1, 64, 128, spans, dtype=dtype)
    if change == "odd strides":
        inputs["q"] = torch.cat([inputs["q"], inputs["q"]], -1)[..., 4:68]
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    scale = torch.ones(1, 1, device=DEVICE) if change == "float8" else None
    arguments = [inputs[n] for n in ("q", "k", "v", "spans", "cos", "sin")]
    arguments += [rest[n] for n in ("positions", "starts", "biases")]
    assert _attend_tma.fits(*arguments, scale) == (change == "no")


@DESCRIPTORS
@pytest.mark.kernel
@pytest.mark.parametrize(("splits", "tokens"), [(1, 72), (2, 72), (1, 20)])
def test_only_whole_prompts_are_read_by_descriptors(monkeypatch, splits, tokens):
    """Split keys and few queries are read by pointers."""
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    inputs, rest = make_inputs(1, tokens, 2, 1, 64, 128, "prompt", dtype=torch.bfloat16)
    launched, launch = [], _attend_tma.launch
    monkeypatch.setattr(attention, "_choose_splits", lambda q, k: splits)
    monkeypatch.setattr(_attend_tma, "launch", lambda *args: launched.append(1) or launch(*args))
    ways(rest)[0](**inputs)
    assert bool(launched) == (splits == 1 and tokens == 72)


@DESCRIPTORS
@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_descriptors_give_the_same_bits(monkeypatch, width):
    """A configuration that does not must not be the default."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    inputs, rest = make_inputs(
        1, 2048, 16, 16, 128, 3328, "prompt", (0,), P=4096, dtype=torch.bfloat16
    )
    inputs["spans"][:] = torch.tensor([0, 3328])
    with monkeypatch.context() as patch:
        patch.setattr(attention, "USE_TMA", False)
        plain = ways(rest)[0](**inputs)
    with _attend_tma.attend_tma.using(config_of(width)):
        assert_repeats(lambda: ways(rest)[0](**inputs), plain)
