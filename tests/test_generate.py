"""Generation: every recorded chat, and the image memory in every way of decoding."""

import inspect
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, SLOW, TRACED
from harness import CLEAR_MARGIN, LOGITS, assert_relative, recorded
from PIL import Image
from small import place
from torch._dynamo.testing import CompileCounter

import comemo
import comemo_kernels as ops
from comemo.mixin import MixinLayer
from comemo_kernels import ImageMemory

CHATS = [
    *("dhr_2x1", "rope_2x1", "dhr_1x1", "rope_1x1", "dhr_2x3", "rope_2x3", "dhr_two", "rope_two"),
    *("dhr_hist_1img", "rope_hist_1img", "dhr_hist_2img", "eos_1x1", "dhr_1x1_reppen"),
    *("e2e_wide_max12", "e2e_tall_max4"),
]
GREEDY = {"max_new_tokens": 24, "do_sample": False}
RAW = {"output_logits": True, "return_dict_in_generate": True}


def case_of(golden, inputs, name):
    """The recorded call: its record, and the arguments of `chat`."""
    record = json.loads((golden / "generate.json").read_text())[f"a/{name}"]
    if name.startswith("e2e"):
        file = golden / "train_data" / record["image"]
        pixel_values, grid = comemo.load_image(file, max_num=record["max_num"], published=True)
        assert [list(grid)] == record["ratios"]
    else:
        pixel_values = torch.cat([inputs.tiles(s, n) for s, n in record["tile_seeds"]])
    history = record.get("history")
    config = dict(GREEDY)
    if name.endswith("reppen"):
        config |= {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    return record, {
        "pixel_values": pixel_values,
        "question": record["question"],
        "generation_config": config,
        "history": None if history is None else [tuple(turn) for turn in history],
        "num_patches_list": record.get("num_patches_list"),
        "target_aspect_ratio": record["ratios"] and [tuple(g) for g in record["ratios"]],
    }


def prepared(model, tokenizer, case):
    """What `chat` hands to `generate`."""
    turns = [*(case["history"] or []), (case["question"], None)]
    rest = (case["num_patches_list"], case["target_aspect_ratio"])
    return model.prepare_chat(tokenizer, case["pixel_values"], turns, *rest)[1]


@pytest.mark.parametrize("name", CHATS)
def test_recorded_chat(golden, inputs, model, tokenizer, name, count_builds):
    record, case = case_of(golden, inputs, name)
    wanted = place(recorded(golden, "generate.safetensors", f"a/{name}/"))
    builds = count_builds()
    ready = prepared(model, tokenizer, case)
    assert torch.equal(ready["position_ids"][0], wanted["position_ids"].long())
    memory = ready["image_memory"]
    assert torch.equal(memory.position_ids, wanted["media_position_ids"].long())
    out = model.generate(
        **ready, **case["generation_config"], **RAW, eos_token_id=record["eos_token_id"]
    )
    logits = torch.cat(out.logits)
    assert logits.shape == wanted["step_logits"].shape
    assert (logits - wanted["step_logits"]).abs().max() < LOGITS
    assert out.sequences[0].tolist() == record["tokens"]
    # The published code built the memory in every layer for every token.
    assert builds() == record["n_mixin"] < record["expected_to_kv"] == record["to_kv_calls"]


@pytest.mark.parametrize("name", CHATS)
def test_recorded_answer(golden, inputs, model, tokenizer, name):
    record, case = case_of(golden, inputs, name)
    history = None if case["history"] is None else list(case["history"])
    answer, new = model.chat(tokenizer, **case, return_history=True)
    assert answer == record["response"]
    assert [list(turn) for turn in new] == record["history_returned"]
    assert case["history"] == history, "the caller's history was changed"


def test_every_recorded_margin_allows_equal_tokens(golden):
    records = json.loads((golden / "generate.json").read_text())
    for name in CHATS:
        margin = records[f"a/{name}"]["min_top2_margin"]
        assert margin > CLEAR_MARGIN or name in ("rope_2x3",), name


def test_recorded_text_only_chat(golden, model, tokenizer, count_builds):
    record = json.loads((golden / "generate.json").read_text())["a/text_only"]
    wanted = place(recorded(golden, "generate.safetensors", "a/text_only/"))
    builds = count_builds()
    question = "hello world, describe a cat"
    prompt, ready = model.prepare_chat(tokenizer, None, [(question, None)])
    assert prompt == record["prompt"]
    out = model.generate(**ready, **GREEDY, **RAW, eos_token_id=589)
    assert out.sequences[0].tolist()[1:] == record["tokens"][-24:]
    if "step_logits" in wanted:
        assert (torch.cat(out.logits) - wanted["step_logits"]).abs().max() < LOGITS
    assert builds() == 0
    assert model.chat(tokenizer, None, question, GREEDY) == record["text"].strip()


@pytest.mark.parametrize("name", ["dhr_2x1", "dhr_two", "rope_2x1"])
def test_recorded_layers(golden, inputs, model, tokenizer, name):
    _, case = case_of(golden, inputs, name)
    wanted = place(recorded(golden, "generate.safetensors", f"a/{name}/"))
    if "prefill_rows" not in wanted:
        pytest.skip("recorded for three chats only")
    rows, ready = wanted["prefill_rows"].long(), prepared(model, tokenizer, case)
    assert_relative(ready["inputs_embeds"][0, rows], wanted["prefill_inputs_embeds"], "embeddings")
    gated, layers, handles = [], [], []
    for layer in model.model.language_model.layers:
        handles.append(layer.register_forward_hook(lambda *a: layers.append(a[-1][0, rows])))
        if layer.mixin is not None:
            handles.append(
                layer.mixin.register_forward_hook(lambda *a: gated.append(a[-1][0, rows]))
            )
    ready.pop("input_ids")
    with torch.no_grad():
        model(**ready)
    for handle in handles:
        handle.remove()
    assert_relative(torch.stack(layers), wanted["prefill_layer_out"], "layers")
    assert_relative(torch.stack(gated), wanted["prefill_gated_out"], "mixin layers")


@pytest.mark.parametrize("name", ["dhr_2x1", "rope_2x1", "dhr_1x1"])
def test_bfloat16_is_no_further_off_than_published(golden, inputs, checkpoint, tokenizer, name):
    record = json.loads((golden / "generate.json").read_text())[f"a/bf16_{name}"]
    exact = place(recorded(golden, "generate.safetensors", f"a/{name}/"))["step_logits"][0]
    model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ready = prepared(model.eval().to(DEVICE), tokenizer, case_of(golden, inputs, name)[1])
    ready.pop("input_ids")
    with torch.no_grad():
        logits = model(**ready, logits_to_keep=1).logits[0, 0].float()
    error = (logits - exact).norm() / exact.norm()
    assert error <= 2 * record["prefill_logit_rel_vs_f32"]


@pytest.fixture
def count_builds(monkeypatch):
    """Call for a function that tells how often a layer's keys and values were built since then."""
    count = [0]
    build_memory, build = ops.build_memory, MixinLayer.build

    def all_layers(media, kv_weights, *args, **kwargs):
        count[0] += len(kv_weights)
        return build_memory(media, kv_weights, *args, **kwargs)

    def one_layer(*args):
        count[0] += 1
        return build(*args)

    monkeypatch.setattr(ops, "build_memory", all_layers)
    monkeypatch.setattr(MixinLayer, "build", one_layer)

    def since():
        before = count[0]
        return lambda: count[0] - before

    return since


# --- batches, beams, caches, drafts ---


def message(text, image=None):
    content = [{"type": "text", "text": text}]
    return [
        {"role": "user", "content": [{"type": "image", "image": image}] * bool(image) + content}
    ]


@pytest.fixture
def prompts_of(processor, inputs):
    """Model inputs of one or several conversations, of which the last has no picture."""
    pictures = [
        Image.fromarray(inputs.picture(7, 900, 448)),
        Image.fromarray(inputs.picture(8, 448, 448)),
        None,
    ]
    texts = ["what is this?", "hello world, describe the image in some more words", "hi"]

    def build(*which):
        return place(
            dict(
                processor.apply_chat_template(
                    [message(texts[i], pictures[i]) for i in which],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                )
            )
        )

    return build


def answers(model, batch, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()


ROWS = {  # options, and where the other positions are left to --all
    "plain": ({}, None),
    "static": ({"cache_implementation": "static"}, "raw"),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, "compressed"),
    "static beams": ({"num_beams": 2, "cache_implementation": "static"}, "raw"),
    "no cache": ({"use_cache": False, "max_new_tokens": 4}, "compressed"),
}


@pytest.mark.parametrize(
    ("options", "positions"),
    [
        pytest.param(options, at, id=f"{name}-{at}", marks=SLOW if only not in (None, at) else ())
        for name, (options, only) in ROWS.items()
        for at in ("raw", "compressed")
    ],
)
def test_a_row_of_a_batch_is_the_row_alone(model, prompts_of, options, positions):
    model.config.decode_positions = positions
    together = answers(model, prompts_of(0, 1, 2), **options)
    alone = [answers(model, prompts_of(i), **options) for i in range(3)]
    assert together == [tokens for rows in alone for tokens in rows]


@pytest.mark.slow
def test_caches_agree(model, prompts_of):
    greedy = answers(model, prompts_of(0, 1, 2))
    assert answers(model, prompts_of(0, 1, 2), cache_implementation="static") == greedy
    whole = answers(model, prompts_of(0, 1, 2), use_cache=False, max_new_tokens=4)
    assert whole == [tokens[:4] for tokens in greedy]


def test_a_generated_image_token_is_a_word(model, prompts_of):
    """Without a cache the whole sequence is embedded again: no picture belongs to that token."""
    batch = dict(prompts_of(0))
    image_id = model.config.image_token_id

    def force(_, scores):
        return torch.full_like(scores, -1e9).index_fill(
            1, torch.tensor([image_id], device=scores.device), 0.0
        )

    for use_cache in (True, False):
        out = answers(model, batch, logits_processor=[force], use_cache=use_cache)
        assert out == [[image_id] * 10]


def test_decode_positions_matter(model, prompts_of):
    batch, found = prompts_of(0), []
    for rule in ("raw", "compressed"):
        model.config.decode_positions = rule
        out = model.generate(**batch, max_new_tokens=3, do_sample=False, **RAW)
        found.append(torch.cat(out.logits))
    assert torch.equal(found[0][0], found[1][0])  # the first token comes from the prompt
    assert (found[0][1] - found[1][1]).abs().max() > 10 * LOGITS


@pytest.mark.parametrize("positions", ["raw", pytest.param("compressed", marks=SLOW)])
def test_drafts_change_no_token(model, checkpoint, prompts_of, positions):
    model.config.decode_positions = positions
    # Some transformers cannot draft without an end token.
    end = {"eos_token_id": 0}
    greedy = answers(model, prompts_of(0), **end)
    assert answers(model, prompts_of(0), prompt_lookup_num_tokens=3, **end) == greedy
    assistant = type(model)(model.config).eval().to(model.device)
    assistant.load_state_dict(model.state_dict())
    assert answers(model, prompts_of(0), assistant_model=assistant, **end) == greedy
    with torch.no_grad():  # an assistant that drafts something else
        for parameter in assistant.lm_head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert answers(model, prompts_of(0), assistant_model=assistant, **end) == greedy


def test_sampling_returns_several_sequences(model, prompts_of):
    out = answers(model, prompts_of(0, 2), do_sample=True, num_return_sequences=3)
    assert len(out) == 6


def test_memory_is_reused_by_a_later_call(model, prompts_of, count_builds):
    batch = dict(prompts_of(0))
    greedy = answers(model, batch)
    with torch.no_grad():
        first = model(**batch, use_cache=True)
    memory = first.image_memory
    assert isinstance(memory, ImageMemory)
    layers = model.config.mixin_layers
    assert set(memory.keys) == set(memory.values) == set(layers)
    config = model.config.mixin_config
    expected = 2 * len(layers) * len(memory) * config.num_heads * config.head_dim * 4
    assert memory.nbytes == expected
    builds = count_builds()
    del batch["pixel_values"]
    assert answers(model, batch, image_memory=memory) == greedy
    assert builds() == 0


def test_positions_may_be_given(model, prompts_of):
    batch = dict(prompts_of(0))
    greedy = answers(model, batch)
    image = model.model.find_image_tokens(batch["input_ids"])
    ids = model.model.prompt_position_ids(image, batch["attention_mask"], batch["tile_grid"])
    assert answers(model, batch | {"position_ids": ids}) == greedy
    plain = torch.arange(ids.shape[1], device=ids.device)[None]
    first = (batch | {"position_ids": plain}, batch | {"tile_grid": None})
    assert answers(model, first[0]) == answers(model, first[1])


def test_arguments_that_exclude_each_other(model, prompts_of):
    batch = dict(prompts_of(0))
    with torch.no_grad():
        memory = model(**batch, use_cache=True).image_memory
    with pytest.raises(ValueError, match="either pixel_values or image_memory, got both"):
        model.generate(**batch, image_memory=memory)
    with pytest.raises(ValueError, match="exclude an image_memory"):
        model(**batch, image_memory=memory)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match=r"need input_ids \(1, 865\), which say where"):
        model.generate(inputs_embeds=embeds, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="pixel_values need input_ids"):
        model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])


