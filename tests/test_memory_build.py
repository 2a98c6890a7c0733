"""build_memory and append_images: keys and values of all layers."""

import math

import pytest
import torch
from conftest import DEVICE, GPU, TRACED, WITHOUT_HALF
from harness import assert_matches
from hypothesis import given
from hypothesis import strategies as st

from comemo_kernels import (
    ImageMemory,
    append_images,
    build_memory,
    image_position_ids,
    reference,
    rotary_table,
)

pytestmark = pytest.mark.kernel(reference=True)


def make_inputs(M=40, d=48, L=2, G=2, D=16, exact=True, dtype=torch.float32, P=64, device=DEVICE):
    g = torch.Generator().manual_seed(M + d + G)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype)

    cos, sin = rotary_table(torch.arange(P, device=device)[None], D, theta=100.0)
    ids = torch.randint(-9, P, (M,), generator=g).to(device, torch.int32)
    return {
        "media": draw(M, d, scale=3.0),
        "kv_weights": [draw(2 * G * D, d, scale=d**-0.5) for _ in range(L)],
        "norm_weights": [draw(d) for _ in range(L)] if exact else None,
        "cos": cos[0],
        "sin": sin[0],
        "ids": ids,
    }


def built(build, inputs, heads, row=0, spare=0, **kwargs):
    """Keys and values of all layers, of memories that were NaN before."""
    G, D = heads
    shape = (len(inputs["kv_weights"]), row + len(inputs["media"]) + spare, G, D)
    held = [inputs["media"].new_full(shape, math.nan) for _ in range(2)]
    build(**inputs, keys=list(held[0].unbind(0)), values=list(held[1].unbind(0)), row=row, **kwargs)
    return held


@pytest.mark.parametrize("dtype", WITHOUT_HALF, ids=str)
@given(
    M=st.integers(1, 150 if GPU else 70),
    d=st.sampled_from([8, 40, 64]),
    L=st.integers(1, 3),
    G=st.integers(1, 5),
    D=st.sampled_from([24, 128] if GPU else [2, 16, 24, 128]),  # each compiles
    exact=st.booleans(),
)
def test_matches_reference(M, d, L, G, D, exact, dtype):
    inputs = make_inputs(M, d, L, G, D, exact, dtype)
    listed = {name: inputs.pop(name) for name in ("kv_weights", "norm_weights")}
    flat = inputs | {f"{name}{i}": t for name, ts in listed.items() for i, t in enumerate(ts or ())}

    def of(build):
        def op(media, cos, sin, ids, **weights):
            lists = {
                name: [weights[f"{name}{i}"] for i in range(L)] if ts is not None else None
                for name, ts in listed.items()
            }
            tensors = {"media": media, "cos": cos, "sin": sin, "ids": ids} | lists
            return tuple(built(build, tensors, (G, D)))

        return op

    assert_matches(of(build_memory), of(reference.build_memory), flat)


def test_only_its_rows_are_written():
    inputs = make_inputs(40)
    for held in built(build_memory, inputs, (2, 16), row=5, spare=3):
        assert held[:, 5:45].isfinite().all()
        assert held[:, :5].isnan().all()
        assert held[:, 45:].isnan().all()


def test_the_folded_norm_is_the_norm():
    inputs = make_inputs(40, dtype=torch.float32)
    folded = [
        weight * norm
        for weight, norm in zip(inputs["kv_weights"], inputs["norm_weights"], strict=True)
    ]
    there = built(build_memory, inputs | {"kv_weights": folded, "norm_weights": None}, (2, 16))
    for ours, wanted in zip(there, built(build_memory, inputs, (2, 16)), strict=True):
        torch.testing.assert_close(ours, wanted)


def test_nan_media_reach_only_keys():
    inputs = make_inputs(40)
    inputs["media"][7, 3] = math.nan
    keys, values = built(build_memory, inputs, (2, 16))
    assert keys[:, 7].isnan().all()
    assert (values[:, 7] == 0).all()
    keys[:, 7] = 0
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_an_id_beyond_the_table_is_nan():
    inputs = make_inputs(40, P=64)
    inputs["ids"][3] = 64
    keys, _ = built(build_memory, inputs, (2, 16))
    assert keys[:, 3].isnan().all()
    assert keys[:, 4:].isfinite().all()


@pytest.mark.kernel
def test_chunks_change_no_bit(monkeypatch):
    """A long memory is normalised in chunks of bounded size."""
    from comemo_kernels import memory_build

    for exact in (True, False):
        inputs = make_inputs(150, exact=exact, dtype=torch.float16)
        whole = built(build_memory, inputs, (2, 16))
        monkeypatch.setattr(memory_build, "CHUNK", 64)
        for ours, wanted in zip(built(build_memory, inputs, (2, 16)), whole, strict=True):
            assert torch.equal(ours, wanted)


