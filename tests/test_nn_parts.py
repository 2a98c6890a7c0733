"""`comemo_kernels.nn`: `RotaryDHR` keeps its precision, `TileProjector` loads what is published."""

import copy
import pickle

import pytest
import torch
from conftest import DTYPES, SLOW, TRACED
from harness import assert_matches, assert_relative
from nn_layers import Int8Linear, gradients, make_layer, make_memory, prompts, randoms

import comemo_kernels
from comemo_kernels import ImageGrids, reference, rotary_table
from comemo_kernels.nn import FeedForward, RotaryDHR, TileProjector

kernel = pytest.mark.kernel(reference=True)

# --- rotation ---

ROTARY = RotaryDHR(16, theta=1e6, max_positions=50, side=2)


def heads(device, dtype=torch.float32):
    q, k = ((2, 30, h, 16) for h in (4, 2))
    return tuple(randoms(*s, device=device, dtype=dtype, seed=i) for i, s in enumerate((q, k)))


@pytest.mark.parametrize("kind", ["ids", "grids", "one row"])
@pytest.mark.parametrize("dtype", DTYPES[-2:], ids=str)
def test_it_rotates_by_its_own_table(kind, dtype, device):
    q, k = heads(device, dtype)
    grids = ImageGrids.pack([(2, 1)], [5], [5], side=2, device=device)
    ids = grids.position_ids(60).view(2, 30) % 50
    positions = {"ids": ids, "one row": ids[:1], "grids": grids}[kind]
    table = [t[0] for t in rotary_table(torch.arange(60, device=device)[None], 16, 1e6)]
    rotary = RotaryDHR(16, 1e6, 60 if kind == "grids" else 50, side=2)

    def ours(q, k):
        return rotary(q, k, positions)

    def theirs(q, k):
        return reference.apply_rotary(q, k, *table, positions)

    assert_matches(ours, theirs, {"q": q.requires_grad_(), "k": k.requires_grad_()})
    assert rotary(q, None, positions)[1] is None


CHANGES = {
    "bfloat16": lambda r: r.to(torch.bfloat16),
    "half": lambda r: r.half(),
    "double": lambda r: r.double(),
    "meta": lambda r: r.to("meta"),
    "copied": copy.deepcopy,
    "pickled": lambda r: pickle.loads(pickle.dumps(r)),
    "emptied": lambda r: r.to_empty(device="cpu"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_rounds_it(change):
    rotary = CHANGES[change](RotaryDHR(16, 1e6, 50, side=2))
    q, k = heads("cpu")
    ids = torch.arange(20, 50)[None]
    for ours, exact in zip(rotary(q, k, ids), ROTARY(q, k, ids), strict=True):
        assert torch.equal(ours, exact)
    assert dict(rotary.state_dict()) == {}
    assert not list(rotary.buffers())
    assert {t.dtype for t in rotary.table("cpu")} == {torch.float32}
    assert vars(rotary).keys() == vars(ROTARY).keys()  # a call leaves nothing


def test_the_table_is_computed_once():
    first, again = ROTARY.table("cpu"), RotaryDHR(16, 1e6, 50).table("cpu")
    assert all(a is b for a, b in zip(first, again, strict=True))


def test_ids_of_prompts_with_images():
    mask = torch.zeros(1, 18, dtype=torch.bool)
    mask[0, 2:14] = True
    attended = torch.ones_like(mask)
    for order in ("row", "column"):
        rotary = RotaryDHR(16, side=2, tile_order=order, thumbnail=True)
        wanted = reference.rope_dhr_positions(mask, attended, [(1, 2)], 2, order)
        assert torch.equal(rotary.position_ids(mask, attended, [(1, 2)]), wanted)
    with pytest.raises(ValueError, match="grids of 16 image tokens for prompts that hold 12"):
        ROTARY.position_ids(mask, attended, [(3, 1)])


@TRACED
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=SLOW)])
def test_a_compiled_rotation_is_the_same(backend, real_device):
    q, k = heads(real_device)
    ids = torch.arange(30, device=real_device)[None] * 2 - 3  # three below 0, five above 49
    compiled = torch.compile(ROTARY, fullgraph=True, backend=backend)
    for ours, theirs in zip(compiled(q, k, ids), ROTARY(q, k, ids), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert ours.isnan().all((0, 2, 3)).tolist() == [not 0 <= i < 50 for i in ids[0].tolist()]
        assert_relative(ours.nan_to_num(), theirs.nan_to_num())
    with torch.no_grad():
        packed = compiled(q[0], None, ids[0])[0]
    assert torch.equal(packed.nan_to_num(), compiled(q, k, ids)[0][0].nan_to_num())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"head_dim": 0}, "head_dim must be an integer from 2"),
        ({"theta": 0.0}, "theta must be positive, got 0.0"),
        ({"max_positions": 0}, "max_positions must be an integer from 1"),
        ({"side": 0}, "side must be an integer from 1"),
        ({"tile_order": "up"}, "tile_order must be 'row' or 'column'"),
    ],
)
def test_invalid_settings_are_refused(change, told):
    with pytest.raises(ValueError, match=f"RotaryDHR: {told}"):
        RotaryDHR(**{"head_dim": 16} | change)


