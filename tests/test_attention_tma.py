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
TMA = {"plain": 0, "small": 1}  # index of the configuration


@DESCRIPTORS
@pytest.mark.kernel
@pytest.mark.parametrize(
    ("config", "starts", "dtype"),
    [
        pytest.param(config, starts, torch.bfloat16, marks=() if config == "plain" else SLOW)
        for config in TMA
        for starts in ((0,), (0, 90, 170))
    ]
    + [("plain", None, torch.float16), ("plain", (), torch.bfloat16)],
    ids=str,
)
def test_descriptors_match_the_reference(monkeypatch, config, starts, dtype):
    several = len(starts or ()) > 1
    B, splits = (1, 3) if config == "small" else (2, 1)
    inputs, rest = make_inputs(B, 72, 2, 1, 64, 300, "prompt", starts, B, dtype=dtype)
    inputs["spans"] = torch.tensor([[[95, 298]], [[200, 300]]][:B], device=DEVICE)
    inputs["k"][:95] = math.nan  # neither read nor rotated
    launched = []
    launch = _attend_tma.launch
    monkeypatch.setattr(attention, "USE_TMA", True)
    monkeypatch.setattr(attention, "_choose_splits", lambda q, k: splits)
    monkeypatch.setattr(_attend_tma, "launch", lambda *args: launched.append(1) or launch(*args))
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    with _attend_tma.attend_tma.using(_attend_tma.attend_tma.configs[TMA[config]]):
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
@pytest.mark.parametrize(
    "change", ["float32", "tokens' spans", "split batch of images", "float8", "odd strides", "no"]
)
def test_calls_that_the_tma_kernel_does_not_support(change):
    B = 2 if change == "split batch of images" else 1
    spans = "token" if change == "tokens' spans" else "prompt"
    dtype = torch.float32 if change == "float32" else torch.bfloat16
    inputs, rest = make_inputs(B, 80, 2, 1, 64, 128, spans, dtype=dtype)
    if change == "odd strides":
        inputs["q"] = torch.cat([inputs["q"], inputs["q"]], -1)[..., 4:68]
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    scale = torch.ones(1, 1, device=DEVICE) if change == "float8" else None
    arguments = [inputs[n] for n in ("q", "k", "v", "spans", "cos", "sin")]
    arguments += [rest[n] for n in ("positions", "starts", "biases")]
    assert _attend_tma.fits(2, *arguments, scale) == (change == "no")
    assert _attend_tma.fits(1, *arguments, scale) == (change in ("no", "split batch of images"))


@DESCRIPTORS
@pytest.mark.gpu
@pytest.mark.parametrize("config", TMA)
def test_descriptors_give_the_same_bits(monkeypatch, config):
    """Must pass, with a race check, before a configuration may become the default."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for Hopper only")
    inputs, rest = make_inputs(
        1, 2048, 16, 16, 128, 3328, "prompt", (0,), P=4096, dtype=torch.bfloat16
    )
    inputs["spans"][:] = torch.tensor([0, 3328])
    plain = ways(rest)[0](**inputs)
    monkeypatch.setattr(attention, "USE_TMA", True)
    with _attend_tma.attend_tma.using(_attend_tma.attend_tma.configs[TMA[config]]):
        assert_repeats(lambda: ways(rest)[0](**inputs), plain)