def test_memory_serves_other_places(model, prompts_of, count_builds):
    """The same picture behind more words, and in two prompts at once."""
    batch = dict(prompts_of(0))
    with torch.no_grad():
        memory = model(**batch, use_cache=True).image_memory
    longer = {
        name: torch.cat([batch[name][:, :1].repeat(1, 9), batch[name]], 1)
        for name in ("input_ids", "attention_mask")
    } | {name: batch[name] for name in ("pixel_values", "tile_grid")}
    wanted = answers(model, longer)
    builds = count_builds()
    del longer["pixel_values"]
    assert answers(model, longer, image_memory=memory) == wanted
    pads = {"input_ids": 2, "attention_mask": 0}
    short = {name: F.pad(batch[name], (9, 0), value=pad) for name, pad in pads.items()}
    both = {name: torch.cat([longer[name], short[name]]) for name in pads}
    shared = memory.reading(memory.spans.repeat(2, 1, 1))
    del batch["pixel_values"]
    alone = answers(model, batch, image_memory=memory)
    grids = torch.cat([torch.as_tensor(longer["tile_grid"])] * 2)
    assert answers(model, both | {"tile_grid": grids}, image_memory=shared) == [*wanted, *alone]
    assert builds() == 0


def test_memory_of_other_images_is_refused(model, prompts_of):
    batch, other = dict(prompts_of(0)), dict(prompts_of(1))
    with torch.no_grad():
        memory = model(**other, use_cache=True).image_memory
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="which do not match the prompts'"):
        model.generate(**batch, image_memory=memory)
    del other["pixel_values"]
    twice = {name: tensor.repeat(2, 1) for name, tensor in other.items()}
    with pytest.raises(ValueError, match=r"holds \[256\] image tokens, .* prompts' \[256, 256\]"):
        model.generate(**twice, image_memory=memory)