@pytest.mark.kernel
def test_chunks_of_float8_change_no_bit(monkeypatch):
    from comemo_kernels import memory_build

    inputs = make_inputs(96)
    held = []
    for chunk in (8192, 32):
        monkeypatch.setattr(memory_build, "CHUNK", chunk)
        memory = memory_of(inputs, dtype=torch.float8_e4m3fn, tile=16)
        append(memory, inputs, 0, 16)
        append(memory, inputs, 16)
        held.append(memory)
    for layer in (1, 3):
        ours, wanted = (
            (m.keys[layer][:96].float(), m.values[layer][:96].float(), *m.scales[layer][:2])
            for m in held
        )
        assert all(map(torch.equal, ours, wanted))


# --- the memory as an object ---


def memory_of(inputs, heads=(2, 16), capacity=128, dtype=torch.float32, **kwargs):
    layers = [1 + 2 * i for i in range(len(inputs["kv_weights"]))]
    table = inputs["cos"], inputs["sin"]
    return ImageMemory.allocate(capacity, layers, *heads, table, dtype, **kwargs)


def append(memory, inputs, first=0, last=None, sizes=None, **kwargs):
    media, ids = inputs["media"][first:last], inputs["ids"][first:last]
    weights = inputs["kv_weights"], inputs["norm_weights"]
    return append_images(memory, media, ids, sizes or [len(media)], *weights, **kwargs)


def test_appending_in_one_or_many_calls_gives_the_same_bytes():
    inputs = make_inputs(96)
    memories = memory_of(inputs), memory_of(inputs)
    assert append(memories[0], inputs, sizes=[32, 16, 48], biases=[5, 50, 9]) == (0, 96)
    before = memories[1].keys[1].data_ptr()
    for first, last, bias in ((0, 32, 5), (32, 48, 50), (48, 96, 9)):
        assert append(memories[1], inputs, first, last, biases=[bias]) == (first, last)
    assert memories[1].keys[1].data_ptr() == before, "nothing is copied"
    for layer in (1, 3):
        for held in ("keys", "values"):
            one, many = (getattr(memory, held)[layer][:96] for memory in memories)
            assert torch.equal(one, many)
    for memory in memories:
        assert memory.sizes == (32, 16, 48)
        assert memory.starts.tolist() == [0, 32, 48]
        assert memory.biases.tolist() == [[5, 50, 9]]
        assert len(memory) == 96
        assert memory.capacity == 128


def test_appending_raises_versions():
    inputs = make_inputs(16)
    memory = memory_of(inputs)
    before = memory.keys[1]._version, memory.values[3]._version
    append(memory, inputs)
    assert memory.keys[1]._version > before[0]
    assert memory.values[3]._version > before[1]


def test_float8():
    inputs = make_inputs(64, dtype=torch.float32)
    memory = memory_of(inputs, dtype=torch.float8_e4m3fn, tile=16)
    append(memory, inputs, 0, 32, sizes=[16, 16])
    append(memory, inputs, 32)
    wanted = built(reference.build_memory, inputs, (2, 16))
    for i, layer in enumerate((1, 3)):
        scales = memory.scales[layer]
        for held, factors, exact in (
            (memory.keys[layer], scales.keys, wanted[0][i]),
            (memory.values[layer], scales.values, wanted[1][i]),
        ):
            tiles = exact.view(4, 16, 2, 16)
            largest = tiles.abs().amax((1, 3))
            torch.testing.assert_close(factors[:4] * 448, largest)
            assert (factors[4:] == 1).all()
            loaded = held[:64].float().view_as(tiles) * factors[:4, None, :, None]
            error = (loaded - tiles).abs()
            # Three bits of mantissa; below the smallest normal number, steps of it.
            allowed = torch.maximum(tiles.abs() / 16, largest[:, None, :, None] / 2**17)
            assert (error <= allowed).all()
    assert memory.nbytes == 2 * 2 * (128 * 2 * 16 + 8 * 2 * 4)


def test_spans_of_dhr_images_in_a_grid():
    """Ids of `image_position_ids`, from 0, as README says."""
    grids = [(2, 1), (1, 1)]
    ids = torch.cat([image_position_ids(grid, side=4) for grid in grids])
    inputs = make_inputs(len(ids)) | {"ids": ids.to(DEVICE)}
    memory = memory_of(inputs)
    assert append(memory, inputs, sizes=[48, 16]) == (0, 64)
    assert memory.reading(torch.tensor([[[0, 64]]]), torch.tensor([[3, 40]])).position_ids[
        [0, 48]
    ].tolist() == [3, 40]


