"""Flash attention as self-attention: what transformers hands to flash-attn is what the model means.

`flash` has the functions of flash-attn, in plain PyTorch, under transformers' own code.
"""

import copy

import pytest
import torch
from conftest import TRACED
from flash import flash  # noqa: F401
from harness import assert_errs_no_more
from small import logits_of, make_model, make_prompts, one_more, place
from transformers import DataCollatorWithFlattening, StaticCache

from comemo import DecodeLoop

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "flash_attention_2"
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def models(request):
    """With sdpa in half precision, the same in float64, and one that is to use flash attention."""
    rounded = make_model(request.param)
    return rounded, copy.deepcopy(rounded).double(), copy.deepcopy(rounded)


@pytest.fixture
def model(models, flash):
    models[2].set_attn_implementation(NAME)
    return models[2]


@torch.no_grad()
def assert_errs_as_sdpa(models, call):
    """The error of `call(model)`, logits, is at most twice that with sdpa."""
    rounded, exact, flashing = models
    found = [call(m) for m in (flashing, rounded, exact)]
    assert_errs_no_more(*found)


def convert(model, inputs):
    return {n: x.to(model.dtype) if n == "pixel_values" else x for n, x in inputs.items()}


def of_text(flash, heads=4):
    """Calls of the self-attention; the vision tower has 2 heads."""
    return [call for call in flash.calls if call[1][-2] == heads]


def test_positions_of_images_are_not_taken_for_packed_rows(models, model, flash):
    prompts = make_prompts(model)
    per = model.config.tokens_per_tile
    row = {"input_ids": prompts["input_ids"][:1, per:], "tile_grid": [(1, 1)]}
    row["pixel_values"] = prompts["pixel_values"][:1]
    image = model.model.find_image_tokens(row["input_ids"])
    ids = model.model.prompt_position_ids(image, torch.ones_like(row["input_ids"]), [(1, 1)])
    for given in ({}, {"position_ids": ids}, {"attention_mask": torch.ones_like(ids)}):
        flash.calls.clear()
        assert_errs_as_sdpa(
            models, lambda m, given=given: m(**convert(m, row), **given, use_cache=False).logits
        )
        assert {call[0] for call in of_text(flash)} == {"dense"}
        assert all(call[3] for call in of_text(flash))  # causal
        assert not any(call[3] for call in of_text(flash, 2))
    assert of_text(flash, 2)


def test_tiles_that_share_ids_with_their_thumbnail_stay_one_sample(models, model, flash):
    """RoPE-DHR ids decrease at each tile, as they do at the beginning of a packed sample."""
    core, per = model.model, model.config.tokens_per_tile
    ids = place(torch.randint(10, 200, (1, 3 * per + 8)))
    ids[:, 3 : 3 + 3 * per] = model.config.image_token_id
    tiles = place(torch.randn(3, 3, 112, 112))
    given = {"input_ids": ids, "pixel_values": tiles, "tile_grid": [(2, 1)]}
    image = core.find_image_tokens(ids)
    positions = core.prompt_position_ids(image, torch.ones_like(ids), [(2, 1)])
    assert (positions.diff() < 0).any()
    for more in ({}, {"position_ids": positions}):
        flash.calls.clear()
        assert_errs_as_sdpa(
            models, lambda m, more=more: m(**convert(m, given), **more, use_cache=False).logits
        )
        assert {call[0] for call in of_text(flash)} == {"dense"}


@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens", "cu_seqlens"])
def test_packed_rows_arrive_with_their_bounds(models, model, flash, given):
    lengths = (7, 1, 12, 5)
    samples = [torch.randint(10, 200, (n,)) for n in lengths]
    collator = DataCollatorWithFlattening(
        return_position_ids=given == "position_ids",
        return_flash_attn_kwargs=given == "cu_seq_lens",
    )
    batch = collator([{"input_ids": ids.tolist()} for ids in samples])
    del batch["labels"]
    bounds = [0, 7, 8, 20, 25]
    if given == "cu_seqlens":
        batch["cu_seqlens"] = torch.tensor(bounds)
    batch = place(dict(batch))
    assert_errs_as_sdpa(models, lambda m: m(**batch).logits)
    for kind, _, _, causal, queries, keys in of_text(flash):
        assert (kind, causal, queries, keys) == ("varlen", True, bounds, bounds)


def test_two_packed_rows_with_images(models, model, flash):
    """The mixin layers keep our kernels, which read a span for each token."""
    prompts = make_prompts(model)
    ids, length = prompts["input_ids"], prompts["input_ids"].shape[1]
    ids[0] = ids[1]
    bounds = torch.tensor([0, 11, length, length + 4, 2 * length])
    ids[0, 4 : 4 + 2 * model.config.tokens_per_tile] = 7
    ids[0, 12 : 12 + model.config.tokens_per_tile] = model.config.image_token_id
    row = {"input_ids": ids, "cu_seqlens": bounds} | {
        name: prompts[name] for name in ("pixel_values", "tile_grid")
    }
    assert_errs_as_sdpa(models, lambda m: m(**convert(m, row)).logits)
    for call in of_text(flash):
        assert call[4] == call[5] == bounds.tolist()


