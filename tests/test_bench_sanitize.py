"""Small launches for compute-sanitizer: each kernel has one, and its outputs are finite."""

import importlib
import pkgutil

import pytest
import torch
from conftest import SLOW_ON_CPU

pytest.importorskip("triton")

import comemo_kernels
from bench import sanitize
from comemo_kernels._op import Kernel

pytestmark = pytest.mark.kernel


def kernels():
    modules = pkgutil.iter_modules(comemo_kernels.__path__, "comemo_kernels.")
    held = [vars(importlib.import_module(module.name)) for module in modules]
    return {
        id(value): f"{name} of {names['__name__']}"
        for names in held
        for name, value in names.items()
        if isinstance(value, Kernel)
    }


@SLOW_ON_CPU
def test_every_kernel_is_launched_and_writes_finite_values(device, monkeypatch):
    launch, launched = Kernel.launch, set()

    def watched(self, programs, *args):
        if programs:
            launched.add(id(self))
        launch(self, programs, *args)

    monkeypatch.setattr(Kernel, "launch", watched)
    for name, run in sanitize.cases(device).items():
        found = run()
        for t in found if isinstance(found, list | tuple) else [found]:
            assert t.numel(), name
            assert torch.isfinite(t.float()).all(), name
    assert not [name for kernel, name in kernels().items() if kernel not in launched]
