"""What operations share: launches with a key, devices, versions of written tensors."""

import types

import pytest
import torch

from comemo_kernels import _op

tl = pytest.importorskip("triton.language")


class Recorder:
    """Replaces a jitted function and its compiled kernel, and records launches."""

    do_not_specialize = ("gate_ptr", "num_rows", "eps")

    def __init__(self, compiled=None):
        self.calls, self.compiled = [], compiled

    def __getitem__(self, grid):
        def call(*args, **options):
            self.calls.append((grid, args, options))
            return self.compiled

        return call

    @staticmethod
    def fn(x_ptr, gate_ptr, num_rows: tl.int64, eps, EVEN: tl.constexpr, BLOCK: tl.constexpr):
        """The parameters."""


@pytest.fixture
def compiles(monkeypatch):
    """Launches as without the interpreter."""
    monkeypatch.setattr(_op, "INTERPRET", False)


def make_kernel():
    compiled = Recorder()
    configs = [{"BLOCK": 8, "num_warps": 4}, {"BLOCK": 16, "num_warps": 2}]
    function = Recorder(compiled)
    return _op.Kernel(function, configs), function, compiled


def aligned(dtype=torch.float32):
    """64 elements at an address that is a multiple of 16."""
    x = torch.empty(72, dtype=dtype)
    return x[-x.data_ptr() % 16 // x.element_size() :][:64]


X = aligned()


def test_a_known_key_calls_the_compiled_kernel(compiles):
    kernel, function, compiled = make_kernel()
    for n in (1, 2, 3):
        kernel.launch(5, X, X, n, 0.5, True)
    assert function.calls == [
        ((5, 1, 1), (X, X, 1, 0.5, True), {"BLOCK": 8, "num_warps": 4, "enable_fp_fusion": True})
    ]
    assert compiled.calls == [((5, 1, 1), (X, X, n, 0.5, True, 8), {}) for n in (2, 3)]


def test_keys_differ_where_the_compiled_kernel_does(compiles):
    kernel, function, _ = make_kernel()
    kernel.launch(5, X, X, 1, 0.5, True)
    for args in (
        (X, X, 1, 0.5, False),
        (aligned(torch.bfloat16), X, 1, 0.5, True),
        (X, aligned(torch.float16), 1, 0.5, True),
    ):
        before = len(function.calls)
        for _ in range(2):
            kernel.launch(5, *args)
        assert len(function.calls) == before + 1


@pytest.mark.parametrize(
    "args",
    [(X[1:], X, 1, 0.5, True), (X, X, 2**31, 0.5, True)],
    ids=["an odd address", "a number of more than 32 bits"],
)
def test_without_a_key_triton_finds_the_kernel_every_time(compiles, args):
    kernel, function, compiled = make_kernel()
    for _ in range(3):
        kernel.launch(5, *args)
    assert len(function.calls) == 3
    assert not compiled.calls


def test_an_address_that_does_not_specialise_is_not_in_the_key():
    kernel, _, _ = make_kernel()
    assert kernel.key((X, X[1:], 1, 0.5, True)) == kernel.key((X, X, 1, 0.5, True)) is not None


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda num_rows, x_ptr: None, "must take tensors, then numbers"),
        (lambda x_ptr, num_columns: None, r"of which \['num_columns'\] specialise"),
    ],
)
def test_a_kernel_without_a_valid_key_raises(compiles, fn, message):
    function = Recorder()
    function.fn = fn
    with pytest.raises(ValueError, match=message):
        _op.Kernel(function, [{"num_warps": 4}])


@_op.jit
def _sample_kernel(x_ptr, scales_ptr, num_rows, stride: tl.int64, EVEN: tl.constexpr):
    tl.store(x_ptr + stride, num_rows)


@pytest.mark.skipif(_op.INTERPRET, reason="the interpreter specialises nothing")
def test_no_number_of_a_jitted_kernel_specialises():
    assert _sample_kernel.do_not_specialize == ["num_rows", "stride"]
    assert _op.Kernel(_sample_kernel, [{"num_warps": 4}]).key((X, X, 1, 2, True)) is not None