@pytest.mark.parametrize("mixin", ["comemo_kernels", NAME])
def test_padding_and_a_decode_step(models, model, flash, mixin):
    model.set_attn_implementation({"mixin_config": mixin})
    prompts = make_prompts(model)
    per, length = model.config.tokens_per_tile, prompts["input_ids"].shape[1]
    assert_errs_as_sdpa(models, lambda m: logits_of(m, convert(m, prompts)))
    model.set_attn_implementation({"mixin_config": "comemo_kernels"})
    calls = of_text(flash)
    prefill, step = calls[:4], calls[4:]
    ends = [0, length - per, 2 * length - per]
    for call in prefill:
        assert call[4] == call[5] == ends
    for call in step:  # one token each, after those in the cache
        assert call[4] == [0, 1, 2]
        assert call[5] == [0, length - per + 1, 2 * length - per + 2]
    assert len(prefill) == len(step) == 4
    memory = of_text(flash, 3)
    assert len(memory) == (4 if mixin == NAME else 0)
    assert not any(call[3] for call in memory)


def test_a_cache_without_padding_is_read_up_to_the_new_tokens(models, model, flash):
    """Several tokens after a cache: causal from the last key on."""
    ids = place(torch.randint(10, 200, (2, 9)))

    def in_two(m):
        first = m(input_ids=ids[:, :5], use_cache=True)
        second = m(input_ids=ids[:, 5:], cache=first.cache, use_cache=True)
        return torch.cat([first.logits, second.logits], 1)

    assert_errs_as_sdpa(models, in_two)
    assert {(call[0], call[1][1], call[2][1]) for call in of_text(flash)} == {
        ("dense", 5, 5),
        ("dense", 4, 9),
    }


def test_a_static_cache_needs_a_mask(models, model, flash):
    prompts = make_prompts(model)

    def step(m):
        cache = StaticCache(config=m.config.text_config, max_cache_len=99)
        out = m(**convert(m, prompts), cache=cache, use_cache=True)
        return m(**one_more(prompts, out)).logits

    assert_errs_as_sdpa(models, step)
    length, per = prompts["input_ids"].shape[1], model.config.tokens_per_tile
    assert of_text(flash)[-1][5] == [0, length - per + 1, 2 * length - per + 2]
    cache = StaticCache(config=model.config.text_config, max_cache_len=99)
    with pytest.raises(ValueError, match="with a static cache must get an attention_mask"):
        model(input_ids=prompts["input_ids"], cache=cache, use_cache=True)


@pytest.mark.parametrize("how", ["plain", "beams", "beams static", "loop"])
def test_generated_tokens_are_as_likely_as_told(models, model, how):
    prompts = convert(model, make_prompts(model))
    options = {
        "plain": {},
        "beams": {"num_beams": 3},
        "beams static": {"num_beams": 3, "cache_implementation": "static"},
        "loop": {"decode_loop": DecodeLoop(model)},
    }[how]
    told = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**prompts, **options, **GREEDY, **told)
    beams = out.get("beam_indices")
    scores = model.compute_transition_scores(out.sequences, out.logits, beams, True)
    length = prompts["input_ids"].shape[1]
    tokens, wanted = out.sequences[:, length:, None], []
    assert tokens.shape == (2, 5, 1)
    for m in models[:2]:
        whole = convert(m, prompts) | {"input_ids": out.sequences}
        mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 5), value=1)
        with torch.no_grad():
            logits = m(**whole | {"attention_mask": mask}).logits[:, length - 1 : -1]
        wanted.append(logits.double().log_softmax(-1).gather(2, tokens)[..., 0])
    assert_errs_no_more(scores.to(model.dtype), *wanted)


def test_gradients_of_packed_rows(models, model, flash):
    ids = place(torch.randint(10, 200, (1, 16)))
    bounds = torch.tensor([0, 5, 16])
    grads = []
    for m in (models[2], models[0], models[1]):
        weight = m.model.language_model.layers[0].self_attn.k_proj.weight.requires_grad_()
        with torch.enable_grad():
            loss = m(input_ids=ids, cu_seqlens=bounds, labels=ids).loss
            grads.append(torch.autograd.grad(loss, weight)[0])
        weight.requires_grad_(False)
    assert_errs_no_more(*grads, name="gradient", slack=3)


def test_other_dtypes_are_refused(flash):
    model = make_model()
    model.set_attn_implementation({"text_config": NAME})
    ids = place(torch.randint(10, 200, (1, 6)))
    with pytest.raises(ValueError, match="'flash_attention_2' must get float16 or bfloat16, got t"):
        model(input_ids=ids)
    with torch.autocast(ids.device.type, torch.bfloat16):
        model(input_ids=ids)
    assert of_text(flash)[0][0] == "dense"


def test_a_package_that_is_missing_is_named():
    model = make_model(torch.bfloat16)
    for part in ("text_config", "mixin_config"):
        with pytest.raises(ImportError, match="FlashAttention2"):
            model.set_attn_implementation({"": NAME, part: NAME})


@TRACED
@pytest.mark.slow
def test_rows_of_unknown_packing_are_refused_under_torch_compile(flash):
    model = make_model(torch.bfloat16)
    model.set_attn_implementation({"text_config": NAME})
    ids = torch.randint(10, 200, (1, 6))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="needs the bounds of samples on the host"):
        compiled(input_ids=ids, position_ids=torch.arange(6)[None], use_cache=False)
