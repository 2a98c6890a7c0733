"""The decode loop against transformers' own loops: tokens, logits, scores and the cache."""

import pytest
import torch
from chats import case_of, prepared
from conftest import DEVICE, SLOW
from decoding import (  # noqa: F401
    GREEDY,
    TOLD,
    _model,
    ahead,
    assert_same,
    assert_same_cache,
    loop,
    model,
    poison,
    text,
    wide_picture,
    without_picture,
)
from harness import LOGITS
from PIL import Image
from small import make_model, make_prompts
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

import comemo
from comemo import ChatSession, CoMemoProcessor, DecodeLoop
from comemo.decode.cache import RoomyCache
from comemo.decode.interface import Prefilled
from comemo.decode.step import DecodeStep
from comemo_kernels import MemoryScales

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("prompts", [make_prompts, without_picture, wide_picture, text])
@pytest.mark.parametrize("positions", ["raw", "compressed"])
def test_a_call_is_transformers_own(model, loop, ahead, prompts, positions):
    model.config.decode_positions = positions
    assert_same(model, loop, prompts(model))
    assert loop.captures == loop.buckets == 1
    poison(loop)
    assert_same(model, loop, prompts(model))
    assert loop.captures == 1


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 20, "temperature": 1.3},
        {"do_sample": True, "top_p": 0.8, "num_return_sequences": 3},
        {"prefill_chunk_size": 5},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"past_key_values": DynamicCache},
        {"past_key_values": lambda: RoomyCache(4)},
        {"min_new_tokens": 4, "eos_token_id": list(range(290))},
    ],
    ids=" ".join,
)
def test_options(model, loop, ahead, options):
    assert_same(model, loop, make_prompts(model), **options)


@pytest.mark.parametrize("many", [False, True])
def test_every_answer_ends_by_itself(model, loop, ahead, many):
    """More stop tokens than a step can check are checked outside of it."""
    batch = make_prompts(model)
    tokens = model.generate(**batch, **GREEDY)[:, -7:]
    only = [t for t in tokens[0].tolist() if t not in tokens[1]]
    for ends in ([only[1]], [only[1], int(tokens[1, 3])], [only[1]]):
        ends += [t for t in range(290, 310) if t not in tokens] if many else []
        out = assert_same(model, loop, batch, eos_token_id=ends, pad_token_id=3)
        assert out.sequences[0, -1] == 3
    out = assert_same(model, loop, batch)
    assert out.sequences.shape[1] == batch["input_ids"].shape[1] + 7
    assert loop.captures == 1


def test_no_step_is_in_vain_where_the_end_is_known(model, loop, ahead, monkeypatch):
    batch, steps, run = text(model), [], DecodeStep.run
    monkeypatch.setattr(DecodeStep, "run", lambda self, *args: steps.append(run(self, *args)))
    tokens = model.generate(**batch, **GREEDY, decode_loop=loop)[:, -7:]
    assert len(steps) == 6
    steps.clear()
    ends = tokens[:, 2].tolist()
    found = model.generate(**batch, **GREEDY | {"eos_token_id": ends}, decode_loop=loop)
    assert len(steps) == found.shape[1] - batch["input_ids"].shape[1] - 1 + ahead


class Ends(StoppingCriteria):
    """Ends each row after so many tokens, and checks its arguments."""

    def __init__(self, prompt, *lengths):
        self.lengths, self.prompt, self.seen = torch.tensor(lengths, device=DEVICE), prompt, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.tolist(), len(scores)))
        return input_ids.shape[1] - self.prompt >= self.lengths


def test_criteria_of_the_caller(model, loop, ahead):
    batch, seen = make_prompts(model), []
    for extra in ({}, {"decode_loop": loop}):
        criterion = Ends(batch["input_ids"].shape[1], 2, 5)
        criteria = StoppingCriteriaList([criterion])
        out = model.generate(**batch, **GREEDY | TOLD, stopping_criteria=criteria, **extra)
        seen.append((criterion.seen, out.sequences.tolist()))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 5


