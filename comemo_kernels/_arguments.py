"""Errors for arguments of a wrong type, which name the argument.

Types are compared with the annotations only after an error, so that valid calls cost nothing more.
"""

import collections.abc
import functools
import inspect
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


# The wrapper has the function's own parameters: collecting them in a tuple costs 0.1 us a call.
_CALLED = """
def called({names}):
    try:
        {check}return _function({names})
    except Exception as error:
        _raise_misfit(error, _function, ({names},))
        raise
"""
# Only who imports the module can have a DTensor; transformers does, so that this is on every path.
_CHECK = """_kind = getattr(_modules.get("torch.distributed.tensor"), "DTensor", None)
        if _kind is not None and ({found}):
            return _call_sharded(_function, ({names},))
        """
# Steps of decoding call these: a DTensor in nothing but their NamedTuples fails, and is named then.
_FREQUENT = {"attend_spans", "attend_gated"}


def public(function: F) -> F:
    """Decorate a public function: if it fails because of an argument's type, the error names it.

    Errors that name the function, or that no argument's type explains, are unchanged. With DTensors
    the function runs on local tensors, see `_sharded`.

    Raises:
        ValueError: an argument that is not what the function's annotations say, or a DTensor with
            placements for which there is no rule.
    """
    scope: dict[str, Any] = {"_function": function, "_raise_misfit": _raise_misfit}
    scope |= {"_modules": sys.modules, "_call_sharded": _call_sharded, "_holds": _holds_sharded}
    names = ", ".join(inspect.signature(function).parameters)
    found = _checks(function)
    check = _CHECK.format(found=" or ".join(found), names=names) if found else ""
    source = _CALLED.format(names=names, check=check)
    exec(compile(source, f"<public {function.__qualname__}>", "exec"), scope)
    called = functools.wraps(function)(scope["called"])
    called.__defaults__ = function.__defaults__  # type: ignore[attr-defined]
    return typing.cast(F, called)


def _checks(function: Callable[..., Any]) -> list[str]:
    """Expressions that find a DTensor among a function's arguments."""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        if hint is Tensor or Tensor in get_args(hint):
            found.append(f"type({name}) is _kind")
        elif _may_hold(hint) and function.__name__ not in _FREQUENT:
            found.append(f"_holds({name})")
    return found


def _may_hold(hint: Any) -> bool:
    """Whether a value of a type may contain tensors."""
    is_record = isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))
    return hint is Tensor or is_record or any(map(_may_hold, get_args(hint)))


def _holds_sharded(value: Any) -> bool:
    from comemo_kernels._sharded import holds  # here: it imports torch.distributed.tensor

    return holds(value)


def _call_sharded(function: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    from comemo_kernels._sharded import call

    return call(function, values)


def _raise_misfit(error: Exception, function: Callable[..., Any], values: tuple[Any, ...]) -> None:
    """Raise for the argument whose type may have caused an error, if there is one."""
    if torch.compiler.is_compiling():
        return
    name = function.__qualname__.removesuffix(".__init__")
    message = str(error) if isinstance(error, ValueError) else ""
    if message.startswith(f"{name}: "):
        return
    if sys.modules.get("torch.distributed.tensor") is not None:
        from comemo_kernels._sharded import check

        check(function, values)
    hints = typing.get_type_hints(function)
    given = zip(inspect.signature(function).parameters, values, strict=True)
    found = _first(_misfit(part, value, hints[part]) for part, value in given if part in hints)
    if found is not None:
        raise ValueError(
            f"{name}: {found.name} must be {_describe(found.wanted)}, got {_show(found.got)}"
        ) from error
    if re.match(r"[\w.]+: ", message):  # it names a function that this one calls
        raise ValueError(f"{name}: {message}") from error


class _Misfit(NamedTuple):
    name: str
    wanted: Any
    got: Any


def _first(found: Iterable[_Misfit | None]) -> _Misfit | None:
    return next((misfit for misfit in found if misfit is not None), None)


def _misfit(name: str, value: Any, hint: Any) -> _Misfit | None:
    """The innermost part of `value` that does not match `hint`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if torch.device in inner:  # which a string may name
            inner = tuple(option for option in inner if option is not str)
        found = [_misfit(name, value, option) for option in inner]
        if None in found:
            return None
        deeper = (misfit for misfit in found if misfit is not None and misfit.name != name)
        return next(deeper, _Misfit(name, hint, value))
    if not _is_a(value, origin or hint, inner):
        return _Misfit(name, hint, value)
    if origin is dict:
        pairs = [(f"{name}[{key!r}]", part) for key, part in value.items()]
        return _first(_misfit(f"a key of {name}", key, inner[0]) for key in value) or _first(
            _misfit(place, part, inner[1]) for place, part in pairs
        )
    if origin in (tuple, collections.abc.Sequence):
        options = inner if origin is tuple and inner[-1] is not ... else [inner[0]] * len(value)
        return _first(_misfit(f"{name}[{i}]", value[i], option) for i, option in enumerate(options))
    if is_dataclass(hint) or hasattr(hint, "_fields"):
        hints = typing.get_type_hints(hint)
        return _first(
            _misfit(f"{name}.{part}", getattr(value, part), hints[part])
            for part in hints
            if get_origin(hints[part]) is not typing.ClassVar
        )
    return None


def _is_a(value: Any, kind: Any, inner: tuple[Any, ...]) -> bool:
    """Whether a value is of a kind, without checking its parts."""
    if kind is Any:
        return True
    if kind is Tensor:
        return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if kind is bool:
        return isinstance(value, (bool, int)) and value in (0, 1)
    if kind in (int, float):
        return _is_number(value, kind)
    if kind is torch.device:
        return _is_device(value)
    if kind is collections.abc.Callable:
        return callable(value)
    if kind is dict:
        return isinstance(value, Mapping)
    if kind in (tuple, collections.abc.Sequence):
        listed = not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__getitem__")
        fixed = kind is tuple and inner[-1] is not ...
        listed = listed and hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0
        return listed and (not fixed or len(value) == len(inner))
    return isinstance(value, kind)


def _is_number(value: Any, kind: type) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    try:
        if kind is int or hasattr(value, "__index__"):
            return abs(operator.index(value)) < 2**63
        return float(value) is not None
    except Exception:  # a foreign object's method may raise anything
        return False


def _is_device(value: Any) -> bool:
    try:
        return torch.device(value) is not None
    except Exception:
        return False


def _describe(hint: Any) -> str:
    """A type annotation in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if torch.device in inner:
            inner = tuple(option for option in inner if option is not str)
        *others, last = [_describe(option) for option in inner]
        return f"{', '.join(others)} or {last}" if others else last
    if origin is tuple and inner[-1] is not ...:
        return f"({', '.join(_describe(part) for part in inner)})"
    if origin in (tuple, collections.abc.Sequence):
        return f"a sequence, each part {_describe(inner[0])}"
    words: dict[Any, str] = {
        Tensor: "a dense tensor with values",
        int: "a 64-bit integer",
        float: "a 64-bit number",
        bool: "True or False",
        str: "a string",
        type(None): "None",
        torch.device: "a device",
        torch.dtype: "a torch.dtype",
        collections.abc.Callable: "a function",
        dict: "a dictionary",
    }
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))


def _show(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}, {value.layout}"
    shown = repr(value) if isinstance(value, (str, bytes, int, float, type(None))) else ""
    return shown if 0 < len(shown) <= 60 else f"{type(value).__name__}"
