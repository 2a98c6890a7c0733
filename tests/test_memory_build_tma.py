"""The memory build by tensor descriptors: against the reference, the plain kernel and itself."""

import math

import pytest
import torch
from conftest import DEVICE, DTYPES, GPU, SLOW
from harness import assert_matches
from hypothesis import given
from hypothesis import strategies as st
from test_memory_build import append, built, make_inputs, memory_of

pytest.importorskip("triton")

import triton

from comemo_kernels import _descriptors, _memory_build_tma, build_memory, memory_build, reference

pytestmark = pytest.mark.kernel
HALVES = [dtype for dtype in DTYPES if dtype != torch.float32]

if not _descriptors.AVAILABLE:
    pytest.skip("triton below 3.4 makes no descriptors in a kernel", allow_module_level=True)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Programs of every launch by descriptors, with these turned on and three multiprocessors."""
    if GPU and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the build uses descriptors only on Hopper")
    found, launch = [], _memory_build_tma.project_tma.launch
    monkeypatch.setattr(memory_build, "USE_TMA", True)
    monkeypatch.setattr(_memory_build_tma, "multiprocessors", lambda _: 3)
    monkeypatch.setattr(
        _memory_build_tma.project_tma,
        "launch",
        lambda n, *args: found.append(n) or launch(n, *args),
    )
    return found


def compare(dtype, exact, M, d, L, G, D):
    inputs = make_inputs(M, d, L, G, D, exact, dtype)
    lists = {name: inputs.pop(name) for name in ("kv_weights", "norm_weights")}

    def of(verb):
        def op(**given):
            wide = given["media"].dtype
            cast = {n: None if t is None else [w.to(wide) for w in t] for n, t in lists.items()}
            return tuple(built(verb, given | cast, (G, D)))

        return op

    assert_matches(of(build_memory), of(reference.build_memory), inputs)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("G", [1, 3])
def test_matches_reference(launches, exact, G):
    compare(HALVES[G == 3], exact, 130, 72, 2, G, 32 if exact else 128)
    assert launches == [3]


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [pytest.param(dtype, exact, marks=SLOW) for dtype in HALVES for exact in (True, False)],
)
@given(
    M=st.integers(1, 300),
    d=st.sampled_from([8, 72]),
    L=st.integers(1, 3),
    G=st.integers(1, 5),
    D=st.sampled_from([32, 64, 128]),
)
def test_matches_reference_in_any_shape(dtype, exact, M, d, L, G, D):
    compare(dtype, exact, M, d, L, G, D)


def plainly(monkeypatch, *args, **kwargs):
    monkeypatch.setattr(memory_build, "USE_TMA", False)
    return built(build_memory, *args, **kwargs)


@pytest.mark.parametrize("exact", [False, True])
def test_layers_in_any_order_of_addresses(monkeypatch, launches, exact):
    """Adjacent weights, the last layer's at the lowest address; and more tiles than programs."""
    inputs = make_inputs(140, 8, 3, 3, 128, exact, dtype=HALVES[-1])
    inputs["media"] = torch.cat([inputs["media"]] * 2, 1)[:, :8]
    lowest = torch.stack(inputs["kv_weights"][::-1])
    inputs["kv_weights"] = list(lowest.unbind(0))[::-1]
    ours = built(build_memory, inputs, (3, 128), row=5, spare=3)
    assert launches == [3]
    for found, plain in zip(ours, plainly(monkeypatch, inputs, (3, 128)), strict=True):
        assert found[:, :5].isnan().all()
        assert found[:, 145:].isnan().all()
        torch.testing.assert_close(found[:, 5:145], plain)


def test_missing_positions_and_nan_media_are_nan_in_keys_only(launches):
    inputs = make_inputs(20, 8, 1, 2, 32, dtype=HALVES[0])
    inputs["media"][7, 3] = math.nan
    inputs["ids"][3] = 64  # beyond the table
    keys, values = built(build_memory, inputs, (2, 32))
    assert launches == [2]
    assert keys[:, [3, 7]].isnan().all()
    assert (values[:, 7] == 0).all()
    keys[:, [3, 7]] = 0
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_float8(monkeypatch, launches):
    """The same bytes as by the plain kernel, except for a last bit where sums differ."""
    inputs = make_inputs(48, 40, 2, 2, 32, dtype=HALVES[-1])
    held = []
    for wanted in (True, False):
        monkeypatch.setattr(memory_build, "USE_TMA", wanted)
        memory = memory_of(inputs, (2, 32), dtype=torch.float8_e4m3fn, tile=16)
        append(memory, inputs, 0, 32)
        append(memory, inputs, 32)
        held.append(memory)
    assert launches == [3, 3]
    for layer in (1, 3):
        (keys, values), (wanted_keys, wanted_values) = (
            (m.keys[layer][:48].float(), m.values[layer][:48].float()) for m in held
        )
        for ours, plain in zip(held[0].scales[layer][:2], held[1].scales[layer][:2], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-2, atol=0)
        torch.testing.assert_close(keys, wanted_keys, rtol=0.15, atol=1)
        torch.testing.assert_close(values, wanted_values, rtol=0.15, atol=1)


@pytest.mark.parametrize("what", ["float32", "heads", "width", "media", "an odd address", "far"])
def test_the_plain_kernel_does_what_it_does_not_support(monkeypatch, launches, what):
    d, D = 12 if what == "width" else 8, 24 if what == "heads" else 32
    inputs = make_inputs(20, d, 2, 2, D, dtype=torch.float32 if what == "float32" else HALVES[0])
    media = inputs["media"]
    if what == "media":
        inputs["media"] = media[:1].expand(20, 8)
    elif what == "an odd address":
        inputs["media"] = torch.cat([media.new_zeros(1), media.flatten()])[1:].view(20, 8)
    elif what == "far":
        monkeypatch.setattr(_memory_build_tma, "REACH", triton.language.constexpr(1))
    ours = built(build_memory, inputs, (2, D))
    assert launches == []
    for found, wanted in zip(ours, built(reference.build_memory, inputs, (2, D)), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_the_same_bits(monkeypatch):
    """A configuration that does not must not be used."""
    monkeypatch.undo()
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the build uses descriptors only on Hopper")
    inputs = make_inputs(3328, 2048, 3, 16, 128, dtype=torch.bfloat16, P=4096)
    plain = plainly(monkeypatch, inputs, (16, 128))
    monkeypatch.setattr(memory_build, "USE_TMA", True)
    for config in _memory_build_tma.project_tma.configs:
        with _memory_build_tma.project_tma.using(config):
            first = built(build_memory, inputs, (16, 128))
            for found, wanted in zip(first, plain, strict=True):
                torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
            held = [torch.full_like(t, math.nan) for t in first]
            planes = {n: list(t.unbind(0)) for n, t in zip(("keys", "values"), held, strict=True)}
            same = torch.ones((), dtype=torch.bool, device=DEVICE)
            for _ in range(1000):
                build_memory(**inputs, **planes)
                for found, wanted in zip(held, first, strict=True):
                    same &= (found == wanted).all()
                    found.fill_(math.nan)
            assert same, config
