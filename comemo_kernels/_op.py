"""What all operations share: checks, registration, launches. Nothing here is about CoMemo."""

import contextlib
import functools
import inspect
import operator
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from comemo_kernels._arguments import public

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HIP = torch.version.hip is not None  # there Triton looks at the sizes of tensors, too

_dtype_of = operator.attrgetter("dtype")
Config = dict[str, int]  # block sizes, num_warps, num_stages: what a launch passes to its kernel


def check(condition: bool, message: str) -> None:
    """Raise ValueError unless `condition`; `message` names the function, what it wants and got."""
    if not condition:
        raise ValueError(message)


def check_count(verb: str, name: str, value: int, low: int = 0, high: int = 2**31 - 1) -> None:
    """Raise ValueError, naming function `verb`, unless `value` is an integer in [low, high]."""
    try:
        count = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        count = low - 1
    if not low <= count <= high:
        raise ValueError(f"{verb}: {name} must be an integer from {low} to {high}, got {value!r}")


def on_triton(x: Tensor) -> bool:
    """Whether `x` goes to a kernel: it is on a GPU, or Triton's interpreter is on."""
    return x.is_cuda or INTERPRET


def padded(n: int) -> int:
    """Smallest power of two that is at least `n`, the size of a block for `n` elements."""
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def multiprocessors(device: int) -> int:
    """Number of multiprocessors of a GPU by its index; of an H200 for index -1, a CPU."""
    return 132 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def has_float8(device: int) -> bool:
    """Whether a GPU, by its index, converts float8_e4m3fn."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def is_hopper(device: int) -> bool:
    """Whether a GPU, by its index, has compute capability 9.0; index -1, a CPU, has not."""
    return device >= 0 and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def launches_early(device: int) -> bool:
    """Whether a kernel may start before the previous one ends (`launch_pdl`); True for index -1."""
    hopper = device < 0 or torch.cuda.get_device_capability(device) >= (9, 0)
    return torch.version.hip is None and hopper


def has_warp_groups(device: int) -> bool:
    """Whether matrix instructions of warp groups read shared memory (Hopper).

    Index -1, a CPU, stands for the GPU that Triton compiles for; without one, for an H200.
    """
    if device >= 0:
        return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9
    if INTERPRET:
        return True
    from triton.runtime import driver  # here, because this module is imported without Triton

    return bool(driver.active.get_current_target().arch == 90)


def register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `launch` as the operator `torch.ops.comemo.<name>` of `schema`, and return it.

    It runs with the device of its first tensor as the current device, in any thread. Arguments that
    the schema marks as written, `Tensor(a!)`, get a new version, so that autograd notices.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", without namespace.
        launch: allocates outputs and launches; it validates nothing and queries no device.
        fake: returns empty outputs of the same shapes and dtypes, for torch.compile to trace.
    """
    name, arguments = schema.split("(", 1)
    torch.library.define(f"comemo::{name}", f"({arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.comemo, name).default
    written = [
        i
        for i, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    guarded = _with_versions(_on_its_device(launch), written) if written else _on_its_device(launch)
    for key in ("CUDA", "CPU") if INTERPRET else ("CUDA",):
        torch.library.impl(f"comemo::{name}", key, guarded)
    torch.library.register_fake(f"comemo::{name}", fake)
    return operator


def _on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Run `launch` on the device of its tensors: Triton launches on the current device."""

    @functools.wraps(launch)
    def guarded(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        index = first.get_device()  # -1 on a CPU
        if index < 0 or index == torch.cuda.current_device():
            return launch(*args)
        with torch.cuda.device(index):
            return launch(*args)

    return guarded


def _with_versions(launch: Callable[..., Any], written: list[int]) -> Callable[..., Any]:
    @functools.wraps(launch)
    def versioned(*args: Any) -> Any:
        result = launch(*args)
        tensors = [t for i in written for t in _tensors(args[i]) if not t.is_inference()]
        torch.autograd.graph.increment_version(tensors)
        return result

    return versioned


def _tensors(argument: Any) -> Iterable[Tensor]:
    if argument is None:
        return ()
    return (argument,) if isinstance(argument, Tensor) else argument


def to_device(values: Tensor, device: torch.device | str | None) -> Tensor:
    """Copy a small CPU tensor to `device`; the host does not wait for a GPU."""
    if device is None or torch.device(device).type != "cuda" or torch.compiler.is_compiling():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def jit(kernel: Callable[..., Any]) -> Any:
    """Decorate a kernel with `triton.jit` so that none of its numbers specialises.

    Then no new length or layout compiles anything. Numbers must be parameters of their own: in a
    tuple Triton specialises each of them, `do_not_specialize` or not.
    """
    import triton  # here, because this module is imported where there is no Triton

    numbers = [
        name
        for name, parameter in inspect.signature(kernel).parameters.items()
        if not name.endswith("_ptr") and "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(kernel, do_not_specialize=numbers)


class Kernel:
    """A jitted kernel, its configurations, and a launch with little host time.

    The first of `configs` runs; nothing is measured at run time. `python -m bench ... --tune`
    measures them all, and a commit puts the fastest first.

    Triton's own launch inspects every argument to find the compiled kernel. This one inspects only
    those that can decide it (`key`), and from the second launch on calls the compiled kernel
    directly. That needs parameters in this order: tensors, called `*_ptr`; numbers, all in
    `do_not_specialize` (see `jit`); compile-time values, with those of `configs` last.

    Raises:
        ValueError: parameters in another order, or a number that specialises.
    """

    def __init__(self, function: Any, configs: Sequence[Config]) -> None:
        self.function, self.configs = function, tuple(configs)
        self._compiled_by: dict[Hashable, dict[Hashable, Any]] = {}  # configuration, then key
        self._read_parameters()
        self._choose(self.configs[0])

    def _read_parameters(self) -> None:
        parameters = inspect.signature(self.function.fn).parameters
        names = list(parameters)
        kinds = [
            2 if "constexpr" in str(p.annotation) else 0 if name.endswith("_ptr") else 1
            for name, p in parameters.items()
        ]
        free = getattr(self.function, "do_not_specialize", None) or ()  # the interpreter has none
        numbers = [name for name, kind in zip(names, kinds, strict=True) if kind == 1]
        specialised = [name for name in numbers if name not in free and not INTERPRET]
        check(
            kinds == sorted(kinds) and not specialised,
            f"Kernel: {self.function.fn.__name__} must take tensors, then numbers that are all in"
            f" do_not_specialize, then compile-time values, got {names}, of which {specialised}"
            " specialise",
        )
        self._numbers, self._constants = kinds.count(0), len(names) - kinds.count(2)
        self._watched = [i for i in range(self._numbers) if names[i] not in free]

    def _choose(self, config: Config) -> None:
        self.config = config
        self._compiled = self._compiled_by.setdefault(tuple(config.items()), {})
        self._blocks = [value for name, value in config.items() if name.isupper()]

    def key(self, args: tuple[Any, ...]) -> Hashable | None:
        """What decides which compiled kernel `args` need; None if Triton has to find it.

        Triton specialises for addresses that are multiples of 16 and for 32-bit numbers. If all
        arguments are such, only device, dtypes and compile-time values are left.
        """
        addresses = 0
        for i in self._watched:
            addresses |= args[i].data_ptr()
        if addresses % 16 or max(args[self._numbers : self._constants], default=0) >= 2**31:
            return None
        dtypes = tuple(map(_dtype_of, args[: self._numbers]))
        return args[0].get_device(), dtypes, args[self._constants :]

    def launch(self, programs: int, *args: Any) -> None:
        """Run `programs` programs on the current stream of the current device.

        Args:
            programs: size of the grid.
            args: the kernel's arguments in order, without those that the configuration gives.
        """
        if programs == 0:
            return
        key = None if INTERPRET or HIP else self.key(args)
        compiled = None if key is None else self._compiled.get(key)
        if compiled is None:
            # From Triton 3.10 on the fusion of products and sums is off by default.
            compiled = self.function[programs, 1, 1](*args, **self.config, enable_fp_fusion=True)
            if key is not None:
                self._compiled[key] = compiled
        else:
            compiled[programs, 1, 1](*args, *self._blocks)

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        """Launch with another configuration within the block; for benchmarks and tests."""
        previous = self.config
        self._choose(config)
        try:
            yield
        finally:
            self._choose(previous)


def documented(reference: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a public function: it gets its reference's docstring, and `public` wraps it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function.__doc__ = reference.__doc__
        return public(function)

    return decorate
