"""Public operations on DTensors: results and gradients are those of one process."""

import sys
import traceback

import pytest
import torch
from rank_processes import run_ranks
from sharded_calls import (
    CASES,
    FLOAT8,
    GRID_CASES,
    HALVES,
    ROWS,
    SUM,
    TOKENS,
    WHOLE,
    DTensor,
    built,
    changed,
    linear,
    place,
    tensor,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import comemo_kernels as ops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]


def learning(name, x):
    """A leaf that requires grad if the operations have a gradient for it."""
    fixed = not x.is_floating_point() or x.dtype == FLOAT8 or "." in name or name in ("cos", "sin")
    return x.clone() if fixed else x.clone().requires_grad_()


def leaves(args):
    found = []
    for name, value in args.items():
        changed(name, value, lambda path, x: found.append((path, x)) if x.requires_grad else None)
    return found


def flat(result):
    return [t for part in result for t in flat(part)] if isinstance(result, tuple) else [result]


class Collectives(TorchDispatchMode):
    """Collects names of collectives. (PyTorch's CommDebugMode imports its compiler: 4 s.)"""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # then its operations on local tensors come here
        if "c10d" in func.namespace:
            self.names.append(str(func))
        return func(*args, **kwargs or {})


def compare(verb, make, places, wanted, mesh):
    """Results and gradients with DTensors are those of whole tensors."""

    def set_place(path, x):
        if path.rpartition(".")[2] in ("cos", "sin") and path not in places:
            return x  # a plain tensor is whole
        held = places.get(path, WHOLE)
        return place(x, mesh, held if isinstance(held, tuple) else (held,) * mesh.ndim)

    torch.manual_seed(0)
    args = {name: changed(name, x, learning) for name, x in make().items()}
    ours = {name: changed(name, x, set_place) for name, x in args.items()}
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    function = getattr(ops, verb)
    whole = flat(function(**args))
    with Collectives() as collectives:
        found = flat(function(**ours))
    assert not collectives.names
    losses = []
    for results in (whole, found):
        loss, generator = 0, torch.Generator().manual_seed(1)
        for t in results:
            if t is not None:
                t = t.full_tensor() if isinstance(t, DTensor) else t
                loss = loss + (t * torch.randn(t.shape, generator=generator)).sum()
        losses.append(loss)
    for ours_t, t in zip(found, whole, strict=True):
        assert (ours_t is None) == (t is None)
        if t is not None:
            assert ours_t.placements == wanted
            assert ours_t.shape == t.shape
            assert ours_t.full_tensor().shape == t.shape
            assert_close(ours_t.full_tensor(), t)
    named = leaves(args)
    if not named:
        return
    for loss in losses:
        loss.backward()
    for (path, t), (_, ours_t) in zip(named, leaves(ours), strict=True):
        held = tuple(WHOLE if p == SUM else p for p in ours_t.placements)
        assert ours_t.grad.placements == held, path
        assert_close(ours_t.grad.full_tensor(), t.grad, msg=lambda told, path=path: path + told)


def outcomes(cases, shape):
    """For each case "" or what went wrong, on this rank."""
    torch.manual_seed(0)
    mesh, told = tensor.init_device_mesh("cpu", shape), {}
    for name, case in cases.items():
        try:
            compare(name.split()[0], *case, mesh)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
    return told


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """DTensor imports PyTorch's compiler, for 2 s: here, and not in every rank."""
    import torch._dynamo  # noqa: F401


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(2, outcomes, CASES, (2,))


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_one_process(name, on_two_ranks):
    assert [told[name] for told in on_two_ranks] == ["", ""]


def test_each_dimension_of_a_mesh_has_a_split_of_its_own():
    for told in run_ranks(4, outcomes, GRID_CASES, (2, 2)):
        assert set(told.values()) == {""}, told


def test_gradients_pass_from_one_operation_to_the_one_before():
    """Through sums over the ranks, because weights are split; and x is gathered meanwhile."""

    def chain():
        mesh = tensor.init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        whole = [torch.randn(n, 8).requires_grad_() for n in (3, 8, 6)]
        ours = [place(t, mesh, (p,)) for t, p in zip(whole, (ROWS, WHOLE, ROWS), strict=True)]
        x = ours[0].redistribute(placements=[WHOLE], async_op=True)
        assert type(x._local_tensor) is not torch.Tensor  # it is not there yet
        y = ops.norm_linear(ops.norm_linear(x, None, ours[1]), None, ours[2]).full_tensor()
        wanted = ops.norm_linear(ops.norm_linear(whole[0], None, whole[1]), None, whole[2])
        assert_close(y, wanted)
        for result in (y, wanted):
            result.pow(3).sum().backward()
        for t, found in zip(whole, ours, strict=True):
            assert found.grad.placements == found.placements
            assert_close(found.grad.full_tensor(), t.grad)

    run_ranks(2, chain)


def test_keys_and_values_are_built_in_place():
    """`build_memory` writes into the ranks' parts of the buffers."""

    def build():
        mesh = tensor.init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        args = built()
        places = {"kv_weights": HALVES, "keys": TOKENS, "values": TOKENS}
        ours = {
            name: changed(name, x, lambda path, t: place(t, mesh, (places.get(path, WHOLE),)))
            for name, x in args.items()
        }
        assert ops.build_memory(**args) is None
        assert ops.build_memory(**ours) is None
        for name in ("keys", "values"):
            for found, wanted in zip(ours[name], args[name], strict=True):
                assert wanted.any()
                assert_close(found.full_tensor(), wanted)

    run_ranks(2, build)


def test_plain_tensors_need_no_torch_distributed(monkeypatch):
    """A build without it has no such module."""
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)
    monkeypatch.delitem(sys.modules, "comemo_kernels._sharded", raising=False)
    assert ops.norm_linear(**linear()).shape == (2, 3, 6)
    with pytest.raises(ValueError, match="norm_linear: weight must be a dense tensor"):
        ops.norm_linear(**linear() | {"weight": 3})
