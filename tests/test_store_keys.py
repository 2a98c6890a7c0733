"""Keys of a store: which images are the same, for which models."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from known import assert_same, batch_of, counts, key_of, memory_of, tiles

import comemo
from comemo.store import keys as store_keys

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


# --- changes of the model ---


def nudge(name):
    def change(core):
        with torch.no_grad():
            dict(core.named_parameters())[name].view(-1)[5] += 0.5

    return change


def set_to(path, value):
    def change(core):
        *owners, name = path.split(".")
        for owner in owners:
            core = getattr(core, owner)
        setattr(core, name, value)

    return change


def merge(core):
    """As adapters are merged: the version counter stays the same."""
    weight = core.language_model.layers[3].mixin.kv_proj.weight
    version = weight._version
    weight.data += 1e-3
    assert weight._version == version


def in_place(change):
    """Write to the data of a weight: its version counter and address stay the same."""

    def write(core):
        weight = core.language_model.layers[3].mixin.kv_proj.weight
        before = weight._version, weight.data_ptr()
        change(weight.data)
        assert (weight._version, weight.data_ptr()) == before

    return write


def exchange(data):
    data[:2] = data[:2].flip(0)


def replace(core):
    """One number changes, and again no version counter."""
    weight = core.language_model.layers[1].mixin.kv_proj.weight
    changed, version = weight.detach().clone(), weight._version
    changed[0, 1] += 0.5
    weight.data = changed
    assert weight._version == version


def load(core):
    core.load_state_dict({name: t * 1.5 for name, t in core.state_dict().items()})


def train(core):
    weights = list(core.multi_modal_projector.parameters())
    step = torch.optim.SGD(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    step.step()


VISION, MIXIN = "vision_tower.encoder.layer.", "language_model.layers.3.mixin."
CHANGES = {
    "class token": nudge("vision_tower.embeddings.cls_token"),
    "patches": nudge("vision_tower.embeddings.patch_embeddings.projection.weight"),
    "first layer": nudge(f"{VISION}0.attention.q_proj.weight"),
    "last layer": nudge(f"{VISION}1.lambda_2"),
    "projector": nudge("multi_modal_projector.3.bias"),
    "norm": nudge(f"{MIXIN}attn_norm.weight"),
    "keys": nudge(f"{MIXIN}kv_proj.weight"),
    "merged": merge,
    "a row": in_place(lambda data: data[7].zero_()),
    "a number": in_place(lambda data: data[5, 3].add_(1)),
    "rows exchanged": in_place(exchange),
    "signs of columns": in_place(lambda data: data[:, 1:4:2].neg_()),
    "replaced": replace,
    "loaded": load,
    "trained": train,
    "theta": set_to("config.mixin_config.rope_theta", 5e5),
    "fold": set_to("config.ps_version", "v1"),
    "heads": set_to("config.vision_config.num_attention_heads", 2),
    "depth": set_to("config.select_layer", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_finds_no_image(fresh, name):
    store, batch = comemo.MemoryStore(), batch_of(fresh, [2, "square", 3])
    memory_of(fresh, batch, store)
    CHANGES[name](fresh)
    assert_same(memory_of(fresh, batch, store), memory_of(fresh, batch))
    assert counts(store, "misses", "hits", "entries") == (2, 0, 2)


@pytest.mark.parametrize(
    "change",
    [
        nudge(f"{MIXIN}q_proj.weight"),
        nudge(f"{MIXIN}o_proj.weight"),
        nudge("language_model.layers.0.self_attn.q_proj.weight"),
        nudge("language_model.embed_tokens.weight"),
    ],
)
def test_other_weights_do_not_change_the_key(fresh, change):
    batch = batch_of(fresh, [2, "square", 3])
    before = key_of(fresh, batch)
    change(fresh)
    assert key_of(fresh, batch) == before


def test_layers_that_do_not_run_do_not_matter(fresh):
    fresh.config.select_layer = 1
    batch = batch_of(fresh, [2, "square", 3])
    before = key_of(fresh, batch)
    nudge(f"{VISION}1.lambda_2")(fresh)
    assert key_of(fresh, batch) == before
    nudge(f"{VISION}0.lambda_2")(fresh)
    assert key_of(fresh, batch) != before


def test_the_same_weights_are_the_same_model(loaded, demo_checkpoint, fresh):
    batch = batch_of(fresh, [2, "square", 3])
    again = type(loaded[0]).from_pretrained(demo_checkpoint, dtype=torch.float32).model
    assert key_of(loaded[0].model, batch) == key_of(fresh, batch) == key_of(again, batch)


def test_weights_are_hashed_once(fresh, monkeypatch):
    asked, identify = [], store_keys.identify_model
    monkeypatch.setattr(
        "comemo.store.store.identify_model", lambda *parts: asked.append(0) or identify(*parts)
    )
    store = comemo.MemoryStore()
    for name in ("square", "wide", "square"):
        memory_of(fresh, batch_of(fresh, [2, name]), store)
    assert len(asked) == 1
    merge(fresh)
    memory_of(fresh, batch_of(fresh, [2, "square"]), store)
    assert len(asked) == 2


@given(
    sizes=st.lists(st.sampled_from([0, 1, 2, 3, 50, 2**16 + 1, 2**20 + 6]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
    data=st.data(),
)
def test_every_bit_of_a_weight_counts(sizes, dtype, data):
    """Whichever bits are flipped: at the end of a word, in pairs, in their own block."""
    bits = [torch.randint(0, 256, (n, dtype.itemsize), dtype=torch.uint8) for n in sizes]
    before = store_keys.sum_bits([t.flatten().view(dtype) for t in bits])
    assert before == store_keys.sum_bits([t.clone().flatten().view(dtype) for t in bits])
    filled = st.sampled_from([i for i, n in enumerate(sizes) if n] or [None])
    for which in data.draw(st.lists(filled, min_size=1, max_size=3, unique=True)):
        if which is None:
            return
        place = data.draw(st.integers(0, sizes[which] - 1))
        count = data.draw(st.sampled_from([1, 2, sizes[which]]))
        bits[which][place : place + count, -1] ^= data.draw(st.sampled_from([1, 64, 128, 255]))
    assert before != store_keys.sum_bits([t.flatten().view(dtype) for t in bits])


def test_the_order_of_weights_counts():
    large, small = torch.randn(2, 2**18), torch.randn(2, 7)
    for a, b in (large, small):
        assert store_keys.sum_bits([a, b]) == store_keys.sum_bits([a.clone(), b[None]])
        assert store_keys.sum_bits([a, b]) != store_keys.sum_bits([b, a])
        assert store_keys.sum_bits([a, b]) != store_keys.sum_bits([a.flip(0), b])
    assert store_keys.sum_bits([large]) == store_keys.sum_bits([large.mT.contiguous().mT])
    assert store_keys.sum_bits([]) == []


def test_a_store_keeps_no_model_alive(loaded):
    store, model = comemo.MemoryStore(), copy.deepcopy(loaded[0].model)
    memory_of(model, batch_of(loaded[0].model, [2, "square"]), store)
    assert len(store._identities) == 1
    del model
    assert len(store._identities) == 0


def test_dtype_grid_and_order_of_tiles_are_part_of_the_key(fresh):
    store = comemo.MemoryStore()
    batch = batch_of(fresh, [2, "wide", 3])
    memory_of(fresh, batch, store)
    memory_of(fresh, batch_of(fresh, [2, "wide", 3], grids=False), store)
    assert len(store) == 2  # other positions
    fresh.config.tile_order = "column"
    tall = batch | {"tile_grid": [(1, 2)]}
    memory_of(fresh, tall, store)
    assert len(store) == 3
    memory_of(fresh, batch | {"pixel_values": batch["pixel_values"].flip(0)}, store)
    assert len(store) == 4
    half = fresh.bfloat16()
    memory = memory_of(half, batch, store)
    assert len(store) == 5
    assert memory.media.dtype == memory.keys[3].dtype == torch.bfloat16
    assert_same(memory, memory_of(half, batch))
    # The image counts as the model sees it.
    rounded = batch | {"pixel_values": batch["pixel_values"].bfloat16()}
    memory_of(half, rounded, store)
    assert len(store) == 5


def test_one_pixel_is_another_image(core):
    store, batch = comemo.MemoryStore(), batch_of(core, [2, "square", 3])
    memory_of(core, batch, store)
    pixels = batch["pixel_values"].clone()
    pixels[0, 2, -1, -1] += 1
    memory_of(core, batch | {"pixel_values": pixels}, store)
    assert store.stats.misses == 2


def test_images_that_are_not_whole_tiles(core):
    store, mask = comemo.MemoryStore(), torch.zeros(2, 600, dtype=torch.bool)
    mask[0, :500] = mask[1, :12] = True
    ids = torch.arange(600).expand(2, -1)
    pixels = torch.cat([tiles()["square"]] * 2)
    with pytest.raises(ValueError, match=r"whole tiles of 256 image tokens, got \[500, 12\]"):
        core.build_image_memory(pixels, mask, ids, None, store)
    with pytest.raises(ValueError, match="must agree on the number of image tokens"):
        core.build_image_memory(pixels, mask, ids, [(1, 1), (1, 1)], store)
    assert store.stats.misses == 0


def test_no_images_in_a_batch(core):
    ids = torch.arange(5)[None]
    mask, none = torch.zeros(1, 5, dtype=torch.bool), torch.zeros(0, 3, 448, 448)
    with torch.no_grad():
        found = core.build_image_memory(none, mask, ids, None, comemo.MemoryStore())
    assert len(found) == 0


def test_inputs_of_a_digest_are_delimited():
    """Shapes, and where the pixels end, are part of the key."""
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 8, 4)
    ids = torch.arange(4)
    key = store_keys.identify_image("m", a, ids)
    assert key != store_keys.identify_image("m", b, ids)
    assert key != store_keys.identify_image("m", a, F.pad(ids, (0, 1)))
    assert key != store_keys.identify_image("n", a, ids)
    assert key == store_keys.identify_image("m", a.clone(), ids.int())