def test_other_kinds_of_memory(model, loop, ahead):
    batch = make_prompts(model)
    with torch.no_grad():
        memory = model(**batch, use_cache=True).image_memory
    given = {n: t for n, t in batch.items() if n != "pixel_values"}
    assert_same(model, loop, given, image_memory=memory)
    turned = memory.reading(memory.spans)
    turned.table = tuple(t.roll(1, 0) for t in memory.table)
    assert_same(model, loop, given, image_memory=turned)
    scaled = memory.reading(memory.spans)
    for held in ("keys", "values"):
        small = {i: t.to(torch.float8_e4m3fn) for i, t in getattr(memory, held).items()}
        setattr(scaled, held, small)
    tiles = -(-len(memory) // 16)
    factors = {i: (0.5 + torch.rand(2, tiles, 3)).to(DEVICE).unbind(0) for i in memory.keys}
    scaled.scales = {i: MemoryScales(*pair, 16) for i, pair in factors.items()}
    assert_same(model, loop, given, image_memory=scaled)
    assert loop.buckets == 2
    model.config.memory_positions = "absolute"
    assert_same(model, loop, batch)
    assert loop.buckets == 3


@pytest.mark.parametrize("rule", ["token_count", "position"])
def test_dynamic_scaling(model, loop, rule):
    text_config, batch = model.config.text_config, make_prompts(model)
    limit = text_config.max_position_embeddings
    before = model.generate(**batch, **GREEDY | TOLD).logits[-1]
    model.config.rope_scaling = {"type": "dynamic", "factor": 2.0}
    model.config.ntk_length = rule
    text_config.max_position_embeddings = 20
    try:
        out = assert_same(model, loop, batch)
    finally:
        text_config.max_position_embeddings = limit
    assert (out.logits[-1] - before).abs().max() > 10 * LOGITS


def test_embeddings_and_a_prompt_read_before(model, loop, ahead):
    batch = make_prompts(model)
    core, mask = model.model, batch["attention_mask"]
    image_mask = core.find_image_tokens(batch["input_ids"])
    with torch.no_grad():
        ids = core.prompt_position_ids(image_mask, mask, batch["tile_grid"])
        tiles, grid = batch["pixel_values"], batch["tile_grid"]
        memory = core.build_image_memory(tiles, image_mask, ids, grid)
        embeds = core.embed(batch["input_ids"], image_mask, memory)
    given = {"attention_mask": mask, "position_ids": ids, "image_memory": memory}
    whole = assert_same(model, loop, given, inputs_embeds=embeds)
    cache = RoomyCache(4)
    with torch.no_grad():
        read = model(**batch, past_key_values=cache, use_cache=True)
    prefilled = Prefilled(read.logits[:, -1:], cache, ids, read.image_memory, mask)
    out = model.generate(prefilled=prefilled, decode_loop=loop, **GREEDY)
    assert torch.equal(out[:, 1:], whole.sequences)
    assert_same_cache(cache, whole.past_key_values)


def test_a_folded_model(ahead):
    model = make_model()
    batch, options = make_prompts(model), GREEDY
    loop = DecodeLoop(model)
    wanted = model.generate(**batch, decode_loop=loop, **options)
    model.fold_for_inference()
    assert torch.equal(model.generate(**batch, decode_loop=loop, **options), wanted)


def test_within_inference_mode(model, loop, ahead):
    batch = make_prompts(model)
    with torch.inference_mode():
        found = model.generate(**batch, **GREEDY, decode_loop=loop)
    assert torch.equal(assert_same(model, loop, batch).sequences, found)


def test_bfloat16(ahead):
    model = make_model(torch.bfloat16)
    batch = make_prompts(model)
    wanted, found = (
        torch.stack(model.generate(**batch, **GREEDY | TOLD | extra).logits)
        for extra in ({}, {"decode_loop": DecodeLoop(model)})
    )
    assert (wanted[:2] - found[:2]).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_stored_picture_is_one_like_others(model, loop, chunk):
    batch, options = make_prompts(model), GREEDY | {"prefill_chunk_size": chunk}
    wanted = model.generate(**batch, **options)
    store = comemo.MemoryStore()
    for _ in range(2):
        assert torch.equal(
            model.generate(**batch, **options, memory_store=store, decode_loop=loop), wanted
        )


def test_gives_recorded_answers(golden, inputs, checkpoint, tokenizer):
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    loop = DecodeLoop(model.eval())
    for name in ("dhr_2x1", "rope_two", "eos_1x1", "dhr_1x1_reppen"):
        record, case = case_of(golden, inputs, name)
        options = case["generation_config"] | {"eos_token_id": record["eos_token_id"]}
        out = model.generate(**prepared(model, tokenizer, case), **options, decode_loop=loop)
        assert out[0].tolist() == record["tokens"]


@pytest.mark.parametrize(("stored", "chunk"), [pytest.param(False, None, marks=SLOW), (True, 100)])
def test_a_session_answers_the_same(loaded, demo_checkpoint, picture_file, ahead, stored, chunk):
    model, _ = loaded
    processor = CoMemoProcessor.from_pretrained(demo_checkpoint)
    loop = DecodeLoop(model)
    options = {"max_new_tokens": 8, "do_sample": False, "prefill_chunk_size": chunk}
    plain = ChatSession(model, processor, **options)
    options["memory_store"] = comemo.MemoryStore() if stored else None
    looped = ChatSession(model, processor, **options, decode_loop=loop)
    with Image.open(picture_file) as picture:
        for question, image in (("hello", None), ("what is this?", picture), ("and?", None)):
            wanted = plain.ask(question, image)
            assert looped.ask(question, image) == wanted
            assert looped.report.read_tokens == plain.report.read_tokens
            assert_same_cache(looped._held.cache, plain._held.cache)
    assert looped.regenerate() == plain.regenerate()
    assert loop.captures == 2  # without an image and with one
