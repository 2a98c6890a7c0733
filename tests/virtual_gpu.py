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
    """Sees every call of PyTorch that is made in Python."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = {} if kwargs is None else kwargs
        if Graph.recording is not None:
            return _record(func, args, kwargs)
        if func in FREE:
            return func(*args, **kwargs)
        return call(func, args, kwargs)


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
        out = call(func, args, kwargs)
        result = list(tensors([out]))
        hosts = [t for t in found if t.dim() and not (on_gpu(t) or t.is_meta)]
        waits = (near and func in _READS) or (func is T.__getitem__ and _has_mask(args[1]))
        waits |= bool(func is T.to and near and not on_gpu(out))
        pageable = any(not hasattr(t, "is_virtually_pinned") for t in hosts)
        pageable |= func in (torch.tensor, torch.as_tensor) and not found
        if waits or (pageable and (near or any(map(on_gpu, result)))):
            why = "it waits for the GPU" if waits else "it copies from memory that is not pinned"
            refuse(func, f"operation not permitted when stream is capturing: {why}")
        if func not in FREE:
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
                tensors([call(func, args, kwargs)]), tensors([recorded]), strict=True
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


# Operators are registered once, when comemo_kernels is imported: after this.
if INTERPRET:
    torch.library.impl = _implement(torch.library.impl)


def _backward_of(differentiate: Callable[..., Any]) -> Callable[..., Any]:
    """Gradients are on the device of what is differentiated."""

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
    """What a function of autograd returns as it was given is a new tensor, on the same device."""

    def applied(cls, *args, **kwargs):
        out = apply(cls, *args, **kwargs)
        gpu = any(map(on_gpu, tensors(args)))
        for t in tensors([out]):
            if not hasattr(t, MARK):
                mark(t, gpu)
        return out

    return classmethod(applied)


def _hooked(init: Callable[..., Any]) -> Callable[..., Any]:
    """Where autograd asks for what it saved, a checkpoint computes it again, as it did before."""

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
        from triton.runtime.interpreter import GridExecutor

        swaps.append((GridExecutor, "__call__", _launch(GridExecutor.__call__)))
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
