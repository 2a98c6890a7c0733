"""Chunked prefill, tiles in rounds and a cache that grows in place change no result."""

import copy

import pytest
import torch
from conftest import DEVICE, SLOW
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small import place
from transformers import DynamicCache

import comemo
import comemo_kernels as ops
from comemo.decode.cache import ROOM, RoomyCache
from comemo.decode.prefill import prefill

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


# --- the cache ---


@st.composite
def histories(draw):
    """Operations on a cache: (name, number)."""
    step = st.one_of(
        st.tuples(st.just("update"), st.integers(1, 300)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.just(0)),
    )
    return draw(st.lists(step, min_size=1, max_size=8)), draw(st.sampled_from([0, 5, 400]))


@given(histories())
def test_the_cache_behaves_like_a_dynamic_cache(history):
    steps, capacity = history
    ours, theirs, batch = RoomyCache(2, capacity), DynamicCache(), 2
    for index, (what, number) in enumerate(steps):
        drawn = torch.Generator().manual_seed(index)
        if what == "update":
            for layer in range(2):
                new = torch.randn(2, batch, 3, number, 4, generator=drawn)
                found, wanted = (cache.update(*new, layer) for cache in (ours, theirs))
                for a, b in zip(found, wanted, strict=True):
                    assert torch.equal(a, b)
        elif what == "crop":
            number = min(number, theirs.get_seq_length() - 1)
            for cache in (ours, theirs):
                cache.crop(-max(number, 0))
        elif what == "reorder":
            order = torch.randint(batch, (batch,), generator=drawn)
            for cache in (ours, theirs):
                cache.reorder_cache(order)
        elif what == "repeat":
            batch *= number
            for cache in (ours, theirs):
                cache.batch_repeat_interleave(number)
        else:
            ours.reset()
            theirs = DynamicCache()
        assert ours.get_seq_length() == theirs.get_seq_length()


def test_cache_copies_nothing_to_grow():
    cache = RoomyCache(1, capacity=64)
    token = torch.randn(1, 2, 1, 4)
    cache.update(token, token, 0)
    place = cache.layers[0].keys.data_ptr()
    for _ in range(63):
        keys, _ = cache.update(token, token, 0)
        assert keys.data_ptr() == place
    assert cache.nbytes == 2 * 64 * 2 * 4 * 4
    cache.update(token, token, 0)  # one more than the capacity
    moved = cache.layers[0].keys.data_ptr()
    for _ in range(ROOM - 1):
        cache.update(token, token, 0)
    assert cache.layers[0].keys.data_ptr() == moved != place


def test_the_cache_of_the_caller_is_used(model):
    """Although an empty one is false in Python."""
    ids = place(torch.arange(100, 120)[None])
    for cache in (DynamicCache(), RoomyCache(4)):
        model.generate(ids, past_key_values=cache, **OPTIONS)
        assert cache.get_seq_length() == 24


def test_forks_and_layers_of_different_lengths():
    cache = RoomyCache(2)
    new = torch.randn(1, 2, 9, 4)
    for layer in range(2):
        cache.update(new, new, layer)
    fork = RoomyCache.copy_of(cache, 9)
    cache.update(new, new, 0)  # as if the second layer had failed
    cache.crop_to(7)
    assert [layer.get_seq_length() for layer in cache.layers] == [7, 7]
    cache.update(-new, -new, 0)
    assert torch.equal(fork.layers[0].keys, new)
    assert torch.equal(fork.layers[1].values, new)
    assert RoomyCache.copy_of(RoomyCache(2), 0).get_seq_length() == 0


# --- chunked prefill ---


