"""Invalid values to replace arguments with, and how a function refuses them."""

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import GPU
from torch import Tensor

from comemo_kernels import ImageMemory

FLOAT8 = torch.float8_e4m3fn
OTHER_DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.bool,
    torch.int64,
    torch.int32,
    torch.uint8,
    FLOAT8,
]


class Parts(NamedTuple):
    """The parts of a compound value, and how to replace one of them."""

    names: list[Any]
    make: Callable[[Any, Any], Any]  # called with the name of a part and its replacement


def parts_of(value: Any) -> Parts | None:
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        kind = type(value)
        return Parts(
            list(range(len(value))), lambda i, part: kind([*value[:i], part, *value[i + 1 :]])
        )
    if hasattr(value, "_fields"):
        return Parts(list(value._fields), lambda name, part: value._replace(**{name: part}))
    if isinstance(value, dict):
        return Parts(list(value), lambda key, part: {**value, key: part})
    if is_dataclass(value) and not isinstance(value, type):
        return Parts(
            [f.name for f in fields(value)], lambda name, part: replace(value, **{name: part})
        )
    return None


def part(value: Any, name: Any) -> Any:
    return (
        value[name]
        if isinstance(value, (list, dict)) or isinstance(name, int)
        else getattr(value, name)
    )


class Awkward:
    """Every attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"nothing like {name}")


SIMPLE = [None, True, False, 0, 1, -1, 3, 2**31, -(2**31), 2**62, 2**63, -(2**63), 10**30]
FLOATS = [0.0, 1.5, -0.5, 1e-320, 1e308, math.nan, math.inf, -math.inf, 1j]
STRINGS = ["", "x", "v1", b"x"]
CONTAINERS = [[], (), {}, [None], ["x"], [1.5], [0], (1, 2), (-1, 3), [[1]]]
OBJECTS = [object(), Awkward(), int, torch.float16, torch.int8, torch.device("cpu"), "meta"]
ARRAYS = [np.zeros((1, 3)), np.int64(2), torch.Size([2])]
ODD: list[Any] = [*SIMPLE, *FLOATS, *STRINGS, *CONTAINERS, *OBJECTS, *ARRAYS]


def odd_tensors(right: Tensor) -> Iterator[Tensor]:
    """Tensors of another dtype, rank, size, layout or device, or with other values."""
    plain = right.detach().float() if right.dtype == FLOAT8 else right.detach().clone()
    for dtype in OTHER_DTYPES:
        yield plain.to(dtype)
    yield from (plain[None], plain[:0], plain[..., :0], plain.flatten(), plain.sum())
    yield plain.expand(2, *plain.shape)
    if plain.ndim:
        yield from (plain[0], plain[:1], torch.cat([plain, plain]), plain[..., :-1], plain.flip(0))
        yield torch.cat([plain, plain], -1)[..., ::2]
        yield plain[:1].expand(plain.shape)
    if plain.ndim > 1:
        yield plain.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield from (right.to("meta"), right.cpu())
    yield plain.to_sparse()
    if plain.is_floating_point():
        yield from (torch.full_like(plain, value) for value in (math.nan, math.inf))
        leaf = plain.clone().requires_grad_()
        yield from (leaf, leaf[...], (leaf * 1).unbind(0)[0][None], leaf * 1)
        with torch.no_grad():
            yield leaf[...]
        with torch.inference_mode():
            yield right.clone()
    elif plain.dtype != torch.bool and not GPU:  # a bad address on a GPU ends the whole run
        limits = torch.iinfo(plain.dtype)
        values = (limits.min, limits.max, limits.min + 1, -1)
        yield from (torch.full_like(plain, value) for value in values)


def odd_value(draw: random.Random, right: Any, depth: int = 3) -> Any:
    """A replacement of a valid value: anything, a similar tensor, or the value with an odd part."""
    found = parts_of(right)
    if found is not None and found.names and depth and draw.random() < 0.7:
        name = draw.choice(found.names)
        return found.make(name, odd_value(draw, part(right, name), depth - 1))
    if isinstance(right, list) and draw.random() < 0.2:
        wrapped = [torch.tensor(2), torch.ones(2, 4), tuple(right)]
        return draw.choice([right[:-1], [*right, *right], *wrapped])
    if isinstance(right, Tensor) and draw.random() < 0.7:
        return draw.choice(list(odd_tensors(right)))
    return draw.choice(ODD)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a value, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif (found := parts_of(value)) is not None:
        for name in found.names:
            yield from tensors(part(value, name))


# --- refusals ---


def bits(x: Tensor) -> Tensor | None:
    if x.layout != torch.strided or x.is_meta:
        return None
    x = x.detach()
    return x.new_empty(x.numel()).copy_(x.flatten()).view(torch.uint8)


def state(*values) -> list:
    """The tensors of values, their bits, and the sizes of a memory."""
    found = [t for value in values for t in tensors(value)]
    told = [(0, str(v.sizes)) for v in values if isinstance(v, ImageMemory)]
    return [*told, *[(id(t), bits(t)) for t in found]]


def same(before: list, after: list) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a[1], b[1]) if isinstance(a[1], Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def raised(function, arguments) -> Exception | None:
    try:
        function(**arguments)
    except Exception as error:
        return error
    return None


def refuses(function, arguments, name=None, told="") -> None:
    """It raises a ValueError that names it, and changes nothing."""
    values = [*arguments.values(), getattr(function, "__self__", None)]
    kept = copy.copy(values)  # what is in the place of an argument
    before = state(*values)
    with pytest.raises(ValueError, match=f"^{re.escape(name or function.__qualname__)}: {told}"):
        function(**arguments)
    assert same(before, state(*kept)), "changed"
