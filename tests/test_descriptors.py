"""A kernel that makes descriptors borrows Triton's allocator for its launch, and keeps nothing."""

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
    raise AssertionError("the user's allocator is not asked")


def launch(monkeypatch, run):
    monkeypatch.setattr(_attend_tma.attend_tma, "launch", run)
    q = torch.empty(1, 256, 4, 64, dtype=torch.bfloat16)
    spans = torch.zeros(1, 1, 2, dtype=torch.int64)
    parts = torch.empty(1, 4, 256, 64)
    _attend_tma.launch(q, q[..., 0], parts, parts, q, q[0], q[0], spans, *[None] * 5)
    return weakref.ref(q)


@pytest.fixture(params=["a variable of the context", "a module's own"])
def held(request, monkeypatch):
    """What Triton asks in a launch, as 3.6 and as 3.4 keep it."""
    if request.param == "a module's own":
        monkeypatch.setattr(_allocation, "_allocator", users)
        monkeypatch.setattr(
            triton, "set_allocator", lambda allocator: setattr(_allocation, "_allocator", allocator)
        )
        return lambda: _allocation._allocator
    variable = contextvars.ContextVar("allocator", default=users)
    monkeypatch.setattr(_allocation, "_allocator", variable)
    monkeypatch.setattr(triton, "set_allocator", variable.set)
    return variable.get


def test_a_launch_has_its_own_allocator_and_leaves_the_users(monkeypatch, held):
    asked = []
    q = launch(monkeypatch, lambda *args: asked.append(held()))
    assert asked == [_descriptors._allocate]
    assert held() is users
    gc.collect()
    assert q() is None


def test_a_launch_that_fails_leaves_the_users_allocator(monkeypatch, held):
    def fail(*args):
        raise RuntimeError("out of resources")

    with pytest.raises(RuntimeError, match="out of resources"):
        launch(monkeypatch, fail)
    assert held() is users


def test_the_allocator_that_is_found_is_the_one_that_was_set():
    """By the Triton that is installed."""
    previous = _descriptors._allocator()
    triton.set_allocator(users)
    try:
        assert _descriptors._allocator() is users
    finally:
        triton.set_allocator(previous)


@pytest.mark.gpu
def test_memory_for_descriptors_is_of_the_current_device():
    held = _descriptors._allocate(256, 128, None)
    assert held.is_cuda
    assert held.nbytes == 256
    assert held.data_ptr() % 128 == 0
