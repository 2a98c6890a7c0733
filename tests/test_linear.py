"""linear: every way against exact arithmetic, the choice among them, compiling, errors."""

import pytest
import torch
import torch.nn.functional as F
from harness import SLACK, SLACK_CHAIN, assert_matches
from torch.library import opcheck

import comemo_kernels as ops
from comemo_kernels import _cpu_products as products

WIDTH, OUT = 512, 1000  # a weight of more than ELEMENTS, and pieces that do not divide it
ROWS = [1, 2, 5, 17, 70, 300]
CASES = [
    (way, dtype, rows)
    for dtype, classes in products.DEFAULTS.items()
    for rows in ROWS
    for way in classes[products.bisect_left(products.ROWS, rows)]
    if products._HAS_ONEDNN or way not in ("onednn", "turned")
]


def make(dtype, rows, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "x": draw(*rows, WIDTH) if isinstance(rows, tuple) else draw(rows, WIDTH),
        "weight": draw(OUT, WIDTH) / 16,
        "bias": draw(OUT) if bias else None,
    }


@pytest.fixture
def choices(monkeypatch):
    """No way is chosen yet, and none is remembered."""
    monkeypatch.setattr(products, "_choices", {})
    monkeypatch.delenv("COMEMO_LINEAR", raising=False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("way", "dtype", "rows"), CASES, ids=str)
def test_every_way_is_as_exact_as_pytorch(monkeypatch, choices, way, dtype, rows, bias):
    monkeypatch.setattr(products, "PIECE", 300 * WIDTH)
    monkeypatch.setattr(products, "_choose", lambda dtype, group: way)
    chain = dtype == torch.float32 and way != "torch" and rows > 1
    slack = SLACK_CHAIN if chain else SLACK
    assert_matches(ops.linear, F.linear, make(dtype, rows, bias), slack)


@pytest.mark.parametrize("dtype", list(products.DEFAULTS), ids=str)
@pytest.mark.parametrize("shape", [(2, 3), (0,), ()])
def test_any_number_of_dimensions(choices, dtype, shape):
    inputs = make(dtype, shape)
    with torch.no_grad():
        found = ops.linear(**inputs)
    assert found.shape == (*shape, OUT)
    torch.testing.assert_close(found, F.linear(**inputs))


def test_strides_change_nothing(choices):
    inputs = make(torch.float32, (4, 6))
    wide = torch.randn(4, 6, 2 * WIDTH)
    views = inputs | {"x": wide[..., ::2]}
    with torch.no_grad():
        assert torch.equal(
            ops.linear(**views), ops.linear(**views | {"x": views["x"].contiguous()})
        )
        turned = inputs | {"weight": inputs["weight"].t().contiguous().t()}
        torch.testing.assert_close(ops.linear(**turned), ops.linear(**inputs))


def test_gradients_are_pytorchs(choices):
    inputs = {name: t.requires_grad_() for name, t in make(torch.float32, 3).items()}
    wanted = torch.autograd.grad(F.linear(**inputs).sum(), list(inputs.values()))
    found = torch.autograd.grad(ops.linear(**inputs).sum(), list(inputs.values()))
    assert all(map(torch.equal, found, wanted))


def test_autocast_is_pytorchs(choices):
    inputs = make(torch.float32, 3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear(**inputs), F.linear(**inputs))


@pytest.mark.parametrize("rows", ROWS)
def test_bits_are_equal_from_run_to_run(choices, rows):
    inputs = make(torch.float32, rows)
    with torch.no_grad():
        first = ops.linear(**inputs)
        for _ in range(3):
            products._choices.clear()
            assert torch.equal(ops.linear(**inputs), first)


@pytest.mark.parametrize("rows", [1, 5, 300])
def test_a_row_does_not_depend_on_the_others(choices, rows):
    inputs = make(torch.float32, rows)
    others = torch.cat([inputs["x"][:1], torch.randn(rows - 1, WIDTH)])
    with torch.no_grad():
        own = ops.linear(**inputs)[0]
        assert torch.equal(own, ops.linear(**inputs | {"x": others})[0])


# --- the choice ---


@pytest.fixture
def timed(monkeypatch, choices):
    """Ways take the seconds in the returned dict; what was measured is in `timed.calls`."""
    seconds, calls = {}, []

    def measure(dtype, rows, names):
        calls.append((dtype, rows, names))
        return {name: seconds.get(name, 1.0) for name in names}

    monkeypatch.setattr(products, "measure", measure)
    monkeypatch.setattr(products, "is_known", lambda: False)
    monkeypatch.setattr(products, "_HAS_ONEDNN", True)
    monkeypatch.setattr(products.time, "process_time", products.time.perf_counter)  # quiet
    return seconds, calls


