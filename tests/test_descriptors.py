"""A launch that needs tensor descriptors sets Triton's allocator and restores it afterwards."""

import contextvars
import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime import _allocation

from comemo_kernels import _attend_tma, _descriptors

if not _descriptors.AVAILABLE:
    pytest.skip("triton below 3.4 makes no descriptors in a kernel", allow_module_level=True)


def users(size, alignment, stream):
    raise AssertionError("the user's allocator must not be called")


def launch(monkeypatch, run):
    monkeypatch.setattr(_attend_tma.attend_tma, "launch", run)
    q = torch.empty(1, 256, 4, 64, dtype=torch.bfloat16)
    spans = torch.zeros(1, 1, 2, dtype=torch.int64)
    _attend_tma.launch(q, q[..., 0], q, q[0], q[0], spans, *[None] * 5)
    return weakref.ref(q)


@pytest.fixture(params=["a context variable", "a module attribute"])
def held(request, monkeypatch):
    """Returns the allocator that Triton uses, stored as in 3.6 or as in 3.4."""
    if request.param == "a module attribute":
        monkeypatch.setattr(_allocation, "_allocator", users)
        monkeypatch.setattr(
            triton, "set_allocator", lambda allocator: setattr(_allocation, "_allocator", allocator)
        )
        return lambda: _allocation._allocator
    variable = contextvars.ContextVar("allocator", default=users)
    monkeypatch.setattr(_allocation, "_allocator", variable)
    monkeypatch.setattr(triton, "set_allocator", variable.set)
    return variable.get


def test_a_launch_sets_its_own_allocator_and_restores_the_users(monkeypatch, held):
    asked = []
    q = launch(monkeypatch, lambda *args: asked.append(held()))
    assert asked == [_descriptors._allocate]
    assert held() is users
    gc.collect()
    assert q() is None


def test_a_launch_that_fails_restores_the_users_allocator(monkeypatch, held):
    def fail(*args):
        raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError, match="out of resources"):
        launch(monkeypatch, fail)
    assert held() is users


def test_the_current_allocator_is_found():
    """With the installed Triton."""
    previous = _descriptors._allocator()
    triton.set_allocator(users)
    try:
        assert _descriptors._allocator() is users
    finally:
        triton.set_allocator(previous)


@pytest.mark.gpu
def test_memory_for_descriptors_is_on_the_current_device():
    held = _descriptors._allocate(256, 128, None)
    assert held.is_cuda
    assert held.nbytes == 256
    assert held.data_ptr() % 128 == 0