def test_an_empty_grid_is_not_launched():
    kernel, function, _ = make_kernel()
    kernel.launch(0, X, X, 1, 0.5, True)
    assert not function.calls


def test_another_configuration_lasts_for_a_block_of_code(compiles):
    kernel, function, compiled = make_kernel()
    args = (1, X, X, 1, 0.5, True)
    kernel.launch(*args)

    def fail_within():
        with kernel.using(kernel.configs[1]):
            kernel.launch(*args)
            kernel.launch(*args)
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        fail_within()
    kernel.launch(*args)
    assert [options["BLOCK"] for _, _, options in function.calls] == [8, 16]
    assert [args[-1] for _, args, _ in compiled.calls] == [16, 8]


def test_configurations_are_compared_by_value(compiles):
    """Identity is not enough: a dictionary may change, or reuse the address of a deleted one."""
    kernel, function, _ = make_kernel()
    config = {"BLOCK": 32, "num_warps": 4}
    for block in (32, 64, 32):
        config["BLOCK"] = block
        with kernel.using(config):
            kernel.launch(1, X, X, 1, 0.5, True)
    assert [options["BLOCK"] for _, _, options in function.calls] == [32, 64]


def test_a_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)

        def __exit__(self, *_):
            entered.append("left")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    guarded = _op._on_its_device(lambda xs: entered.append("launched"))
    for index, wanted in ((-1, []), (0, []), (1, [1])):
        entered.clear()
        guarded([types.SimpleNamespace(get_device=lambda index=index: index)])
        assert entered == [*wanted, "launched", *(["left"] if wanted else [])]


def test_arguments_that_a_schema_marks_as_written_get_a_new_version():
    x, y, z = (torch.zeros(1) for _ in range(3))
    versioned = _op._with_versions(lambda *args: None, [0, 2, 3])
    versioned([x, y], z, None, z)
    assert [t._version for t in (x, y, z)] == [1, 1, 1]
    with torch.inference_mode():
        versioned([torch.zeros(1)], z, None, x)


def test_a_small_tensor_is_copied_to_its_device(device):
    values = torch.arange(3)
    assert _op.to_device(values, None).device.type == "cpu"
    assert torch.equal(_op.to_device(values, device).cpu(), values)


@pytest.mark.gpu
def test_threads_and_devices_of_a_gradient(device):
    """Autograd computes the gradient in a thread of its own, on the device of the tensors."""
    from comemo_kernels import apply_rotary, reference, rotary_table

    last = f"cuda:{torch.cuda.device_count() - 1}"  # not the current device, if there are several
    cos, sin = (t[0].to(last) for t in rotary_table(torch.arange(9)[None], 64))
    q = torch.randn(9, 4, 64, device=last, requires_grad=True)
    weight = torch.randn_like(q)
    grads = []
    for op in (apply_rotary, reference.apply_rotary):
        (op(q, None, cos, sin)[0] * weight).sum().backward()
        grads.append(q.grad)
        q.grad = None
    torch.testing.assert_close(*grads)


@pytest.mark.gpu
def test_a_captured_launch_reads_new_positions(device):
    from comemo_kernels import apply_rotary, capture, reference, rotary_table

    cos, sin = (t[0].to(device) for t in rotary_table(torch.arange(99)[None], 128))
    q = torch.randn(1, 1, 16, 128, device=device, dtype=torch.bfloat16)
    k = torch.randn(1, 1, 8, 128, device=device, dtype=torch.bfloat16)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    found = []
    replay = capture(lambda: found.append(apply_rotary(q, k, cos, sin, ids)), device)
    for place in (3, 98):
        ids.fill_(place)
        replay()
        wanted = reference.apply_rotary(q, k, cos, sin, ids)
        for ours, theirs in zip(found[-1], wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
