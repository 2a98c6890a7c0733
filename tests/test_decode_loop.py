"""The decode loop against transformers' own: tokens, logits, scores and the resulting cache."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, TRACED
from harness import LOGITS
from PIL import Image
from small import make_model, make_prompts, place
from test_generate import case_of, prepared
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

import comemo
import comemo_kernels as ops
from comemo import ChatSession, CoMemoProcessor, DecodeLoop
from comemo.decode import answer as decode_answer
from comemo.decode import arena as decode_memory
from comemo.decode import loop as decode
from comemo.decode.arena import capacity_for
from comemo.decode.cache import RoomyCache
from comemo.decode.interface import Prefilled
from comemo.decode.step import DecodeStep
from comemo_kernels import MemoryScales

pytestmark = pytest.mark.usefixtures("one_thread")
TOLD = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def _model():
    return make_model()


@pytest.fixture
def model(_model):
    before = dict(vars(_model.config))
    yield _model
    vars(_model.config).update(before)


@pytest.fixture
def loop(model):
    return DecodeLoop(model)


@pytest.fixture(params=[False, True], ids=["at once", "one step late"])
def ahead(request, monkeypatch):
    """Both ways to check whether to stop: as on a CPU, and as where the device runs behind."""
    monkeypatch.setattr(ops, "runs_ahead", lambda _: request.param)
    return request.param


class Collected(BaseStreamer):
    """Keeps what it is given; raises at one of the tokens, if asked to."""

    def __init__(self, fail_at=None):
        self.given, self.ended, self.fail_at = [], 0, fail_at

    @property
    def parts(self):
        return [value.tolist() for value in self.given]

    def put(self, value):
        self.given.append(value)
        if self.fail_at == len(self.given) - 1:  # the first part is the prompt
            raise InterruptedError

    def end(self):
        self.ended += 1


def poison(loop):
    """NaN wherever an earlier call left something."""
    for step in loop._steps.values():
        step.buffers.fill_(float("nan"))
        held = () if step.arena is None else step.arena.memory.keys | step.arena.memory.values
        for tensor in (*(held[i] for i in held), step.logits):
            tensor.fill_(float("nan"))


def assert_same_cache(cache, wanted, tolerance=LOGITS):
    assert cache.get_seq_length() == wanted.get_seq_length()
    for mine, theirs in zip(cache.layers, wanted.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        assert (mine.keys - theirs.keys).abs().max() < tolerance
        assert (mine.values - theirs.values).abs().max() < tolerance


def assert_same(model, loop, batch, **options):
    """One call with the loop and one without; what the first returned."""
    options = GREEDY | TOLD | options
    found = []
    for extra in ({}, {"decode_loop": loop}):
        torch.manual_seed(1)
        streamer = Collected()
        given = {n: v() if n == "past_key_values" else v for n, v in options.items()}
        found.append((model.generate(**batch, **given, **extra, streamer=streamer), streamer))
    (wanted, their), (ours, mine) = found
    assert torch.equal(ours.sequences, wanted.sequences)
    for name in ("logits", "scores"):
        assert len(ours[name]) == len(wanted[name])
        for one, other in zip(ours[name], wanted[name], strict=True):
            assert one.shape == other.shape
            assert one.dtype == torch.float32
            same = (one == other) | ((one - other).abs() < LOGITS)  # -inf, where left out
            assert same.all()
    assert_same_cache(ours.past_key_values, wanted.past_key_values)
    assert mine.parts == their.parts
    assert mine.ended == their.ended == 1
    return ours


def without_picture(model):
    """Two prompts of which the second has no image."""
    batch = make_prompts(model)
    batch["input_ids"][1].clamp_(max=200)
    batch["pixel_values"], batch["tile_grid"] = batch["pixel_values"][:1], [(1, 1)]
    return batch


def one_prompt(model, grids):
    """A prompt with pictures of these grids; of several tiles they take fewer ids than tokens."""
    config = model.config
    tiles = [ops.image_tokens(grid, config.side) // config.tokens_per_tile for grid in grids]
    images = sum(tiles) * config.tokens_per_tile
    ids = torch.randint(10, 200, (1, images + 5))
    ids[:, 2 : 2 + images] = config.image_token_id
    side = config.vision_config.image_size[0]
    pixel_values = torch.randn(sum(tiles), 3, side, side)
    return place({"input_ids": ids, "pixel_values": pixel_values, "tile_grid": grids})


def wide_picture(model):
    return one_prompt(model, [(2, 1)])


def text(model, tokens=11):
    return place({"input_ids": torch.randint(10, 200, (2, tokens))})


# --- what it computes ---


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
    """With more end tokens than a step knows they are looked for outside of it."""
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
    """Ends each row after so many tokens, and looks at what it is given."""

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


# --- buckets ---


def test_capacities():
    found = [capacity_for(n) for n in (0, 1, 1024, 1025, 2048, 2049, 4096, 5000)]
    assert found == [1024, 1024, 1024, 2048, 2048, 4096, 4096, 8192]
    assert [capacity_for(n, 16) for n in (1, 16, 17, 40)] == [16, 16, 32, 64]


def test_many_lengths_and_pictures_share_a_capture(model, loop):
    for case in range(50):
        grids = [(1 + case % 3, 1)] * (1 + case % 5)
        batch = one_prompt(model, grids)
        batch["input_ids"] = F.pad(batch["input_ids"], (7 * case % 90, 0), value=30)
        options = GREEDY | {"max_new_tokens": 3}
        found = model.generate(**batch, **options, decode_loop=loop)
        if case % 10 == 0:
            assert torch.equal(found, model.generate(**batch, **options))
    assert loop.captures == loop.buckets == 1


def test_calls_by_turns_see_nothing_of_each_other(model, loop):
    first, second = make_prompts(model), make_prompts(model)
    second["pixel_values"] = second["pixel_values"].flip(0) + 1
    for batch in (first, second, first, text(model, 3), second, text(model, 30), first):
        poison(loop)
        assert_same(model, loop, batch)
    assert loop.captures == 2
    for grids in ([(1, 1)] * 3, [(2, 1)], [(1, 1)], [(3, 1), (1, 1)]):
        poison(loop)
        assert_same(model, loop, one_prompt(model, grids))
    assert loop.captures == 3


def test_an_answer_moves_on_when_its_bucket_is_full(model, loop, ahead, monkeypatch):
    monkeypatch.setattr(decode, "capacity_for", lambda n: -(-n // 4) * 4)
    monkeypatch.setattr(decode, "ROOM_FOR_ANSWER", 1)
    monkeypatch.setattr(decode_answer, "ROOM", 2)  # the ids move on, too
    for prompts in (make_prompts, text):
        torch.manual_seed(2)
        batch = prompts(model)
        out = assert_same(model, loop, batch, max_new_tokens=14)
        tokens = out.sequences[0, -14:].tolist()
        end = max(tokens, key=tokens.index)  # comes latest
        assert_same(model, loop, batch, max_new_tokens=14, eos_token_id=end, pad_token_id=5)
    assert loop.buckets == 4
    assert loop.captures > 6
    loop = DecodeLoop(model, keep=1)
    assert_same(model, loop, make_prompts(model), max_new_tokens=14)
    assert loop.buckets == 1


def test_few_buckets_are_kept(model):
    loop = DecodeLoop(model, keep=2)
    one = place({"input_ids": torch.randint(10, 200, (1, 5))})
    for batch in (one, text(model), one, make_prompts(model), one):
        assert_same(model, loop, batch)
    assert loop.buckets == 2
    assert loop.captures == 3  # the one used last but one went
    assert_same(model, loop, text(model))
    assert loop.captures == 4


def test_another_model_is_captured_anew():
    model = make_model()
    loop, batch = DecodeLoop(model), text(model)
    for change in (
        lambda: None,
        lambda: model.lm_head.register_parameter(
            "weight", torch.nn.Parameter(-model.lm_head.weight, requires_grad=False)
        ),
        lambda: model.lm_head.register_forward_hook(lambda m, args, out: out.roll(1, -1)),
        lambda: setattr(model.config, "ntk_length", "token_count"),
    ):
        before = loop.captures
        change()
        assert_same(model, loop, batch)
        assert loop.captures == before + 1
        assert_same(model, loop, batch)
        assert loop.captures == before + 1


# --- ends and errors ---


@pytest.mark.parametrize("fail_at", [1, 4])
def test_a_call_that_fails_leaves_loop_and_cache_usable(model, loop, ahead, fail_at):
    batch, caches = make_prompts(model), []
    for extra in ({}, {"decode_loop": loop}):
        cache = RoomyCache(4)
        with pytest.raises(InterruptedError):
            model.generate(
                **batch, **GREEDY, **extra, past_key_values=cache, streamer=Collected(fail_at)
            )
        caches.append(cache)
    assert caches[0].get_seq_length() == batch["input_ids"].shape[1] + fail_at - 1
    assert_same_cache(caches[1], caches[0])
    assert_same(model, loop, batch)
    assert loop.captures == 1


def test_a_step_that_fails(model, loop, ahead, monkeypatch):
    monkeypatch.setattr(ops, "capture", lambda function, device: function)  # a graph calls no hook
    batch, cache = make_prompts(model), RoomyCache(4)
    calls = [0]

    def fail(*_):
        calls[0] += 1
        if calls[0] == 4:  # the prompt was the first
            raise InterruptedError

    handle = model.model.language_model.layers[2].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        model.generate(**batch, **GREEDY, decode_loop=loop, past_key_values=cache)
    handle.remove()
    assert {layer.get_seq_length() for layer in cache.layers} == {batch["input_ids"].shape[1] + 2}
    assert_same(model, loop, batch)


def test_one_call_at_a_time(model, loop):
    batch = text(model)

    class Asks(Collected):
        def put(self, value):
            super().put(value)
            if len(self.given) > 1:
                model.generate(**batch, **GREEDY, decode_loop=loop)

    with pytest.raises(RuntimeError, match="another call uses this loop"):
        model.generate(**batch, **GREEDY, decode_loop=loop, streamer=Asks())
    assert_same(model, loop, batch)


@TRACED
def test_static_buffers_are_a_loop(model, monkeypatch):
    made, batch = [], make_prompts(model)

    class Noted(DecodeLoop):
        def __init__(self, *args):
            made.append(self)
            super().__init__(*args)

    monkeypatch.setattr("comemo.generation.DecodeLoop", Noted)
    wanted = model.generate(**batch, **GREEDY)
    static = {"cache_implementation": "static"} | GREEDY
    out = model.generate(**batch, **static, return_dict_in_generate=True)
    assert torch.equal(out.sequences, wanted)
    assert isinstance(out.past_key_values, StaticCache)
    assert out.past_key_values.get_seq_length() == wanted.shape[1] - 1
    assert [loop.captures for loop in made] == [1]
    model.generate(**batch, **static, num_beams=2)
    model.generate(**batch, **static, return_dict_in_generate=True, output_attentions=True)
    model.generate(**batch, **GREEDY)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens"),
        ({"assistant_model": 0}, "assistant_model"),
        ({"output_attentions": True, "num_beams": 3}, "output_attentions, num_beams=3"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"decode_loop": True}, "a loop of another model"),
        ({"hf_device_map": 0}, "layers on several devices"),
    ],
    ids=str,
)
def test_what_a_loop_cannot_do(model, loop, options, message, monkeypatch):
    options = {"decode_loop": loop} | options
    if "assistant_model" in options:
        options["assistant_model"] = model
    if options.pop("hf_device_map", None) is not None:
        monkeypatch.setattr(model, "hf_device_map", {"a": 0, "b": "cpu"}, raising=False)
    with pytest.raises(ValueError, match=f"decode_loop must be .*{message}"):
        model.generate(**text(model), **GREEDY | options)


def test_what_a_loop_cannot_take_over(model, loop):
    batch = make_prompts(model)
    options = GREEDY | {"decode_loop": loop}
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        DecodeLoop(model, keep=0)
    with pytest.raises(ValueError, match=r"decode_loop must be .* loop of another model"):
        model.generate(**batch, **options | {"decode_loop": DecodeLoop(make_model())})
    gaps = dict(batch, attention_mask=batch["attention_mask"].clone())
    gaps["attention_mask"][1, 30] = 0
    with pytest.raises(ValueError, match=r"padded on the left, got .* with gaps"):
        model.generate(**gaps, **options)
    sliding = DynamicCache()
    sliding.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(4)]
    with pytest.raises(ValueError, match=r"got DynamicCache with layers .*SlidingWindow"):
        model.generate(**batch, **options, past_key_values=sliding)
    with torch.no_grad():
        read = model(**batch, use_cache=True)
    core, ids = model.model, batch["input_ids"]
    places = core.prompt_position_ids(
        core.find_image_tokens(ids), batch["attention_mask"], batch["tile_grid"]
    )
    memory, cache = read.image_memory, read.past_key_values
    whole = Prefilled(read.logits[:, -1:], cache, places, memory, batch["attention_mask"])
    empty = replace(whole, cache=RoomyCache(4))
    with pytest.raises(ValueError, match=r"must hold the 41 tokens of position_ids, got 0"):
        model.generate(prefilled=empty, **options)
    short = replace(whole, image_memory=memory.reading(memory.spans[:1]))
    with pytest.raises(ValueError, match=r"spans \(2, 1, 2\), got \(1, 1, 2\)"):
        model.generate(prefilled=short, **options)
    held = memory.keys.pop(1)
    with pytest.raises(ValueError, match=r"mixin layers \[1, 3\] .* got layers \[3\] and a table"):
        model.generate(prefilled=whole, **options)
    memory.keys[1], memory.table = held, None
    with pytest.raises(ValueError, match=r"table of angles, got layers \[1, 3\] and no table"):
        model.generate(prefilled=whole, **options)
    assert_same(model, loop, batch)


def test_probabilities_that_are_no_numbers(ahead):
    model = make_model()
    batch, loop = text(model), DecodeLoop(model)
    weight = model.lm_head.weight[5]
    kept = weight.clone()
    weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be numbers to sample"):
        model.generate(**batch, **GREEDY | {"do_sample": True}, decode_loop=loop)
    weight.copy_(kept)
    for sampled in (False, True):
        assert_same(model, loop, batch, do_sample=sampled)


@pytest.mark.parametrize("chunk", [None, 5])
def test_a_stored_picture_is_one_like_others(model, loop, chunk):
    batch, options = make_prompts(model), GREEDY | {"prefill_chunk_size": chunk}
    wanted = model.generate(**batch, **options)
    store = comemo.MemoryStore()
    for _ in range(2):
        assert torch.equal(
            model.generate(**batch, **options, memory_store=store, decode_loop=loop), wanted
        )


# --- recorded answers, sessions ---


def test_gives_recorded_answers(golden, inputs, checkpoint, tokenizer):
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    loop = DecodeLoop(model.eval())
    for name in ("dhr_2x1", "rope_two", "eos_1x1", "dhr_1x1_reppen"):
        record, case = case_of(golden, inputs, name)
        options = case["generation_config"] | {"eos_token_id": record["eos_token_id"]}
        out = model.generate(**prepared(model, tokenizer, case), **options, decode_loop=loop)
        assert out[0].tolist() == record["tokens"]


@pytest.mark.parametrize(("stored", "chunk"), [(False, None), (True, 100)])
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
    assert loop.captures == 2  # without a picture and with one


# --- graphs ---


def test_capture_and_flag_without_a_gpu():
    calls = []
    assert ops.capture(lambda: calls.append(1), "cpu")() is None
    assert calls == [1]
    with pytest.raises(ValueError, match="warmups must be an integer from 1"):
        ops.capture(lambda: None, "cpu", warmups=0)
    assert not ops.runs_ahead("cpu")
    value = torch.tensor([3])
    flag = ops.HostFlag(value)
    flag.post(value)
    value.fill_(4)
    assert flag.read().tolist() == [3]


class NothingRead(TorchDispatchMode):
    """Refuses operations for which a host would wait for a GPU, and that no graph can hold."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.READS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [make_prompts, without_picture, text])