def test_invalid_arguments_are_refused():
    q, k = heads("cpu")
    ids = torch.arange(30)[None]
    with pytest.raises(ValueError, match=r"forward: q must have heads of 16 elements, got"):
        ROTARY(q[..., :8], k, ids)
    with pytest.raises(ValueError, match="positions must be int32 or int64"):
        ROTARY(q, k, ids.float())
    with pytest.raises(ValueError, match="k must be like q"):
        ROTARY(q, k[:, :4], ids)


# --- projector ---


@kernel
def test_a_projector_loads_the_published_names(device):
    torch.manual_seed(0)
    published = {
        "mlp1.0.weight": torch.randn(32),
        "mlp1.0.bias": torch.randn(32),
        "mlp1.1.weight": torch.randn(24, 32),
        "mlp1.1.bias": torch.randn(24),
        "mlp1.3.weight": torch.randn(24, 24),
        "mlp1.3.bias": torch.randn(24),
    }
    projector = TileProjector(8, 24, device="meta")
    weights = {name.removeprefix("mlp1."): t.to(device) for name, t in published.items()}
    projector.load_state_dict(weights, assign=True)
    tokens = randoms(3, 17, 8, device=device)
    wanted = reference.project_tiles(tokens, *weights.values())
    assert_relative(projector(tokens), wanted)
    documented = TileProjector.__doc__.split("State dict")[1].split("Args:")[0]
    assert all(f"{name}" in documented for name in weights)
    sizes = {"vision_dim": 8, "n": 2, "dim": 24}
    shapes = {}
    for line in documented.splitlines():
        names, found, shape = line.strip().partition(": [")
        if found:
            shapes |= dict.fromkeys(names.split(", "), tuple(eval(f"[{shape[:-1]}", {}, sizes)))
    assert shapes == {name: tuple(t.shape) for name, t in projector.state_dict().items()}


@TRACED
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=SLOW)])
def test_a_projector_compiles_and_learns(backend, real_device):
    projector = TileProjector(8, 24, version="v1").to(real_device)
    tokens = randoms(3, 17, 8, device=real_device).requires_grad_()
    compiled = torch.compile(projector, fullgraph=True, backend=backend)
    wanted, found = projector(tokens), compiled(tokens)
    assert torch.allclose(found, wanted, atol=1e-5)
    leaves = (tokens, *projector.parameters())
    for a, b in zip(gradients(found, *leaves), gradients(wanted, *leaves), strict=True):
        assert_relative(a, b)
    other = pickle.loads(pickle.dumps(copy.deepcopy(projector)))
    assert torch.equal(other(tokens), wanted)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vision_dim": 0}, "vision_dim must be an integer from 1"),
        ({"dim": -1}, "dim must be an integer from 1"),
        ({"ratio": 0.4}, "ratio must be 1 over an integer, got 0.4"),
        ({"ratio": 2.0}, "ratio must be 1 over an integer, got 2.0"),
        ({"version": "v3"}, "version must be 'v1' or 'v2', got 'v3'"),
    ],
)
def test_an_invalid_projector_is_refused(change, told):
    with pytest.raises(ValueError, match=f"TileProjector: {told}"):
        TileProjector(**{"vision_dim": 8, "dim": 24} | change)
    with pytest.raises(ValueError, match=r"tokens must be floats \[T, 1 \+ h\*h, C\]"):
        TileProjector(8, 24)(torch.ones(3, 16, 8))


# --- the package ---


def test_the_package_is_an_attribute():
    assert comemo_kernels.nn.RotaryDHR is RotaryDHR
    assert {"nn", "hub"} <= set(comemo_kernels.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'layers'"):
        comemo_kernels.layers  # noqa: B018


def test_three_modules_make_a_block():
    """Ids, a memory and a layer, as docs/nn.md shows them."""
    layer, projector = make_layer("cpu"), TileProjector(8, 48)
    ids, _ = prompts("cpu")
    media = projector(randoms(4, 17, 8, device="cpu")).flatten(0, 1)
    x = randoms(2, 20, 64, device="cpu")
    y = layer(x, make_memory(media), ids)
    assert all(g.abs().max() > 0 for g in gradients(y, *projector.parameters()))


def test_a_feed_forward_network_is_a_swiglu():
    mlp, x = FeedForward(64, 80), randoms(2, 5, 64, device="cpu")
    inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    assert torch.equal(mlp(x), mlp.down_proj(inner))
    mlp.down_proj = Int8Linear(mlp.down_proj)
    assert torch.allclose(mlp(x), mlp.down_proj(inner))