def test_nothing_is_left_after_an_exception(model, prompts_of):
    greedy = answers(model, prompts_of(0))

    class Stop(Exception):
        pass

    for layer in model.model.language_model.layers:
        calls = [0]

        def later(*_, calls=calls):
            calls[0] += 1
            if calls[0] == 3:  # in the middle of decoding
                raise Stop

        handle = layer.register_forward_hook(later)
        with pytest.raises(Stop):
            answers(model, prompts_of(1))
        handle.remove()
        assert answers(model, prompts_of(0)) == greedy
    state = {name: set(vars(module)) for name, module in model.named_modules()}
    answers(model, prompts_of(0))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == state


def test_two_threads_get_what_they_get_alone(golden, inputs, model, tokenizer):
    names = ["dhr_2x1", "dhr_1x1", "rope_2x1", "dhr_two"]
    cases = [case_of(golden, inputs, name) for name in names]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            futures = [pool.submit(model.chat, tokenizer, **case) for _, case in cases]
            for future, (record, _) in zip(futures, cases, strict=True):
                assert future.result() == record["response"]


@TRACED
@pytest.mark.slow  # on kernels and folded, too
def test_decode_step_compiles_whole(model, processor, inputs):
    """Few graphs, none broken, and in the end no new one for new pictures."""
    model.config.decode_positions = "raw"
    counter, eager = CompileCounter(), model.forward
    compiled = torch.compile(eager, fullgraph=True, backend=counter)

    def forward(*args, **kwargs):
        step = compiled if kwargs["input_ids"].shape[1] == 1 else eager
        return step(*args, **kwargs)

    forward.__signature__ = inspect.signature(eager)
    frames = []
    for width, height in ((900, 448), (448, 448), (448, 1400), (1400, 900), (448, 900)):
        picture = Image.fromarray(inputs.picture(1, width, height))
        batch = processor.apply_chat_template(
            message("what?", picture), add_generation_prompt=True, tokenize=True, return_dict=True
        ).to(model.device)
        options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static"} | RAW
        plain = torch.cat(model.generate(**batch, **options).logits)
        model.forward = forward
        try:
            found = torch.cat(model.generate(**batch, **options).logits)
        finally:
            del model.forward
        assert (found - plain).abs().max() < LOGITS
        frames.append(counter.frame_count)
    assert frames[0] >= 1
    assert frames[-2] == frames[-1] <= 4