def test_a_step_is_all_on_the_device(model, loop, prompts, monkeypatch):
    """Replayed without anything in between, as a graph would be, it goes on by itself."""
    batch = prompts(model)
    wanted = model.generate(**batch, **GREEDY)[:, -7:]
    model.generate(**batch, **GREEDY | {"max_new_tokens": 2}, decode_loop=loop)
    (step,) = loop._steps.values()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # or a CPU's values are read
    tokens = []
    with torch.no_grad(), NothingRead():
        for _ in range(5):
            step.run(True)
            tokens.append(step.token.clone())
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 2:])


@pytest.mark.kernel
def test_a_step_on_kernels_reads_nothing_left_behind(device, monkeypatch):
    for module in (decode, decode_memory):  # the interpreter takes its time
        monkeypatch.setattr(module, "capacity_for", lambda n, least=64: -(-n // least) * least)
    model = make_model(num_hidden_layers=2).to(device)
    batch = without_picture(model)
    batch = {n: t.to(device) if n != "tile_grid" else t for n, t in batch.items()}
    loop = DecodeLoop(model)
    model.generate(**batch, **GREEDY | {"max_new_tokens": 2}, decode_loop=loop)
    poison(loop)
    assert_same(model, loop, batch, max_new_tokens=2)
    assert loop.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_the_step(dtype, monkeypatch):
    model = make_model(dtype).cuda()

    def on_gpu(batch):
        return {n: t.cuda() if torch.is_tensor(t) else t for n, t in batch.items()}

    def unsynced(self, *args, speak=DecodeLoop._speak):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return speak(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    loop, batch = DecodeLoop(model), on_gpu(make_prompts(model))
    options = GREEDY | TOLD | {"max_new_tokens": 12}
    model.generate(**batch, **options, decode_loop=loop)
    assert loop.captures == 1
    monkeypatch.setattr(DecodeLoop, "_speak", unsynced)
    eager = DecodeLoop(model)
    for turn in range(3):
        batch["pixel_values"] = batch["pixel_values"].roll(1, 0) + turn
        found = model.generate(**batch, **options, decode_loop=loop)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "capture", lambda function, device: function)
            wanted = model.generate(**batch, **options, decode_loop=eager)
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
        assert_same_cache(found.past_key_values, wanted.past_key_values)
        if dtype == torch.float32:
            assert torch.equal(model.generate(**batch, **options).sequences, found.sequences)
    assert loop.captures == 1
    sampled = options | {"do_sample": True}
    assert model.generate(**batch, **sampled, decode_loop=loop).sequences.shape[1] == 53