@pytest.fixture
def prompts(processor):
    """Three prompts, padded on the left, with two images, none, and one."""
    noise = [
        Image.effect_noise(size, 80).convert("RGB") for size in ((500, 448), (448, 448), (900, 448))
    ]

    def message(text, *pictures):
        shown = [{"type": "image", "image": picture} for picture in pictures]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]

    batch = processor.apply_chat_template(
        [message("compare them", *noise[:2]), message("hello"), message("and this", noise[2])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    return place(dict(batch))


@pytest.fixture
def answer(model, prompts):
    def ask(**options):
        output = model.generate(
            **prompts, **OPTIONS, **options, return_dict_in_generate=True, output_logits=True
        )
        return output.sequences, torch.stack(output.logits)

    return ask


@pytest.mark.parametrize(
    ("chunk", "positions"),
    [(64, "raw"), (257, "compressed"), pytest.param(5000, "raw", marks=SLOW)]
    + [pytest.param(*two, marks=SLOW) for two in ((64, "compressed"), (257, "raw"))],
)
def test_chunks_change_nothing(model, answer, chunk, positions):
    """Chunks end inside images, padding and text."""
    model.config.decode_positions = positions
    tokens, logits = answer()
    for options in ({}, {"cache_implementation": "static"}):
        found, these = answer(prefill_chunk_size=chunk, **options)
        assert torch.equal(found, tokens)
        torch.testing.assert_close(these, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_chunks_with_beams_and_embeddings(model, tokenizer, answer, prompts):
    wanted = answer(num_beams=2)[0]
    assert torch.equal(answer(num_beams=2, prefill_chunk_size=100)[0], wanted)
    tiles = place(torch.randn(3, 3, 448, 448))
    for pixel_values in (tiles, None):
        chat = [
            model.chat(
                tokenizer,
                pixel_values,
                "what is this?",
                {"max_new_tokens": 5, "prefill_chunk_size": chunk},
                target_aspect_ratio=None if pixel_values is None else [(2, 1)],
            )
            for chunk in (None, 50)
        ]
        assert chat[0] == chat[1]


@pytest.mark.parametrize("rule", ["token_count", pytest.param("position", marks=SLOW)])
def test_chunks_are_scaled_like_the_whole_prompt(model, answer, rule):
    """Dynamic NTK scaling depends on the whole prompt, not on the chunk."""
    text = model.config.text_config
    model.config.ntk_length = rule
    plain = answer()[1]
    text.max_position_embeddings, limit = 200, text.max_position_embeddings
    try:
        tokens, logits = answer()
        found, these = answer(prefill_chunk_size=100)
    finally:
        text.max_position_embeddings = limit
    assert torch.equal(found, tokens)
    torch.testing.assert_close(these, logits, rtol=1e-3, atol=1e-4)
    assert (logits - plain).abs().max() > 0.01


def test_a_chunk_bounds_activations(model, answer):
    """No layer gets more tokens than a chunk has."""
    seen = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    try:
        answer(prefill_chunk_size=300)
    finally:
        handle.remove()
    assert max(seen) == 300
    assert sum(seen) > 800


def test_prefill_continues_from_a_cache(model):
    ids = place(torch.arange(100, 160)[None])
    places = place(torch.arange(60)[None])
    embeds = model.get_input_embeddings()(ids)
    logits = []
    for splits in ((60,), (20, 60), (1, 59, 60)):
        cache, start = RoomyCache(4), 0
        for end in splits:
            output = prefill(
                model, lambda a, b: embeds[:, a:b], places[:, :end], cache, start=start, chunk=16
            )
            start = end
        logits.append(output.logits)
        assert output.logits.shape[1] == 1
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-3, atol=1e-4)
    for start, chunk in ((60, None), (0, 0)):
        with pytest.raises(ValueError, match="chunk and the tokens after start must be positive"):
            prefill(model, lambda a, b: embeds, places, cache, start=start, chunk=chunk)


# --- tiles in rounds ---


def test_rounds_of_tiles_change_nothing(model):
    tiles = place(torch.randn(5, 3, 448, 448))
    seen = []
    layer = model.model.vision_tower.encoder.layer[0]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        with torch.no_grad():
            whole = model.model.project_images(tiles)
            model.config.tiles_at_once = 2
            found = model.model.project_images(tiles)
            assert len(model.model.project_images(tiles[:0])) == 0
    finally:
        handle.remove()
    assert seen == [5, 2, 2, 1]
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"tiles_at_once must be a whole number .*, got 0"):
        type(model.config)(tiles_at_once=0)


@torch.no_grad()
def test_rounds_write_one_buffer_and_the_sequence(model):
    """Each round writes its image tokens directly into both."""
    tiles = place(torch.randn(3, 3, 448, 448))
    whole = model.model.project_images(tiles)
    model.config.tiles_at_once = 2
    embeds = place(torch.zeros(1, 800, whole.shape[2]))
    rows = place(torch.arange(3 * 256) + 20)
    found = model.model.project_images(tiles, embeds, rows)
    assert found.untyped_storage().nbytes() == whole.nbytes, "no copy of a round"
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert torch.equal(embeds[0, 20:788], found.flatten(0, 1))
    assert not embeds[0, :20].any()
    assert not embeds[0, 788:].any()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert model.model.project_images(tiles).dtype == torch.bfloat16


@torch.no_grad()
def test_the_tower_uses_sdpa_and_its_output_is_not_copied(model, monkeypatch):
    """All in bfloat16; the class token stays in place."""
    core = copy.deepcopy(model.model).to(torch.bfloat16)
    assert core.vision_tower.config._attn_implementation == "sdpa"
    attended, written, projected = [], [], []
    sdpa, project = torch.nn.functional.scaled_dot_product_attention, ops.project_tiles

    def attend(q, k, v, **kwargs):
        attended.append((q.dtype, k.dtype, v.dtype, kwargs.get("attn_mask")))
        return sdpa(q, k, v, **kwargs)

    def projecting(tokens, *weights, **kwargs):
        projected.append((tokens.dtype, tokens.shape[1], tokens.data_ptr()))
        return project(tokens, *weights, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(ops, "project_tiles", projecting)
    last = core.vision_tower.encoder.layer[-1]
    last.register_forward_hook(lambda _, __, out: written.append(out.data_ptr()))
    core.project_images(place(torch.randn(1, 3, 448, 448, dtype=torch.bfloat16)))
    half = torch.bfloat16
    assert attended == [(half, half, half, None)] * len(core.vision_tower.encoder.layer)
    assert projected == [(half, 1025, written[0])]


def test_image_tokens_of_a_whole_prompt_are_written_once(model):
    """What `forward` writes is what embedding the memory's media gives."""
    core = copy.deepcopy(model.model)
    ids = place(torch.full((2, 600), 7))
    ids[0, 30:542] = ids[1, 300:556] = core.config.image_token_id
    mask, tiles = core.find_image_tokens(ids), place(torch.randn(3, 3, 448, 448))
    places = core.prompt_position_ids(mask, torch.ones_like(ids), [(1, 1)] * 3)
    for frozen in (False, True):
        core.requires_grad_(not frozen)
        embeds, memory = core._embed_images(ids, tiles, mask, places, [(1, 1)] * 3)
        assert torch.equal(embeds, core.embed(ids, mask, memory))
        assert embeds.requires_grad != frozen
    # As in parameter-efficient training: the output of frozen embeddings becomes a leaf.
    hook = core.get_input_embeddings().register_forward_hook(
        lambda _, __, out: out.requires_grad_()
    )
    again, _ = core._embed_images(ids, tiles, mask, places, [(1, 1)] * 3)
    hook.remove()
    assert torch.equal(again, embeds)
    assert again.requires_grad
    with pytest.raises(ValueError, match=r"2 tiles of 256 tokens .* \[512, 256\]"):
        core._embed_images(ids, tiles[:2], mask, places, [(1, 1)] * 3)
    with pytest.raises(ValueError, match="embeds exclude a memory_store"):
        core.build_image_memory(
            tiles, mask, places, None, comemo.MemoryStore(), torch.zeros(2, 600, 32)
        )
