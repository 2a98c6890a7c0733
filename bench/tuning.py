"""`--tune`: run a way in every configuration that its kernels ship."""

import functools
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

from bench.ways import Row, Ways
from comemo_kernels._op import Config, Kernel


def each_configuration(kernels: dict[str, Kernel], way: Callable[[int], Any]) -> Ways:
    """A way for every configuration of every kernel; the other kernels use their first.

    If the kernel is not launched in a way, its first call raises RuntimeError.
    """

    def call(i: int, kernel: Kernel, config: Config, checked: list[bool]) -> Any:
        with kernel.using(config):
            if checked:
                return way(i)
            found, launched = watch(kernel, functools.partial(way, i))
            if not launched:
                raise RuntimeError(f"{kernel.function.fn.__name__} was not launched")
            checked.append(True)
            return found

    return {
        f"{name} {config}": functools.partial(call, kernel=kernel, config=config, checked=[])
        for name, kernel in kernels.items()
        for config in kernel.configs
    }


def watch(kernel: Kernel, call: Callable[[], Any]) -> tuple[Any, bool]:
    """The result of a call, and whether it launched the kernel."""
    launches = []

    def launch(*args: Any, launch: Callable[..., None] = kernel.launch) -> None:
        launches.append(args)
        launch(*args)

    with mock.patch.object(kernel, "launch", launch):
        return call(), bool(launches)


def tell_configurations(rows: Iterable[Row], kernels: dict[str, Kernel]) -> Iterator[Row]:
    """Add kernel, configuration and whether it is the first to rows of `each_configuration`."""
    for row in rows:
        name, _, config = row["way"].partition(" {")
        known = {str(c).removeprefix("{"): c for c in kernels[name].configs}
        first = known[config] is kernels[name].configs[0]
        yield row | {"kernel": name, "config": in_words(known[config]), "first": first}


def in_words(config: Config) -> str:
    """For {"BLOCK_M": 64, "num_warps": 4} the text "M 64 warps 4"."""
    return " ".join(
        f"{k.removeprefix('BLOCK_').removeprefix('num_')} {v}" for k, v in config.items()
    )


def with_descriptors(
    module: ModuleType, may: bool, way: Callable[[int], Any]
) -> Callable[[int], Any]:
    """The same way with `USE_TMA` of a kernel's module: whether it may use tensor descriptors."""

    def call(i: int) -> Any:
        with mock.patch.object(module, "USE_TMA", may):
            return way(i)

    return call
