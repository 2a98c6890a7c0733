"""`MemoryStore`: the same answers with less work."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from known import (
    GREEDY,
    assert_same,
    batch_of,
    counts,
    memory_bytes,
    memory_of,
    tensors,
    tiles,
    work_on,
)

import comemo

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


# --- the same answers ---


PROMPTS = {
    "one": [[3, "wide", 4]],
    "two": [["square", 2, "wide", 4]],
    "twice": [[3, "square", 2, "square", 4]],
    "batch": [[1, "wide", 2], [9], [5, "square", 2, "other", 1]],
}


@pytest.mark.parametrize("grids", [True, False])
@pytest.mark.parametrize("name", PROMPTS)
def test_memories_are_equal_with_and_without_a_store(core, name, grids):
    batch, store = batch_of(core, *PROMPTS[name], grids=grids), comemo.MemoryStore()
    wanted = memory_of(core, batch)
    once = name != "twice" or not grids  # otherwise the tower sees one image instead of two
    for _ in range(2):
        assert_same(memory_of(core, batch, store), wanted, exact=once)
    pictures = {"one": (1, 1), "two": (2, 1), "twice": (1, 1), "batch": (3, 2)}[name]
    assert store.stats.misses == pictures[0 if grids else 1]


def test_answers_are_equal_with_and_without_a_store(loaded):
    model, store = loaded[0], comemo.MemoryStore()
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    for name in ("batch", "two", "one"):
        batch = batch_of(loaded[0].model, *PROMPTS[name])
        wanted = model.generate(**batch, **options)
        found = model.generate(**batch, **options, memory_store=store)
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(
            torch.stack(found.logits), torch.stack(wanted.logits), rtol=0, atol=1e-4
        )
    assert counts(store, "misses", "hits") == (3, 3)


def test_chats_are_equal_with_and_without_a_store(loaded, tmp_path):
    model, tokenizer = loaded
    store = comemo.MemoryStore(directory=tmp_path)
    pixels, question = tiles()["wide"], "What is this?"
    for grids in ([(2, 1)], None):
        rest = {"target_aspect_ratio": grids}
        wanted = model.chat(tokenizer, pixels, question, GREEDY, **rest)
        for known in (store, store, comemo.MemoryStore(directory=tmp_path)):
            found = model.chat(tokenizer, pixels, question, GREEDY, **rest, memory_store=known)
            assert found == wanted
    assert counts(store, "misses", "hits", "disk_entries") == (2, 2, 2)
    text = model.chat(tokenizer, None, question, GREEDY, memory_store=store)
    assert text == model.chat(tokenizer, None, question, GREEDY)


def test_recorded_model_is_equal_with_and_without_a_store(model, tokenizer):
    """Tiles in columns and raw positions, as published."""
    store = comemo.MemoryStore()
    rest = {"num_patches_list": [1, 3], "target_aspect_ratio": [(1, 1), (2, 1)]}
    pixels = torch.cat([tiles()["square"], tiles()["wide"]])
    question = "<image> and <image>, hello world"
    wanted = model.chat(tokenizer, pixels, question, GREEDY, **rest)
    for _ in range(2):
        assert wanted == model.chat(tokenizer, pixels, question, GREEDY, **rest, memory_store=store)
    assert counts(store, "misses", "hits") == (2, 2)


# --- for less ---


def test_a_known_image_computes_nothing(loaded, core):
    model, store = loaded[0], comemo.MemoryStore()
    with work_on(core) as work:
        memory_of(core, batch_of(core, [2, "wide", 3]), store)
        assert work() == ([3], 1)
    places = [
        ([[2, "wide", 3]], {}),
        ([[40, "wide", 3]], {"num_beams": 2, "num_return_sequences": 2}),  # after more words
        ([[8], [3, "wide"]], {}),  # in another row
        ([[1, "wide", 5, "wide", 2]], {"num_beams": 2}),  # twice
    ]
    for place, options in places:
        batch, options = batch_of(core, *place), GREEDY | options | {"max_new_tokens": 3}
        with work_on(core) as work:
            found = model.generate(**batch, **options, memory_store=store)
            assert work() == ([], 0), place
        assert torch.equal(found, model.generate(**batch, **options))


def test_only_unknown_images_pass_the_vision_tower(core):
    store = comemo.MemoryStore()
    memory_of(core, batch_of(core, [2, "wide", 3]), store)
    batch = batch_of(core, ["square", "wide", 1], ["square", 5, "other"])
    with work_on(core) as work:
        found = memory_of(core, batch, store)
        assert work() == ([2], 1)  # two tiles in one call, although `square` is there twice
    assert counts(store, "hits", "misses", "entries") == (2, 3, 3)
    assert_same(found, memory_of(core, batch), exact=False)


def test_an_assistant_model_uses_no_store(loaded, core):
    model, store = loaded[0], comemo.MemoryStore()
    batch, end = batch_of(core, [2, "square", 3]), {"eos_token_id": 0}  # some assistants need one
    assistant = copy.deepcopy(model)
    wanted = model.generate(**batch, **GREEDY | end)
    for _ in range(2):
        options = GREEDY | end | {"assistant_model": assistant, "memory_store": store}
        assert torch.equal(model.generate(**batch, **options), wanted)
    assert counts(store, "misses", "hits") == (1, 1)


def test_stored_memories_allow_gradients(core, fresh):
    """In whatever mode it was stored; the image itself has no gradients."""
    store, batch = comemo.MemoryStore(), batch_of(core, [2, "square", 3])
    with torch.inference_mode():
        memory_of(fresh, batch, store)
    memory = memory_of(fresh, batch, store)
    held = (memory.media, memory.ids, memory.spans, *memory.keys.values(), *memory.values.values())
    assert not any(t.is_inference() or t.requires_grad for t in held)
    del batch["pixel_values"], batch["tile_grid"]
    out = fresh(**batch, image_memory=memory)
    out.last_hidden_state.sum().backward()
    mixin = fresh.language_model.layers[1].mixin
    assert mixin.q_proj.weight.grad.abs().max() > 0
    assert mixin.kv_proj.weight.grad is None
    assert store.stats.hits == 1


def test_eight_threads_use_a_store_at_once(core, tmp_path):
    one = memory_bytes(core, "square")
    wide = memory_bytes(core, "wide")
    store = comemo.MemoryStore(budget=wide + one, directory=tmp_path)
    batches = [batch_of(core, [1, *names]) for names in (["square"], ["wide", "other"], ["other"])]
    wanted = [memory_of(core, batch) for batch in batches]
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        for turn in range(9):
            which = (number + turn) % 3
            assert_same(memory_of(core, batches[which], store), wanted[which], exact=False)
            if number == 0 and turn % 4 == 3:
                store.clear(disk=turn == 7)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    held = sum(tensor.nbytes for image in store._held.values() for tensor in tensors(image))
    stats = store.stats
    assert stats.bytes == held <= store.budget
    assert stats.entries == len(store._held)
    assert stats.hits + stats.disk_hits + stats.misses == 8 * 9 // 3 * 4
    assert stats.refused == stats.too_large == 0
    assert stats.evictions > 0
    assert not list(tmp_path.glob("*.part*"))