def test_attention_of_the_parts_can_be_chosen(checkpoint, model, prompts_of):
    batch = prompts_of(0)
    eager = (
        type(model)
        .from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
        .eval()
        .to(model.device)
    )
    with torch.no_grad():
        out = eager(**batch, output_hidden_states=True, output_attentions=True)
        wanted = model(**batch).logits
    layers = model.config.text_config.num_hidden_layers
    assert len(out.hidden_states) == layers + 1
    assert len(out.attentions) == layers
    assert (out.logits - wanted).abs().max() < LOGITS
    eager.set_attn_implementation("sdpa")
    assert eager.config.text_config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert (eager(**batch).logits - wanted).abs().max() < LOGITS


# --- ranges and scaling ---


def test_a_prompt_beyond_the_position_range_is_refused(model, prompts_of):
    batch = prompts_of(0)
    model.config.mixin_config.max_position_embeddings, limit = 300, 32768
    try:
        with pytest.raises(ValueError, match=r"position ids up to \d+, the model has 300"):
            model.generate(**batch)
        model.config.mixin_config.max_position_embeddings = 500
        with pytest.raises(ValueError, match="decode_positions = 'compressed'"):
            model.generate(**batch)
        model.config.decode_positions = "compressed"
        assert answers(model, batch)
    finally:
        model.config.mixin_config.max_position_embeddings = limit


