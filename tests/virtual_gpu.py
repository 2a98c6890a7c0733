"""A virtual GPU: CPU tensors that report the device cuda:0 and cannot mix with other CPU tensors.

Inside `present()` a tensor made with `device="cuda"` reports that device, and so do results
computed from it. Everything is computed on the CPU, with the same bits. Errors of a GPU are raised:
for operands on two devices, `numpy()`, a kernel's pointer to CPU memory, and operations that a CUDA
graph cannot capture. `torch.cuda` reports one GPU.

Only calls from Python are checked, not what they do inside. Races, copies read too early and the
GPU's own arithmetic cannot be found. torch.compile and opcheck cannot trace it: use `absent()`.
"""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor as T
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from virtual_cuda import FACES, Graph, autocast, recording
from virtual_rules import (
    FREE,
    MARK,
    DeviceFault,
    backward,
    call,
    faults,
    mark,
    on_gpu,
    refuse,
    tensors,
)

__all__ = ["DeviceFault", "absent", "capture", "faults", "present"]

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class VirtualGPU(TorchFunctionMode):
    """Intercepts every call of PyTorch from Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if Graph.recording is not None:
            return _record(func, args, kwargs)
        if func in FREE:
            return func(*args, **kwargs)
        return call(func, args, kwargs)


# --- capture of a CUDA graph ---

_READS = {T.item, T.tolist, T.__bool__, T.__int__, T.__float__, T.__index__, T.cpu, T.nonzero}
_READS |= {T.unique, torch.nonzero, torch.unique, torch.equal, T.equal, torch.allclose}


def _record(func, args, kwargs):
    """Execute and record a call; refuse syncs and copies that a capture does not permit."""
    graph, Graph.recording = Graph.recording, None
    try:
        found = list(tensors((args, kwargs)))
        on_device = [t for t in found if on_gpu(t)]
        graph.keep(on_device)
        out = call(func, args, kwargs)
        result = list(tensors([out]))
        hosts = [t for t in found if t.dim() and not (on_gpu(t) or t.is_meta)]
        waits = (on_device and func in _READS) or (func is T.__getitem__ and _has_mask(args[1]))
        waits |= bool(func is T.to and on_device and not on_gpu(out))
        pageable = any(not hasattr(t, "is_virtually_pinned") for t in hosts)
        pageable |= func in (torch.tensor, torch.as_tensor) and not found
        if waits or (pageable and (on_device or any(map(on_gpu, result)))):
            why = "it syncs with the GPU" if waits else "it copies from memory that is not pinned"
            refuse(func, f"operation not permitted when stream is capturing: {why}")
        if func not in FREE:
            graph.calls.append((func, args, dict(kwargs), out))
        return out
    finally:
        Graph.recording = graph


def _has_mask(index: Any) -> bool:
    return any(t.dtype == torch.bool and on_gpu(t) for t in tensors([index]))


def capture(function: Callable[[], object], warmups: int) -> Graph:
    """Replaces the capture in `comemo_kernels.graphs`, which calls the driver."""
    for _ in range(warmups):
        function()
    graph = Graph()
    try:
        with recording(graph):
            function()
    except RuntimeError as error:
        raise ValueError(f"capture: function must be capturable: {error}") from error
    return graph


def replay(calls: list[tuple[Any, ...]]) -> None:
    """Repeat calls; each result is written to the address of the recorded one."""
    with torch.inference_mode(), _pop_mode_temporarily():
        for func, args, kwargs, recorded in calls:
            for new, old in zip(
                tensors([call(func, args, kwargs)]), tensors([recorded]), strict=True
            ):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


# --- entry points where the mode has to be enabled again ---

MODE = VirtualGPU()
_presence: list[contextlib.ExitStack] = []


@contextlib.contextmanager
def seen() -> Iterator[None]:
    """Enable the mode in this thread: operators, autograd and new threads start without it."""
    if not _presence or MODE in _get_current_function_mode_stack():
        yield
        return
    with MODE:
        yield


def _seen(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def called(*args, **kwargs):
        with seen():
            return function(*args, **kwargs)

    return called


def _implement(implement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(implement)
    def register(name, *rest, **kwargs):
        if isinstance(name, str) and name.startswith("comemo::"):
            *rest, function = rest
            rest = [*rest, _seen(function)]
        return implement(name, *rest, **kwargs)

    return register


# comemo_kernels registers its operators when it is imported, so this comes first.
if INTERPRET:
    torch.library.impl = _implement(torch.library.impl)


def _backward_of(differentiate: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients are on the device of the outputs."""

    @functools.wraps(differentiate)
    def differentiated(outputs, *args, **kwargs):
        before = backward.on_gpu
        backward.on_gpu = any(map(on_gpu, tensors([outputs])))
        try:
            return differentiate(outputs, *args, **kwargs)
        finally:
            backward.on_gpu = before

    return differentiated


