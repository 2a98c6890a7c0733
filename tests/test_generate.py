"""`generate` with images: batches, beams, caches, speculative decoding, reuse of a memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from chats import (  # noqa: F401
    RAW,
    answers,
    count_builds,
    prompts_of,
)
from conftest import SLOW
from harness import LOGITS

from comemo import Prefilled
from comemo_kernels import ImageMemory

ROWS = {  # options, and positions of the gate: None for both; the others run with --all
    "plain": ({}, None),
    "static": ({"cache_implementation": "static"}, "raw"),
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, "neither"),
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


SEVERAL = {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 1}


@pytest.mark.parametrize("options", [{}, *SEVERAL], ids=["greedy", "beams", "sequences"])
@pytest.mark.parametrize("positions", ["raw", pytest.param("compressed", marks=SLOW)])
def test_a_prefilled_prompt_is_continued(model, prompts_of, options, positions):
    model.config.decode_positions = positions
    batch = prompts_of(0, 1)
    prompt, N = read(model, batch), batch["input_ids"].shape[1]
    new = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    out = model.generate(prefilled=prompt, **new)
    assert out[:, 0].tolist() == [model.config.text_config.bos_token_id] * len(out)
    assert out[:, 1:].tolist() == answers(model, batch, **options)
    assert prompt.cache.get_seq_length() == (N if options else N + 9)


def test_a_prefilled_prompt_is_the_only_input(model, prompts_of):
    batch = prompts_of(0)
    prompt = read(model, batch)
    for beside in (
        {"input_ids": batch["input_ids"]},
        {"pixel_values": batch["pixel_values"], "tile_grid": batch["tile_grid"]},
        {"image_memory": prompt.image_memory},
        {"past_key_values": prompt.cache},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
    ):
        wanted = rf"prefilled must be the only input, got {next(iter(beside))}"
        with pytest.raises(ValueError, match=wanted):
            model.generate(prefilled=prompt, **beside)
    with pytest.raises(ValueError, match="prefilled must be a Prefilled, got dict"):
        model.generate(prefilled={})
    padded = replace(prompt, attention_mask=batch["attention_mask"].flip(1) * 0)
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(prefilled=padded)
    shorter = replace(prompt, position_ids=prompt.position_ids[:, 1:])
    with pytest.raises(ValueError, match=r"must hold the \d+ tokens of position_ids, got \d+$"):
        model.generate(prefilled=shorter)


def read(model, batch):
    """A prefill by hand."""
    core, mask = model.model, batch["attention_mask"]
    ids = core.prompt_position_ids(
        core.find_image_tokens(batch["input_ids"]), mask, batch["tile_grid"]
    )
    with torch.no_grad():
        out = model(**batch, use_cache=True, logits_to_keep=1)
    return Prefilled(out.logits, out.cache, ids, out.image_memory, mask)


def test_a_generated_image_token_is_a_word(model, prompts_of):
    """Without a cache the whole sequence is embedded again: the token belongs to no image."""
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
def test_speculative_decoding_changes_no_token(model, checkpoint, prompts_of, positions):
    model.config.decode_positions = positions
    # Some releases of transformers cannot draft without a stop token.
    end = {"eos_token_id": 0}
    greedy = answers(model, prompts_of(0), **end)
    assert answers(model, prompts_of(0), prompt_lookup_num_tokens=3, **end) == greedy
    assistant = type(model)(model.config).eval().to(model.device)
    assistant.load_state_dict(model.state_dict())
    assert answers(model, prompts_of(0), assistant_model=assistant, **end) == greedy
    with torch.no_grad():  # an assistant that drafts other tokens
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


def test_memory_is_valid_at_other_positions(model, prompts_of, count_builds):
    """The same image after more words, and in two prompts at once."""
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
