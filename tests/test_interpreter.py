"""bfloat16 and float8_e4m3fn of the interpreter against PyTorch."""

import conftest
import interpreter
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(conftest.NO_BFLOAT16 is not None, reason=str(conftest.NO_BFLOAT16)),
]
interpreted = pytest.mark.skipif(not conftest.INTERPRET, reason="of the interpreter itself")
NARROW = [torch.bfloat16, torch.float8_e4m3fn]


@triton.jit
def _cast_kernel(y_ptr, x_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _compute_kernel(y_ptr, less_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    """Computes in the dtype of the operands, without a cast."""
    offs = tl.arange(0, BLOCK)
    a, b = tl.load(a_ptr + offs), tl.load(b_ptr + offs)
    tl.store(y_ptr + offs, tl.where(a < b, -a * b, tl.maximum(a + b, a - b)))
    tl.store(less_ptr + offs, a < b)


@triton.jit
def _dot_kernel(y_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    square = offs[:, None] * BLOCK + offs[None, :]
    a, b, acc = tl.load(a_ptr + square), tl.load(b_ptr + square), tl.load(y_ptr + square)
    tl.store(y_ptr + square, tl.dot(a, b, acc))


def cast(x, dtype):
    n = triton.next_power_of_2(x.numel())
    padded, y = x.new_zeros(n), torch.empty(n, device=x.device, dtype=dtype)
    padded[: x.numel()] = x
    _cast_kernel[1,](y, padded, BLOCK=n)
    return y[: x.numel()]


def bits(x):
    """The bits as integers: zeros keep their sign, and all NaN are the same."""
    whole = x.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[x.element_size()])
    return torch.where(x.float().isnan(), 1 << (8 * x.element_size() - 2) | 1, whole)


def around_ties(dtype):
    """Values of a dtype, the midpoints between neighbours, and the float32 next to both."""
    size = torch.finfo(dtype).bits
    every = torch.arange(2**size).to(torch.int16 if size == 16 else torch.uint8).view(dtype)
    values = every.float()[:: 7 if size == 16 else 1]
    values = values[values.isfinite()].sort().values
    middles = (values[1:] + values[:-1]) / 2
    if size == 16:  # next to each value, because only every seventh is taken
        middles = (values.view(torch.int32) + 0x8000).view(torch.float32)
    found = torch.cat([values, middles[middles.isfinite()]])
    up, down = (found.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))
    return torch.cat([found, up, down])


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_round_to_nearest_even(device, dtype):
    x = around_ties(dtype)
    if dtype == torch.float8_e4m3fn:
        x = x.clamp(-448, 448)  # PyTorch does not saturate
    assert torch.equal(bits(cast(x.to(device), dtype).cpu()), bits(x.to(dtype)))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_value_survives_a_cast_to_float32_and_back(device, dtype):
    size = torch.finfo(dtype).bits
    every = torch.arange(2**size).to(torch.int16 if size == 16 else torch.uint8).view(dtype)
    wide = cast(every.to(device), torch.float32)
    assert torch.equal(bits(wide.cpu()), bits(every.float()))
    assert torch.equal(bits(cast(wide, dtype).cpu()), bits(every))


def test_nan_infinity_and_overflow(device):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, -500.0])
    assert torch.equal(bits(cast(x.to(device), torch.bfloat16).cpu()), bits(x.bfloat16()))
    eight = cast(x.to(device), torch.float8_e4m3fn).cpu().float()
    assert eight[0].isnan()
    assert eight[1:].tolist() == [448, -448, 448, -448]


@pytest.mark.parametrize("other", [torch.float16, torch.float64, torch.int32], ids=str)
def test_casts_between_bfloat16_and_other_dtypes(device, other):
    x = torch.tensor([-3.0, 0.0, 1.0, 257.0, 259.0, 1000.0]).to(other)
    assert torch.equal(cast(x.to(device), torch.bfloat16).cpu(), x.bfloat16())
    assert torch.equal(cast(x.bfloat16().to(device), other).cpu(), x.bfloat16().to(other))


def test_a_float8_carry_increments_the_exponent(device):
    found = cast(torch.tensor([1.97, 15.6, 0.0155], device=device), torch.float8_e4m3fn)
    assert found.float().tolist() == [2.0, 16.0, 0.015625]


def test_elementwise_bfloat16(device):
    a, b = torch.randn(2, 64).bfloat16()
    y, less = torch.empty_like(a, device=device), torch.empty(64, device=device, dtype=torch.bool)
    _compute_kernel[1,](y, less, a.to(device), b.to(device), BLOCK=64)
    assert torch.equal(less.cpu(), a < b)
    assert torch.equal(y.cpu(), torch.where(a < b, -a * b, torch.maximum(a + b, a - b)))


def test_a_dot_of_bfloat16_accumulates_in_float32(device):
    a, b = torch.randn(2, 32, 32).bfloat16()
    # Integers: every product and sum is exact in float32, in any order.
    a, b = (8 * a).round(), (8 * b).round()
    y = torch.ones(32, 32, device=device)
    _dot_kernel[1,](y, a.to(device), b.to(device), BLOCK=32)
    assert torch.equal(y.cpu(), a.float() @ b.float() + 1)


@interpreted
def test_a_missing_function_of_triton_is_named(monkeypatch):
    monkeypatch.setattr(interpreter, "CASTING", ("cast_by_magic",))
    assert interpreter.correct() == "this Triton's interpreter has no cast_by_magic"


@interpreted
def test_speeding_up_twice_changes_nothing(monkeypatch):
    triton_ = interpreter.interpreter
    before = triton_._patch_lang, triton_.GridExecutor.__call__
    interpreter.speed_up()
    assert (triton_._patch_lang, triton_.GridExecutor.__call__) == before
    monkeypatch.delattr(triton_, "_patch_lang")
    interpreter.speed_up()
    assert triton_.GridExecutor.__call__ == before[1]


@interpreted
def test_correcting_twice_changes_nothing():
    builder = interpreter.interpreter.InterpreterBuilder
    before = [getattr(builder, name) for name in interpreter.COMPUTING]
    assert interpreter.correct() is None
    assert [getattr(builder, name) for name in interpreter.COMPUTING] == before
    assert np.array_equal(interpreter.round_to_bfloat16(np.float32([[1.0]])), [[0x3F80]])