def test_a_clearly_faster_way_replaces_the_default_once(timed):
    seconds, calls = timed
    seconds["torch"] = 0.5
    assert products.way_of(torch.float32, 4) == "torch"
    assert products.way_of(torch.float32, 7) == "torch"
    assert calls == [(torch.float32, 4, ["onednn", "turned", "torch"])]


def test_a_slightly_faster_way_does_not(timed):
    seconds, _ = timed
    seconds["torch"] = 0.9
    assert products.way_of(torch.float32, 4) == "onednn"


def test_times_beside_other_work_say_nothing(timed, monkeypatch):
    seconds, calls = timed
    seconds["torch"] = 0.1
    monkeypatch.setattr(products.time, "process_time", lambda: 0.0)
    assert products.way_of(torch.float32, 4) == "onednn"
    assert calls


def test_a_known_cpu_is_not_measured(timed, monkeypatch):
    monkeypatch.setattr(products, "is_known", lambda: True)
    for dtype, classes in products.DEFAULTS.items():
        for rows, names in zip((*products.ROWS, 10**6), classes, strict=True):
            assert products.way_of(dtype, rows) == names[0]
    assert not timed[1]


@pytest.mark.parametrize(("setting", "way"), [("torch", "torch"), ("defaults", "onednn")])
def test_the_environment_leaves_no_choice(timed, monkeypatch, setting, way):
    monkeypatch.setenv("COMEMO_LINEAR", setting)
    assert products.way_of(torch.float32, 1) == way
    assert not timed[1]


def test_an_unknown_setting_is_refused(choices, monkeypatch):
    monkeypatch.setenv("COMEMO_LINEAR", "mkl")
    told = "COMEMO_LINEAR must be 'auto', 'defaults' or 'torch', got 'mkl'"
    with torch.no_grad(), pytest.raises(ValueError, match=told):
        ops.linear(**make(torch.float32, 1))


def test_without_onednn_pytorch_decides(timed, monkeypatch):
    monkeypatch.setattr(products, "_HAS_ONEDNN", False)
    assert all(products.way_of(torch.float32, rows) == "torch" for rows in ROWS)
    with torch.no_grad():  # the way in float32 by pieces needs no oneDNN either
        inputs = make(torch.float16, 3)
        wanted = F.linear(*(t.float() for t in inputs.values()))
        torch.testing.assert_close(products._widened(**inputs), wanted.half())


def test_a_measurement_times_every_way(choices):
    seconds = products.measure(torch.bfloat16, 1, ["torch", "doubled", "widened"])
    assert all(0 < s < 60 for s in seconds.values())


# --- torch.compile ---


def test_operator_contract():
    inputs = make(torch.float32, (2, 3))
    opcheck(torch.ops.comemo.cpu_linear, tuple(inputs.values()))
    opcheck(torch.ops.comemo.cpu_linear, (inputs["x"], inputs["weight"], None))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(choices, backend):
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=True, backend=backend)
    for rows in (5, 70):
        inputs = make(torch.float32, rows)
        with torch.no_grad():
            assert torch.equal(compiled(**inputs), ops.linear(**inputs))


def test_an_exported_program_needs_nothing_of_ours(choices):
    class Layer(torch.nn.Module):
        def forward(self, x, weight, bias):
            return ops.linear(x, weight, bias)

    inputs = make(torch.float32, 5)
    with torch.no_grad():
        program = torch.export.export(Layer(), tuple(inputs.values()))
    assert "comemo" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs.values()), F.linear(**inputs))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"weight": torch.zeros(3, 4)}, r"linear: weight must be .* \(3, 512\)"),
        ({"bias": torch.zeros(3)}, r"linear: bias must be .* \(1000,\)"),
        ({"weight": torch.zeros(OUT, WIDTH).double()}, "linear: weight must be torch.float32"),
        ({"x": torch.zeros(2, WIDTH, dtype=torch.int64)}, "linear: x must be"),
        ({"x": torch.tensor(1.0)}, "linear: x must be"),
    ],
)
def test_errors_name_what_is_wrong(change, told):
    with pytest.raises(ValueError, match=told):
        ops.linear(**make(torch.float32, 2) | change)