def _applied(apply: Callable[..., Any]) -> Any:
    """An input that an autograd.Function returns becomes a new tensor; keep its device."""

    def applied(cls, *args, **kwargs):
        out = apply(cls, *args, **kwargs)
        gpu = any(map(on_gpu, tensors(args)))
        for t in tensors([out]):
            if not hasattr(t, MARK):
                mark(t, gpu)
        return out

    return classmethod(applied)


def _hooked(init: Callable[..., Any]) -> Callable[..., Any]:
    """When autograd unpacks saved tensors, gradient checkpointing recomputes them on the GPU."""

    def again(unpack: Callable[..., Any]) -> Callable[..., Any]:
        def unpacked(packed: Any) -> Any:
            before, backward.on_gpu = backward.on_gpu, False
            try:
                with seen():
                    return unpack(packed)
            finally:
                backward.on_gpu = before

        return unpacked

    return lambda self, pack, unpack: init(self, pack, again(unpack))


def _undefined_grad(make: Callable[..., Any]) -> Callable[..., Any]:
    """Undefined gradients of gradcheck keep the device."""
    return lambda: lambda *given: mark(make()(*given), any(map(on_gpu, given)))


def _parameter(make: Callable[..., Any]) -> Any:
    def new(cls, data=None, requires_grad=True, **kwargs):
        made = make(cls, data, requires_grad, **kwargs)
        return made if data is None else mark(made, on_gpu(data))

    return staticmethod(new)


def _launch(run: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel can only access GPU memory."""

    @functools.wraps(run)
    def launch(self, *args, **kwargs):
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
    """Set an attribute; returns a function that restores it."""
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
    # Checkpointing compares metadata of saved tensors outside the mode: leave the device out.
    checks = "_allowed_determinism_checks_to_fns"
    told = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
    checkpoint = torch.utils.checkpoint
    swaps.append((checkpoint, checks, {**getattr(checkpoint, checks), **told}))
    hooks = torch.autograd.graph.saved_tensors_hooks
    swaps.append((hooks, "__init__", _hooked(hooks.__init__)))
    swaps.append((threading.Thread, "run", _seen(threading.Thread.run)))
    parameter = torch.nn.Parameter
    swaps.append((parameter, "__new__", _parameter(parameter.__new__)))
    from comemo_kernels import graphs  # here: after `torch.library.impl` is replaced

    swaps.append((graphs, "_record", capture))
    if INTERPRET:
        from triton.runtime.interpreter import GridExecutor

        swaps.append((GridExecutor, "__call__", _launch(GridExecutor.__call__)))
    else:  # without the interpreter kernels cannot run
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
    """Inside the `with` block there is a virtual GPU."""
    _enter()
    try:
        yield
    finally:
        _presence.pop().close()


@contextlib.contextmanager
def absent() -> Iterator[None]:
    """Inside the `with` block, within `present()`, there is none."""
    _presence.pop().close()
    try:
        yield
    finally:
        _enter()
