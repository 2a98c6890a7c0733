"""Kernels run on the device of their tensors, whichever device is the current one."""

import contextlib

import pytest
import torch
import valid_calls as valid
from torch import Tensor
from torch.utils._pytree import tree_leaves

from comemo_kernels import _op, distance_table, memory_tensors

CALLS = {
    "apply_rotary": {"inplace": False},
    "apply_rotary by grids": {},
    "attend_spans": {"workspace": None},
    "attend_spans in float8": {},
    "attend_gated": {},
    "build_memory": {},
    "build_memory in float8": {},
    "project_memory": {},
    "append_images": {},
    "norm_linear": {},
    "norm_swiglu": {},
    "gated_residual": {},
    "gated_swiglu": {},
    "project_tiles": {"media": None, "embeds": None, "rows": None},
    "rope_dhr_positions": {},
}
LEARNING = {"q", "k", "v", "x", "a", "media", "tokens", "weight", "gate_weight", "kv_weights"}
WITHOUT_GRADIENTS = {"build_memory", "append_images", "rope_dhr_positions", "in float8", "by grids"}


@pytest.fixture
def launches(monkeypatch):
    """(current device, device of the tensors) of each launch; tensors are on another device."""
    device, found, real = [torch.cuda.current_device() + 1], [], _op.Kernel.launch

    @contextlib.contextmanager
    def enter(index):
        device.append(index)
        yield
        device.pop()

    def launch(kernel, programs, *args):
        found.append((device[-1], args[0].get_device()))
        real(kernel, programs, *args)

    monkeypatch.setattr(_op.Kernel, "launch", launch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[-1])
    monkeypatch.setattr(torch.cuda, "device", enter)
    return found


@pytest.mark.kernel
@pytest.mark.parametrize("name", CALLS)
def test_every_launch_is_on_the_device_of_its_tensors(name, launches, device):
    function, right = valid.CALLS[name](device)
    function(**right)
    assert launches
    assert all(current == own for current, own in launches)


@pytest.mark.kernel
@pytest.mark.parametrize(
    "name", [name for name in CALLS if not any(part in name for part in WITHOUT_GRADIENTS)]
)
def test_every_launch_of_a_gradient_is_on_the_device_of_its_tensors(name, launches, device):
    function, right = valid.CALLS[name](device)
    right |= CALLS[name]
    learning = [value for part, value in right.items() if part in LEARNING]
    leaves = [leaf for leaf in tree_leaves(learning) if leaf is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    results = [t for t in tree_leaves(function(**right)) if isinstance(t, Tensor)]
    forward = len(launches)
    sum(t.sum() for t in results).backward()
    assert all(leaf.grad is not None for leaf in leaves)
    assert all(current == own for current, own in launches)
    assert len(launches) > forward or name == "gated_residual"  # its gradient is PyTorch's products


def test_a_table_for_the_current_device_follows_it(monkeypatch):
    monkeypatch.setattr(memory_tensors, "_known_table", lambda *args: args[-1])
    for index in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        assert distance_table(8, 1e4, 50, "cuda") == torch.device("cuda", index)
    assert distance_table(8, 1e4, 50, "cuda:3") == torch.device("cuda:3")
    assert distance_table(8, 1e4, 50, "cpu") == torch.device("cpu")