@pytest.mark.parametrize("rule", ["token_count", "position"])
def test_dynamic_scaling_is_not_sticky(model, prompts_of, rule):
    text = model.config.text_config
    model.config.ntk_length = rule
    batch = place({"input_ids": torch.arange(100, 160)[None]})
    short = answers(model, batch)
    text.max_position_embeddings, limit = 40, 32768
    try:
        scaled = answers(model, place({"input_ids": torch.arange(100, 160)[None]}))
    finally:
        text.max_position_embeddings = limit
    assert scaled != short
    assert answers(model, batch) == short


def test_scaling_by_position_ignores_the_tiles(model, prompts_of):
    """RoPE-DHR ids stay small: by position nothing is scaled where the token count would."""
    text, batch = model.config.text_config, prompts_of(0)
    text.max_position_embeddings, limit = 600, 32768
    try:
        found = {}
        for rule in ("position", "token_count"):
            model.config.ntk_length = rule
            found[rule] = model.generate(**batch, max_new_tokens=1, do_sample=False, **RAW).logits[
                0
            ]
    finally:
        text.max_position_embeddings = limit
    plain = model.generate(**batch, max_new_tokens=1, do_sample=False, **RAW).logits[0]
    assert torch.equal(found["position"], plain)
    assert (found["token_count"] - plain).abs().max() > 10 * LOGITS


def test_image_marks_need_their_tiles(model, prompts_of):
    batch = dict(prompts_of(0))
    tiles = batch.pop("pixel_values")
    with pytest.raises(ValueError, match=r"2 tiles of 256 tokens for prompts that hold \[768\]"):
        model.generate(**batch, pixel_values=tiles[:2])
    with pytest.raises(ValueError, match="1 grids of 256 image tokens"):
        model.generate(**batch | {"tile_grid": [(1, 1)]}, pixel_values=tiles)
    with pytest.raises(ValueError, match=r"hold \[768\] image tokens, got neither"):
        model.generate(**{k: v for k, v in batch.items() if k != "tile_grid"})
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="image_token_id is not set"):
        model.generate(**batch, pixel_values=tiles)