def test_says_what_is_wrong_and_changes_nothing():
    inputs = make_inputs(64)
    memory = memory_of(inputs, capacity=80)
    append(memory, inputs, 0, 32)
    held = {n: t.clone() for n, t in memory.keys.items()}
    state = (memory.sizes, memory.starts, memory.biases, memory.ids)

    def wrong(message, inputs=inputs, memory=memory, **kwargs):
        with pytest.raises(ValueError, match=message):
            append(memory, inputs, **kwargs)

    wrong("64 more image tokens must fit the memory's capacity of 80, which holds 32")
    wrong("49 more image tokens must fit", last=49)
    wrong(r"sizes must be positive and sum to the 32 rows .* got \[30\]", last=32, sizes=[30])
    wrong("sizes must be positive", last=32, sizes=[32, 0])
    wrong(
        r"those of the memory's layers \[1, 3\], got 1",
        last=32,
        inputs=inputs | {name: inputs[name][:1] for name in ("kv_weights", "norm_weights")},
    )
    wrong("biases must be one for each of 1 images", last=32, biases=[1, 2])
    wide = [torch.cat([weight, weight]) for weight in inputs["kv_weights"]]
    wrong(r"kv_weights must be torch.float32 \(64, 48\)", inputs | {"kv_weights": wide}, last=32)
    half = inputs | {"media": inputs["media"].half()}
    wrong("kv_weights must be torch.float16", half, last=32)
    short = inputs | {"norm_weights": inputs["norm_weights"][:1]}
    wrong("must be of one length, that of the layers", short, last=32)
    wrong("must come from ImageMemory.allocate", memory=ImageMemory())
    eight = memory_of(inputs, dtype=torch.float8_e4m3fn, tile=32)
    wrong("whole tiles of 32", memory=eight, last=40)
    assert (memory.sizes, memory.starts, memory.biases, memory.ids) == state
    for layer, keys in held.items():
        assert torch.equal(memory.keys[layer][:32], keys[:32])
    with pytest.raises(ValueError, match="capacity must be an integer from 1"):
        memory_of(inputs, capacity=0)
    with pytest.raises(ValueError, match="biases must be for the 1 images"):
        memory.reading(torch.tensor([[[0, 1]]]), torch.tensor([[3, 40]]))
    assert append(memory, inputs, 0, 48) == (32, 80), "what just fits"


def test_gradients_are_refused():
    """Rather than lost: `project_memory` computes them."""
    inputs = make_inputs(16)
    for name in ("media", "kv_weights", "norm_weights"):
        held = inputs[name]
        leaf = (held if name == "media" else held[1]).clone().requires_grad_()
        changed = inputs | {name: leaf if name == "media" else [held[0], leaf]}
        with pytest.raises(ValueError, match=f"got {name} that do: .* project_memory computes"):
            built(build_memory, changed, (2, 16))
        with torch.no_grad():
            ours = built(build_memory, changed, (2, 16))
        assert all(map(torch.equal, ours, built(build_memory, inputs, (2, 16))))


@pytest.mark.kernel
def test_says_what_a_kernel_cannot_do():
    inputs = make_inputs(16)
    double = {n: inputs[n].double() for n in ("media", "cos", "sin")} | {
        n: [t.double() for t in inputs[n]] for n in ("kv_weights", "norm_weights")
    }
    turned = [weight.t().contiguous().t() for weight in inputs["kv_weights"]]
    for message, changes in (
        ("float64 has no kernel", double),
        ("weights be contiguous", {"kv_weights": turned}),
    ):
        with pytest.raises(ValueError, match=f"on a GPU .*{message}"):
            built(build_memory, inputs | changes, (2, 16))


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    from comemo_kernels import memory_build

    inputs = make_inputs(16, dtype=torch.float16, device=real_device)
    held = [[torch.zeros(16, 2, 16, device=real_device).half() for _ in range(2)] for _ in range(2)]
    arguments = [inputs[n] for n in ("media", "kv_weights", "norm_weights", "cos", "sin", "ids")]
    torch.library.opcheck(memory_build._build, [*arguments, *held, [], [], 1, 0, 1e-5])


@TRACED
def test_compiles_whole(real_device):
    def run(media, ids, keys, values):
        weights = inputs["kv_weights"], inputs["norm_weights"]
        build_memory(media, *weights, inputs["cos"], inputs["sin"], ids, keys, values)
        return keys[0] + 0

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    inputs = make_inputs(16, device=real_device)
    held = [[torch.zeros(16, 2, 16, device=real_device) for _ in range(2)] for _ in range(4)]
    ours = compiled(inputs["media"], inputs["ids"], *held[:2])
    torch.testing.assert_close(ours, run(inputs["media"], inputs["ids"], *held[2:]))
