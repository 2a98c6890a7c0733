"""The virtual GPU: it raises the errors of a GPU, and results have the right device."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import virtual_gpu
from conftest import GPU, INTERPRET
from torch import nn
from virtual_gpu import DeviceFault

pytestmark = pytest.mark.skipif(GPU, reason="there is a real one")


@pytest.fixture(autouse=True)
def present(virtual):
    """A virtual GPU, whether or not the run has one; faults are expected here."""
    if virtual:
        yield
    else:
        with virtual_gpu.present():
            yield
    virtual_gpu.faults.clear()


@pytest.fixture
def x():
    return torch.arange(6.0, device="cuda").view(2, 3)


def all_on_gpu(*tensors):
    return all(t.is_cuda and t.device == torch.device("cuda:0") for t in tensors)


HOST = torch.arange(6.0).view(2, 3)
ROWS = torch.tensor([0, 1])
NUMBER = torch.tensor(2.0)

MIXED = {
    "add": lambda x: x + HOST,
    "add from the other side": lambda x: HOST * x,
    "in place": lambda x: x.add_(HOST),
    "a CPU scalar in place": lambda x: NUMBER.add_(x[0, 0]),
    "a CPU array and a GPU scalar": lambda x: HOST + x[0, 0],
    "matmul": lambda x: x @ HOST.T,
    "cat": lambda x: torch.cat([x, HOST]),
    "stack of scalars": lambda x: torch.stack([x[0, 0], NUMBER]),
    "where": lambda x: torch.where(x > 1, x, HOST),
    "searchsorted": lambda x: torch.searchsorted(x[0], HOST),
    "equal": lambda x: torch.equal(x, HOST),
    "out": lambda x: torch.add(x, x, out=torch.empty(2, 3)),
    "embedding": lambda x: F.embedding(ROWS, x),
    "linear": lambda x: F.linear(x, HOST),
    "a layer": lambda x: nn.Linear(3, 2)(x),
    "index_select": lambda x: x.index_select(0, ROWS),
    "gather": lambda x: x.gather(0, torch.zeros(2, 3).long()),
    "masked_fill": lambda x: x.masked_fill(HOST > 1, 0),
    "a GPU index": lambda x: HOST[x[0].long() % 2],
    "a GPU mask": lambda x: HOST[x > 1],
    "CPU values": lambda x: x.__setitem__(ROWS, HOST),
    "a gradient": lambda x: setattr(nn.Parameter(x), "grad", HOST),
    "a generator": lambda x: torch.rand(2, device="cuda", generator=torch.Generator()),
    "places to split": lambda x: x.tensor_split(torch.tensor([1], device="cuda")),
    "pinning": lambda x: x.pin_memory(),
    "numpy": lambda x: x.numpy(),
    "an array of it": lambda x: x.__array__(),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_devices_are_refused(x, case):
    with pytest.raises(DeviceFault, match=r"tests/test_virtual_gpu.py:\d"):
        MIXED[case](x)
    assert len(virtual_gpu.faults) == 1


def test_a_caught_fault_is_recorded(x):
    try:
        x + HOST
    except RuntimeError:
        assert "torch.Tensor.add" in virtual_gpu.faults[0]
        assert "(2, 3) on cuda:0, (2, 3) on cpu" in virtual_gpu.faults[0]


def test_numpy_raises_a_type_error(x):
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()


PASSES = {
    "a CPU scalar": lambda x: (x * NUMBER, NUMBER - x, x.clone().add_(NUMBER)),
    "a CPU scalar of where and clamp": lambda x: (
        torch.where(x > 1, x, NUMBER),
        x.clamp(min=NUMBER),
    ),
    "CPU indices": lambda x: (x[ROWS], x[ROWS, ROWS], x[HOST > 1], x[ROWS[1]]),
    "operations": lambda x: (x @ x.T, torch.cat([x, x]), torch.stack([x, x]), x.sum(), x > 1),
    "functions": lambda x: (F.silu(x), F.linear(x, x), F.pad(x, (1, 1)), F.softmax(x, -1)),
    "views": lambda x: (
        x[0],
        x.T,
        x.view(-1),
        x.data,
        x.detach(),
        x.expand(2, 2, 3),
        *x,
        *x.split(1),
    ),
    "like another": lambda x: (
        torch.zeros_like(x),
        x.new_zeros(3),
        x.new_tensor([1]),
        torch.tensor(x),
    ),
    "factories": lambda x: tuple(
        f(2, device=d)
        for f in (torch.ones, torch.empty, torch.arange, torch.randn)
        for d in ("cuda", "cuda:0", torch.device("cuda"), 0)
    ),
    "copies": lambda x: (HOST.to("cuda"), HOST.to(x), HOST.cuda(), HOST.to("cuda", torch.int32)),
    "asynchronous": lambda x: (
        HOST.pin_memory().to("cuda", non_blocking=True),
        HOST.to(device="cuda"),
    ),
    "copied into": lambda x: (x.clone().copy_(HOST), copy.deepcopy(x), copy.copy(x)),
    "shapes of CPU tensors": lambda x: (x.view_as(HOST), x[:1].expand_as(HOST)),
    "several results": lambda x: (*x.max(0), *torch.sort(x), *torch.unique(x, return_counts=True)),
}


@pytest.mark.parametrize("case", PASSES)
def test_what_a_gpu_allows(x, case):
    assert all_on_gpu(*PASSES[case](x))
    assert not virtual_gpu.faults


def test_cpu_tensors_stay_on_the_cpu(x):
    made = [torch.ones(2), torch.zeros(2, device="cpu"), torch.empty_like(x, device="cpu"), x.cpu()]
    made += [x.to("cpu"), x.to(HOST), x.to("cpu", torch.float64), torch.tensor([x[0, 0], 1.0])]
    made += [torch.arange(int(x[0, 2])), HOST.clone().copy_(x), HOST[0], torch.as_tensor(HOST)]
    for t in made:
        assert not t.is_cuda
        assert t.is_cpu
        assert t.device.type == "cpu"
        assert t.get_device() == -1
    assert x.cpu().numpy().tolist() == HOST.tolist() == x.tolist()
    assert x.to("meta").is_meta


def test_copies_between_devices_share_no_memory(x):
    host = HOST.clone()
    copied = host.to("cuda")
    copied += 1
    assert torch.equal(host, HOST)
    back = copied.cpu()
    back += 1
    assert torch.equal(copied.cpu(), HOST + 1)
    assert x.to("cuda") is x
    assert x.cuda() is x
    assert host.cpu() is host


def test_assignments(x):
    x[0] = HOST[1]  # a copy
    x[ROWS] = 1.0
    x[ROWS[0]] = NUMBER
    x.data = HOST
    assert x.device.type == "cpu"
    pinned = torch.empty(3, pin_memory=True)
    assert pinned.is_pinned()
    assert not HOST.is_pinned()


def test_modules_and_gradients():
    layer = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    assert not any(p.is_cuda for p in layer.parameters())
    layer.to("cuda")
    assert all_on_gpu(*layer.parameters())
    assert all_on_gpu(*copy.deepcopy(layer).parameters())
    x = torch.ones(2, 3, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    assert all_on_gpu(x.grad, *(p.grad for p in layer.parameters()))
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert all_on_gpu(gradient)
    y = torch.ones(3, requires_grad=True)
    (y.to("cuda") * 2).sum().backward()
    assert y.grad.device.type == "cpu"
    layer.cpu()
    assert not any(p.is_cuda or p.grad.is_cuda for p in layer.parameters())


class Doubled(torch.autograd.Function):
    seen = []

    @staticmethod
    def forward(ctx, x, same):
        y = x * 2
        ctx.save_for_backward(x, y)
        return y, same

    @staticmethod
    def backward(ctx, gradient, _):
        Doubled.seen += [gradient.device, *(t.device for t in ctx.saved_tensors)]
        return gradient * torch.full((), 2.0), None


def test_autograd_functions(x):
    Doubled.seen.clear()
    y, same = Doubled.apply(x.requires_grad_(), x.detach())
    assert all_on_gpu(y, same)
    y.sum().backward()
    assert all_on_gpu(x.grad)
    assert Doubled.seen == [torch.device("cuda:0")] * 3


def test_mixed_devices_in_the_backward_pass_are_refused(x):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(2, 3)

    y = Wrong.apply(x.requires_grad_())
    with pytest.raises(DeviceFault, match=r"Tensor\.mul"):
        y.sum().backward()


def test_gradient_checkpointing_recomputes_on_the_gpu(x):
    seen = []

    def double(x):
        seen.append(x.device.type)
        return (x * torch.full((), 2.0, device=x.device)).sin()

    y = torch.utils.checkpoint.checkpoint(double, x.requires_grad_(), use_reentrant=False)
    y.sum().backward()
    assert seen == ["cuda", "cuda"]
    assert all_on_gpu(x.grad)


def test_default_devices():
    with torch.device("cuda"):
        assert all_on_gpu(torch.ones(2), torch.tensor(1.0), nn.Linear(2, 2).weight)
    assert not torch.ones(2).is_cuda
    with torch.device("meta"):
        assert torch.ones(2).is_meta


def test_other_threads_are_intercepted(x):
    found = []
    thread = threading.Thread(target=lambda: found.append(x + torch.ones(3, device="cuda")))
    thread.start()
    thread.join()
    assert all_on_gpu(*found)


def test_autocast(x):
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.is_autocast_enabled("cuda")
        y = x @ x.T
    assert all_on_gpu(y)
    assert y.dtype == torch.bfloat16
    assert (x @ x.T).dtype == torch.float32


def test_assert_close_compares_on_one_device(x):
    torch.testing.assert_close(x.cpu(), HOST)
    with pytest.raises(AssertionError, match="device"):
        torch.testing.assert_close(x, HOST)


def test_torch_cuda_reports_one_gpu():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 1
    assert torch.cuda.get_device_capability(0) == (9, 0)
    assert torch.cuda.get_device_properties(0).multi_processor_count == 132
    with torch.cuda.device(0), torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()


def test_a_second_gpu_is_refused():
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="cuda:1")


def test_absent_disables_it(x):
    with virtual_gpu.absent():
        assert not torch.cuda.is_available()
        assert not x.is_cuda
        assert torch.equal(x, HOST)
    assert all_on_gpu(x)


def record(function):
    return virtual_gpu.capture(function, 2)


def test_a_replay_writes_to_the_captured_addresses(x):
    total, seen = torch.zeros(2, 3, device="cuda"), []

    def step():
        doubled = x * 2
        total.add_(doubled[:, :2].sum())
        seen.append(doubled)

    graph = record(step)
    assert total[0, 0] == 2 * 2 * 8  # by the warm-ups; a capture executes nothing
    x.add_(1)
    graph.replay()
    assert total[0, 0] == 2 * 2 * 8 + 2 * 12
    assert torch.equal(seen[-1], x * 2)
    assert len(seen) == 3


NOT_CAPTURED = {
    "a value": lambda x: x[0, 0].item(),
    "a condition": lambda x: bool(x[0, 0] > 1),
    "a copy to the CPU": lambda x: x.cpu(),
    "a copy from pageable memory": lambda x: x.copy_(HOST),
    "a constant": lambda x: torch.tensor([1.0], device="cuda"),
    "a mask": lambda x: x[x > 1],
    "CPU indices": lambda x: x[ROWS],
}


@pytest.mark.parametrize("case", NOT_CAPTURED)
def test_what_a_capture_refuses(x, case):
    with pytest.raises(ValueError, match=r"must be capturable.*when stream is capturing"):
        record(lambda: NOT_CAPTURED[case](x))


@pytest.mark.kernel
@pytest.mark.skipif(not INTERPRET, reason="runs a kernel")
def test_a_kernel_cannot_read_cpu_memory(x):
    from comemo_kernels import apply_rotary, rotary

    table = torch.ones(4, 2, device="cuda")
    q = torch.ones(1, 4, 2, 4, device="cuda")
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert all_on_gpu(apply_rotary(q, None, table, table, ids.to("cuda"))[0])
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        rotary.rotary_kernel.function[1,](ids)
