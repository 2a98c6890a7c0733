"""The virtual GPU's rules: which tensors are on it, and how calls of PyTorch treat devices."""

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor as T
from torch.overrides import resolve_name
from torch.utils import _device
from virtual_cuda import CUDA

MARK = "on_virtual_gpu"
ROOT = Path(__file__).parents[1]

faults: list[str] = []  # every refused call, even if its error was caught


class DeviceFault(RuntimeError):
    """The error that PyTorch raises on a GPU, with the place in the source."""


class _Backward(threading.local):
    """State of a thread: whether a backward pass on the GPU is running."""

    on_gpu = False


backward = _Backward()


def on_gpu(t: T) -> bool:
    """Whether a tensor reports to be on the GPU."""
    return getattr(t, MARK, backward.on_gpu)


def mark(found: Any, gpu: bool) -> Any:
    """Set the device of results."""
    if isinstance(found, T):
        if gpu or backward.on_gpu or hasattr(found, MARK):
            setattr(found, MARK, gpu and not found.is_meta)
    elif isinstance(found, (list, tuple)):
        for part in found:
            mark(part, gpu)
    return found


def tensors(values: Any) -> Iterator[T]:
    """All tensors in nested arguments."""
    for value in values:
        if isinstance(value, T):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def kind(device: Any) -> str:
    """Type of a device, in any form that PyTorch accepts; there is one GPU."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cuda" and found.index:
        raise RuntimeError("CUDA error: invalid device ordinal")
    return found.type


def refuse(func: Callable[..., Any], why: str, error: type[Exception] = DeviceFault) -> None:
    """Raise the error of a GPU, and record it in `faults`."""
    places, frame = [], sys._getframe(1)
    while frame is not None and len(places) < 6:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path.stem[:7] != "virtual":
            places.append(f"{path.relative_to(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back
    name = resolve_name(func) or getattr(func, "__name__", str(func))
    faults.append(f"{name}: {why} ({' < '.join(places)})")
    raise error(faults[-1])


# --- operands of two devices ---

_NAMES = {"truediv": "div", "mod": "remainder", "floordiv": "floor_divide"}
_NAMES |= {name: f"bitwise_{name}" for name in ("and", "or", "xor")}
# They copy, or read only shape or dtype of their other operands.
_ANY_DEVICES = {T.copy_, T.expand_as, T.view_as, T.reshape_as, T.new_tensor, T.data.__set__, T.set_}
_ANY_DEVICES |= {torch.broadcast_tensors, torch.result_type, torch.is_same_size, T.is_same_size}
_ANY_DEVICES |= {torch._has_compatible_shallow_copy_type}


@functools.cache
def _is_pointwise(func: Callable[..., Any]) -> bool:
    """Whether a zero-dimensional CPU tensor may be an operand."""
    name = getattr(func, "__name__", "").split(".")[0].strip("_")
    for candidate in (name, name[1:]):  # __radd__, __iadd__
        packet = getattr(torch.ops.aten, _NAMES.get(candidate, candidate), None)
        overloads = packet.overloads() if hasattr(packet, "overloads") else ()
        if any(torch.Tag.pointwise in getattr(packet, o).tags for o in overloads):
            return True
    return False


def _check_devices(func: Callable[..., Any], args: tuple, found: list[T]) -> None:
    """Refuse operands on two devices, like a GPU."""
    hosts = [t for t in found if not on_gpu(t)]
    if not hosts or len(hosts) == len(found) or func in _ANY_DEVICES:
        return
    if all(t.dim() == 0 and not t.is_meta for t in hosts) and _is_pointwise(func):
        name = func.__name__
        written = name[:3] == "__i" or (name[-1] == "_" and name[-2:] != "__")
        if not (written and args[0] is hosts[0]):
            return
    told = ", ".join(f"{tuple(t.shape)} on {'cuda:0' if on_gpu(t) else t.device}" for t in found)
    refuse(func, f"Expected all tensors to be on the same device, got {told}")


def _check_index(func: Callable[..., Any], x: T, index: Any) -> bool:
    """Refuse a GPU index into a CPU tensor. True if an index has dimensions or is a mask."""
    found = list(tensors(index if isinstance(index, (list, tuple)) else [index]))
    arrays = [t for t in found if t.dim() or t.dtype == torch.bool]
    if not on_gpu(x) and any(map(on_gpu, arrays)):
        refuse(func, "indices should be either on cpu or on the same device as the indexed tensor")
    return bool(arrays)


def _get(func, args, kwargs):
    _check_index(func, args[0], args[1])
    return mark(func(*args), on_gpu(args[0]))


def _put(func, args, kwargs):
    x, index, value = args[:3]
    many = _check_index(func, x, index)
    if many and isinstance(value, T) and value.dim() and on_gpu(value) != on_gpu(x):
        refuse(func, "Expected all tensors to be on the same device: the values and what is set")
    return func(*args, **kwargs)


def _split(func, args, kwargs):
    where = args[1] if len(args) > 1 else kwargs.get("tensor_indices_or_sections")
    if isinstance(where, T) and on_gpu(where):
        refuse(func, "tensor_indices_or_sections must be on the CPU")
    return mark(func(*args, **kwargs), on_gpu(args[0]))


# --- copies between the devices ---


def _move(x: T, place: str | None, *rest: Any, **kwargs: Any) -> T:
    """`x.to`: a copy if the device changes, so that no memory is on two devices."""
    if place == "meta" or x.is_meta:
        return x.to(*([place] if place else []), *rest, **kwargs)
    here, there = on_gpu(x), on_gpu(x) if place is None else place == "cuda"
    y = x.to(*rest, **kwargs) if rest or kwargs else x
    return mark(y.clone() if here != there and y is x else y, there)


def _to(func, args, kwargs):
    rest, place = [], None
    for value in (*args[1:], kwargs.pop("device", None), kwargs.pop("other", None)):
        if isinstance(value, T):
            place = "cuda" if on_gpu(value) else value.device.type
            rest.append(value.dtype)
        elif isinstance(value, torch.dtype):
            rest.append(value)
        elif value is not None and not isinstance(value, bool):
            place = kind(value)
    kwargs.pop("non_blocking", None)
    return _move(args[0], place, *rest, **kwargs)


def _pin(func, args, kwargs):
    if on_gpu(args[0]):
        refuse(func, "cannot pin a CUDA tensor, only dense CPU tensors can be pinned")
    return _pinned(args[0].clone())


def _pinned(t: T) -> T:
    t.is_virtually_pinned = True
    return t


def _made_of(func, args, kwargs):
    """torch.tensor and as_tensor: on the device of a given tensor; numbers go to the CPU."""
    data, wanted = args[0], kwargs.pop("device", None) or _device.CURRENT_DEVICE
    gpu = isinstance(data, T) and on_gpu(data)
    place = ("cuda" if gpu else "cpu") if wanted is None else kind(wanted)
    kwargs.pop("pin_memory", None)
    made = func(*args, **kwargs, device="cpu" if place == "cuda" else place)
    moved = made is data and gpu != (place == "cuda")
    return mark(made.clone() if moved else made, place == "cuda")


def _not_numpy(func, args, kwargs):
    if on_gpu(args[0]):
        why = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()"
        refuse(func, why, type("DeviceTypeFault", (DeviceFault, TypeError), {}))
    return func(*args, **kwargs)


def _set_data(func, args, kwargs):
    func(*args)
    mark(args[0], on_gpu(args[1]))


_SPECIAL: dict[Any, Callable[..., Any]] = {
    T.device.__get__: lambda func, args, _: CUDA if on_gpu(args[0]) else func(*args),
    T.is_cuda.__get__: lambda func, args, _: on_gpu(args[0]),
    T.is_cpu.__get__: lambda func, args, _: not on_gpu(args[0]) and func(*args),
    T.get_device: lambda func, args, _: 0 if on_gpu(args[0]) else func(*args),
    T.to: _to,
    T.type_as: lambda func, args, _: _to(func, args, {}),
    T.cpu: lambda func, args, _: _move(args[0], "cpu"),
    T.cuda: lambda func, args, _: _move(args[0], "cuda"),
    T.pin_memory: _pin,
    T.is_pinned: lambda func, args, _: hasattr(args[0], "is_virtually_pinned"),
    T.numpy: _not_numpy,
    T.__array__: _not_numpy,
    T.copy_: lambda func, args, kwargs: mark(func(*args, **kwargs), on_gpu(args[0])),
    T.__iter__: lambda func, args, _: iter(mark(list(func(*args)), on_gpu(args[0]))),
    T.__getitem__: _get,
    T.__setitem__: _put,
    T.index_put_: lambda *call: mark(_put(*call), on_gpu(call[1][0])),
    T.index_put: lambda *call: mark(_put(*call), on_gpu(call[1][0])),
    T.tensor_split: _split,
    torch.tensor_split: _split,
    T.data.__set__: _set_data,
    T.__deepcopy__: lambda func, args, _: mark(func(*args), on_gpu(args[0])),
    **dict.fromkeys((torch.tensor, torch.as_tensor, torch.asarray), _made_of),
}
_PROPERTIES = ("shape", "dtype", "ndim", "requires_grad", "layout")
_PROPERTIES += ("is_meta", "is_sparse", "is_leaf", "grad_fn")
FREE = {getattr(T, name).__get__ for name in _PROPERTIES}  # calls that need no check
FREE |= {T.size, T.stride, T.dim, T.numel, T.__len__, T.data_ptr, T.is_contiguous, T.element_size}
FREE |= {T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.__hash__, T.__repr__}
FREE |= {T.is_floating_point, T.is_inference, T.untyped_storage, T.storage_offset}


# --- a call ---


def call(func, args, kwargs):
    """Execute a call of PyTorch with the rules for its operands' devices."""
    special = _SPECIAL.get(func)
    if special is not None:
        return special(func, args, dict(kwargs))
    makes = func in _device._device_constructors()
    device = kwargs.get("device")
    if makes and device is None:
        device = _device.CURRENT_DEVICE
    place = None if device is None else kind(device)
    pin = kwargs.get("pin_memory", False)
    if place == "cuda" or pin:
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
        kwargs |= {"device": "cpu"} if place == "cuda" else {}
    found = [*tensors(args), *tensors(kwargs.values())]
    any_on_gpu = any(map(on_gpu, found))
    if any_on_gpu and not makes:
        _check_devices(func, args, found)
    gpu = place == "cuda" if place or makes else any_on_gpu
    generator = kwargs.get("generator")
    if gpu and generator is not None and generator.device.type != "cuda":
        refuse(func, "Expected a 'cuda' device type for generator but found 'cpu'")
    out = func(*args, **kwargs)
    if isinstance(func, torch._ops.OpOverload) and func.namespace == "comemo":
        return out  # its launcher has set the device
    return _pinned(out) if pin else mark(out, gpu)
