"""Triton's interpreter with the bfloat16 and float8_e4m3fn of a GPU.

The original stores bfloat16 as 16-bit integers and computes with those: casts truncate, products
and sums are those of the integers. Its float8 loses the carry when a value rounds up to a power of
two. Here both are converted to float32, which is exact, before any computation, and rounded to
nearest even afterwards. As on sm_90, float8 saturates at 448; NaN stays NaN.

Not corrected: `tl.reduce` and `tl.associative_scan` with custom functions, atomics, other float8
formats, and other rounding modes.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

BFLOAT16, FLOAT8 = tl.bfloat16, tl.float8e4nv

# float8_e4m3fn by its 7 bits without sign; the last is NaN; codes below 8 are subnormal.
_codes = np.arange(127)
_magnitudes = np.where(
    _codes < 8, _codes * 2.0**-9, (8 + _codes % 8) * 2.0 ** (_codes // 8 - 10)
).astype(np.float32)
_middles = (_magnitudes[1:] + _magnitudes[:-1]) / 2  # exact in float32


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """float32 of the 16 bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The 16 bits of float32 rounded to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32).reshape(x.shape)
    # Add half of the last bit that is kept, minus one if that bit is 0 (ties to even); a carry
    # increments the exponent, up to infinity.
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def widen_float8(bits: np.ndarray) -> np.ndarray:
    """float32 of the 8 bits of float8_e4m3fn."""
    return np.append(_magnitudes, np.float32("nan"))[bits & 0x7F] * np.where(
        bits >> 7, np.float32(-1), np.float32(1)
    )


def round_to_float8(x: np.ndarray) -> np.ndarray:
    """The 8 bits of float32 rounded to nearest even and at most 448."""
    x = x.astype(np.float32, copy=False)
    size = np.abs(x)
    code = np.searchsorted(_middles, size)  # the smaller one for a tie
    tie = (code < 126) & (_middles[np.minimum(code, 125)] == size)
    code = np.where(np.isnan(x), 127, code + (tie & (code % 2 == 1)))
    return (code | np.signbit(x) << 7).astype(np.uint8)


_WIDEN = {BFLOAT16: widen_bfloat16, FLOAT8: widen_float8}
_ROUND = {BFLOAT16: round_to_bfloat16, FLOAT8: round_to_float8}


def _widen(value: Any) -> Any:
    """A float32 handle for one of a narrow dtype; other values are unchanged."""
    if not isinstance(value, interpreter.TensorHandle) or value.dtype.scalar not in _WIDEN:
        return value
    return interpreter.TensorHandle(_WIDEN[value.dtype.scalar](value.data), tl.float32)


def _in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
    """Compute on widened operands; the result has the dtype of the last operand."""

    @functools.wraps(method)
    def widened(self: Any, *args: Any) -> Any:
        handles = [arg for arg in args if isinstance(arg, interpreter.TensorHandle)]
        if not any(handle.dtype.scalar in _WIDEN for handle in handles):
            return method(self, *args)
        result, dtype = method(self, *map(_widen, args)), handles[-1].dtype.scalar
        if dtype not in _ROUND or result.data.dtype == np.bool_:
            return result
        return interpreter.TensorHandle(_ROUND[dtype](result.data), dtype)

    return widened


def _through_float32(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Cast to and from narrow dtypes through float32."""

    @functools.wraps(cast)
    def rounding(self: Any, src: Any, dst_type: Any, *mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        toward_zero = mode and mode[0] == interpreter._ir.ROUNDING_MODE.RTZ
        if not {source, target} & set(_WIDEN) or toward_zero:
            return cast(self, src, dst_type, *mode)
        src = _widen(src)
        if target not in _ROUND:
            return src if target == tl.float32 else self.cast_impl(src, dst_type)
        if src.dtype.scalar != tl.float32:
            src = self.cast_impl(src, tl.float32)
        return interpreter.TensorHandle(_ROUND[target](src.data), target)

    return rounding


COMPUTING = (
    "binary_op",
    "unary_op",
    "ternary_op",
    "create_dot",
    "create_fma",
    "create_rsqrt",
    "create_erf",
)
CASTING = ("cast_impl", "create_fp_to_fp")


def correct() -> str | None:
    """Correct the interpreter's dtypes, once per process.

    Returns:
        Why that is not possible with this Triton, or None.
    """
    builder = interpreter.InterpreterBuilder
    missing = [name for name in (*COMPUTING, *CASTING) if not hasattr(builder, name)]
    if missing or not hasattr(interpreter, "TensorHandle"):
        return f"this Triton's interpreter has no {', '.join(missing) or 'TensorHandle'}"
    for names, decorate in ((COMPUTING, _in_float32), (CASTING, _through_float32)):
        for name in names:
            method = getattr(builder, name)
            if not hasattr(method, "__wrapped__"):
                setattr(builder, name, decorate(method))
    return None


def speed_up() -> None:
    """Patch the functions of `triton.language` once per launch and module, not in every call.

    The interpreter patches them in every call of a jitted helper: a quarter of its time.
    """
    known = hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor")
    if not known or hasattr(interpreter._patch_lang, "__wrapped__"):
        return
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()  # globals of the functions called in this launch

    @functools.wraps(patch)
    def patch_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch(function)

    @functools.wraps(call)
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return call(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch
