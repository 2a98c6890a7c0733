"""A GPU that is not there: tensors of the CPU that claim to be on cuda:0, kept apart from the rest.

Inside `present()` a tensor made with `device="cuda"` says so, as does whatever is computed from
it. Everything is computed on the CPU, to the same bits. What a GPU would refuse is refused: an
operation on operands of two devices, `numpy()`, a kernel's pointer to the CPU's memory, and what a
CUDA graph cannot record. `torch.cuda` answers as one GPU does.

Calls from Python are seen, not what they do inside; nor a race, a copy read too early, or the
GPU's own arithmetic. torch.compile and opcheck cannot trace it: `absent()`.
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor as T
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
    resolve_name,
)
from torch.utils import _device
from virtual_cuda import CUDA, FACES, Graph, autocast, recording

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
MARK = "on_virtual_gpu"
ROOT = Path(__file__).parents[1]

faults: list[str] = []  # every mix-up that was refused, whoever caught the error


class DeviceFault(RuntimeError):
    """What PyTorch raises on a GPU, with the place."""


class _Backward(threading.local):
    """Of the backward pass that runs: whether the gradients that autograd makes are on the GPU."""

    on_gpu = False


_backward = _Backward()


def on_gpu(t: T) -> bool:
    """Whether a tensor claims to be on the GPU."""
    return getattr(t, MARK, _backward.on_gpu)


def mark(found: Any, gpu: bool) -> Any:
    """Give what was computed its device."""
    if isinstance(found, T):
        if gpu or _backward.on_gpu or hasattr(found, MARK):
            setattr(found, MARK, gpu and not found.is_meta)
    elif isinstance(found, (list, tuple)):
        for part in found:
            mark(part, gpu)
    return found


def tensors(values: Any) -> Iterator[T]:
    """All tensors in arguments, however deep."""
    for value in values:
        if isinstance(value, T):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())


def kind(device: Any) -> str:
    """Type of a device in whatever form PyTorch takes it."""
    return "cuda" if isinstance(device, int) else torch.device(device).type


def refuse(func: Callable[..., Any], why: str, error: type[Exception] = DeviceFault) -> None:
    """Raise, and remember, that a GPU would not do this."""
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
# Of what they are given they read the shape or dtype alone, or they copy.
_ANY_DEVICES = {
    *(T.copy_, T.expand_as, T.view_as, T.reshape_as, T.new_tensor, T.data.__set__, T.set_),
    *(torch.broadcast_tensors, torch.result_type, torch.is_same_size, T.is_same_size),
    torch._has_compatible_shallow_copy_type,
}


@functools.cache
def _is_pointwise(func: Callable[..., Any]) -> bool:
    """Whether a number on the CPU, as a tensor without dimensions, may be an operand."""
    name = getattr(func, "__name__", "").split(".")[0].strip("_")
    for candidate in (name, name[1:]):  # __radd__, __iadd__
        packet = getattr(torch.ops.aten, _NAMES.get(candidate, candidate), None)
        overloads = packet.overloads() if hasattr(packet, "overloads") else ()
        if any(torch.Tag.pointwise in getattr(packet, o).tags for o in overloads):
            return True
    return False


def _check_devices(func: Callable[..., Any], args: tuple, found: list[T]) -> None:
    """Refuse operands on two devices, as a GPU does."""
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
    """Refuse an index on the GPU into a tensor of the CPU; whether any is more than a number."""
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
    """`x.to`: never the same memory on two devices."""
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
    """torch.tensor and as_tensor: on the device of the tensor given; numbers go to the CPU."""
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
_FREE = {
    *(getattr(T, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "layout")),
    *(getattr(T, name).__get__ for name in ("is_meta", "is_sparse", "is_leaf", "grad_fn")),
    *(T.size, T.stride, T.dim, T.numel, T.__len__, T.data_ptr, T.is_contiguous, T.element_size),
    *(T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.__hash__, T.__repr__),
    *(T.is_floating_point, T.is_inference, T.untyped_storage, T.storage_offset),
}


class VirtualGPU(TorchFunctionMode):
    """Sees every call of PyTorch that is made in Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if Graph.recording is not None:
            return _record(func, args, kwargs)
        if func in _FREE:
            return func(*args, **kwargs)
        return _call(func, args, kwargs)


def _call(func, args, kwargs):
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
    near = any(map(on_gpu, found))
    if near and not makes:
        _check_devices(func, args, found)
    gpu = place == "cuda" if place or makes else near
    generator = kwargs.get("generator")
    if gpu and generator is not None and generator.device.type != "cuda":
        refuse(func, "Expected a 'cuda' device type for generator but found 'cpu'")
    out = func(*args, **kwargs)
    if isinstance(func, torch._ops.OpOverload) and func.namespace == "comemo":
        return out  # its launcher says where
    return _pinned(out) if pin else mark(out, gpu)


# --- what a CUDA graph records ---

_READS = {T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.cpu, T.nonzero}
_READS |= {T.unique, torch.nonzero, torch.unique, torch.equal, T.equal, torch.allclose}


def _record(func, args, kwargs):
    """Call, refuse what makes the host or the GPU wait for the other, and write the call down."""
    graph, Graph.recording = Graph.recording, None
    try:
        found = list(tensors((args, kwargs)))
        near = [t for t in found if on_gpu(t)]
        graph.keep(near)
        out = _call(func, args, kwargs)
        result = list(tensors([out]))
        hosts = [t for t in found if t.dim() and not (on_gpu(t) or t.is_meta)]
        waits = (near and func in _READS) or (func is T.__getitem__ and _has_mask(args[1]))
        waits |= bool(func is T.to and near and not on_gpu(out))
        pageable = any(not hasattr(t, "is_virtually_pinned") for t in hosts)
        pageable |= func in (torch.tensor, torch.as_tensor) and not found
        if waits or (pageable and (near or any(map(on_gpu, result)))):
            why = "it waits for the GPU" if waits else "it copies from memory that is not pinned"
            refuse(func, f"operation not permitted when stream is capturing: {why}")
        if func not in _FREE:
            graph.calls.append((func, args, dict(kwargs), out))
        return out
    finally:
        Graph.recording = graph


def _has_mask(index: Any) -> bool:
    return any(t.dtype == torch.bool and on_gpu(t) for t in tensors([index]))


def capture(function: Callable[[], object], warmups: int) -> Graph:
    """What `comemo_kernels.graphs` does by the driver's calls."""
    for _ in range(warmups):
        function()
    graph = Graph()
    try:
        with recording(graph):
            function()
    except RuntimeError as error:
        raise ValueError(f"capture: function must be recordable: {error}") from error
    return graph


def replay(calls: list[tuple[Any, ...]]) -> None:
    """Call again, each result written where the recorded one lies."""
    with torch.inference_mode(), _pop_mode_temporarily():
        for func, args, kwargs, recorded in calls:
            for new, old in zip(
                tensors([_call(func, args, kwargs)]), tensors([recorded]), strict=True
            ):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


# --- where calls from Python begin that nobody sees ---

MODE = VirtualGPU()
_presence: list[contextlib.ExitStack] = []


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """See this thread's calls: operators, autograd and new threads begin without the mode."""
    if not _presence or MODE in _get_current_function_mode_stack():
        yield
        return
    with MODE:
        yield


def _seen(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args, **kwargs):
        with seen():
            return function(*args, **kwargs)

    return call


def _implement(implement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implement)
    def register(name, *rest, **kwargs):
        if isinstance(name, str) and name.startswith("comemo::"):
            *rest, function = rest
            rest = [*rest, _seen(function)]
        return implement(name, *rest, **kwargs)

    return register


# Operators are registered once, when comemo_kernels is imported: after this.
if INTERPRET:
    torch.library.impl = _implement(torch.library.impl)


def _backward_of(differentiate: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients are on the device of what is differentiated."""

    @functools.wraps(differentiate)
    def backward(outputs, *args, **kwargs):
        before = _backward.on_gpu
        _backward.on_gpu = any(map(on_gpu, tensors([outputs])))
        try:
            return differentiate(outputs, *args, **kwargs)
        finally:
            _backward.on_gpu = before

    return backward


def _applied(apply: Callable[..., Any]) -> Any:
    """What a function of autograd returns as it was given is a new tensor, on the same device."""

    def call(cls, *args, **kwargs):
        out = apply(cls, *args, **kwargs)
        gpu = any(map(on_gpu, tensors(args)))
        for t in tensors([out]):
            if not hasattr(t, MARK):
                mark(t, gpu)
        return out

    return classmethod(call)


def _hooked(init: Callable[..., Any]) -> Callable[..., Any]:
    """Where autograd asks for what it saved, a checkpoint computes it again, as it did before."""

    def again(unpack: Callable[..., Any]) -> Callable[..., Any]:
        def call(packed: Any) -> Any:
            before, _backward.on_gpu = _backward.on_gpu, False
            try:
                with seen():
                    return unpack(packed)
            finally:
                _backward.on_gpu = before

        return call

    return lambda self, pack, unpack: init(self, pack, again(unpack))


def _undefined_grad(make: Callable[..., Any]) -> Callable[..., Any]:
    """gradcheck's way to give a function no gradient: of one tensor another."""
    return lambda: lambda *given: mark(make()(*given), any(map(on_gpu, given)))


def _parameter(make: Callable[..., Any]) -> Any:
    def new(cls, data=None, requires_grad=True, **kwargs):
        made = make(cls, data, requires_grad, **kwargs)
        return made if data is None else mark(made, on_gpu(data))

    return staticmethod(new)


def _launch(run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel reads the GPU's memory alone."""

    @functools.wraps(run)
    def launch(self, *args, **kwargs):
        if _presence:
            for place, value in enumerate(args):
                for t in tensors([value]):
                    if t.data_ptr() and not on_gpu(t):
                        why = f"Pointer argument (at {place}) cannot be accessed from Triton"
                        fault = type("PointerFault", (DeviceFault, ValueError), {})
                        refuse(self.fn, f"{why} (cpu tensor?)", fault)
        with torch._C.DisableTorchFunction():
            return run(self, *args, **kwargs)

    return launch


def _swap(place: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute; what sets it back."""
    before = place.__dict__[name]
    setattr(place, name, value)
    return lambda: setattr(place, name, before)


def _enter() -> None:
    stack = contextlib.ExitStack()
    swaps: list[tuple[Any, str, Any]] = [(torch.cuda, name, face) for name, face in FACES.items()]
    swaps.append((torch, "autocast", autocast))
    swaps += [
        (torch.autograd, name, _backward_of(getattr(torch.autograd, name)))
        for name in ("backward", "grad")
    ]
    engine = torch.autograd.function.BackwardCFunction
    swaps.append((engine, "apply", _seen(engine.apply)))
    undefined = torch._C._functions.UndefinedGrad
    swaps.append((torch._C._functions, "UndefinedGrad", _undefined_grad(undefined)))
    function = torch.autograd.Function
    swaps.append((function, "apply", _applied(function.apply.__func__)))
    # A checkpoint writes down what it saves where no mode sees it: devices say nothing there.
    checks = "_allowed_determinism_checks_to_fns"
    told = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
    checkpoint = torch.utils.checkpoint
    swaps.append((checkpoint, checks, {**getattr(checkpoint, checks), **told}))
    hooks = torch.autograd.graph.saved_tensors_hooks
    swaps.append((hooks, "__init__", _hooked(hooks.__init__)))
    swaps.append((threading.Thread, "run", _seen(threading.Thread.run)))
    parameter = torch.nn.Parameter
    swaps.append((parameter, "__new__", _parameter(parameter.__new__)))
    from comemo_kernels import graphs  # here: operators must be seen when they are registered

    swaps.append((graphs, "_record", capture))
    if INTERPRET:
        from triton.runtime.interpreter import InterpretedFunction

        swaps.append((InterpretedFunction, "run", _launch(InterpretedFunction.run)))
    else:  # there is nothing to run kernels on
        swaps += [
            (module, "on_triton", lambda _: False)
            for name, module in list(sys.modules.items())
            if name.startswith("comemo_kernels") and "on_triton" in vars(module)
        ]
    for swap in swaps:
        stack.callback(_swap(*swap))
    stack.enter_context(MODE)
    _presence.append(stack)


@contextlib.contextmanager
def present() -> Iterator[None]:
    """There is a virtual GPU."""
    _enter()
    try:
        yield
    finally:
        _presence.pop().close()


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """Within `present()`: there is none for a while."""
    _presence.pop().close()
    try:
        yield
    finally:
        _enter()
