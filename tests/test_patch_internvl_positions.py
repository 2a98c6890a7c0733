"""RoPE-DHR position ids as an option of a patched InternVL: `image_grids`."""

import copy
import inspect

import pytest
import torch
from internvl_models import IMAGE, make_internvl, make_prompts

import comemo_kernels
from comemo_kernels import reference

pytestmark = pytest.mark.usefixtures("one_thread")
GRIDS = [(2, 1), (1, 1), (1, 2)]  # of both prompts of make_prompts
CACHES = ("past_key_values", "cache")  # the argument's name, by release


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = make_internvl()
    comemo_kernels.patch(model)
    yield model
    comemo_kernels.unpatch(model)


@pytest.fixture(params=["left", "right"])
def prompts(request):
    return make_prompts(padding=request.param)


OPTIONS = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}


def ids_of(prompts, grids=GRIDS, side=2):
    images, mask = prompts["input_ids"] == IMAGE, prompts["attention_mask"]
    return reference.rope_dhr_positions(images, mask, grids, side)


@torch.no_grad()
def logits_of(model, prompts, **options):
    return model(**prompts, **options).logits


def cache_name(model):
    return next(name for name in CACHES if name in inspect.signature(model.forward).parameters)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def decode(model, prompts, grids, steps=6):
    """Greedy tokens, without a cache: the whole prompt again for each."""
    ids, mask = prompts["input_ids"], prompts["attention_mask"]
    for _ in range(steps):
        grown = {"input_ids": ids, "attention_mask": mask, "pixel_values": prompts["pixel_values"]}
        best = model(**grown, position_ids=ids_of(grown, grids)).logits[:, -1, :IMAGE].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


def test_forward_computes_the_ids(model, prompts):
    wanted = logits_of(model, prompts, position_ids=ids_of(prompts))
    kept = prompts["attention_mask"].bool()
    for core in (model, model.model):
        out = core(**prompts, image_grids=GRIDS)
        found = out.logits if core is model else model.lm_head(out.last_hidden_state)
        close(found[kept], wanted[kept])
    assert (logits_of(model, prompts) - wanted)[kept].abs().max() > 0.1
    found = logits_of(model, prompts, image_grids=torch.tensor(GRIDS))
    close(found[kept], wanted[kept])


def test_without_a_mask_it_is_one_prompt(model):
    """Ids that repeat are not those of packed prompts, with and without a cache."""
    prompts = make_prompts(((3 * ((2, 1),)),))
    wanted = logits_of(model, prompts, position_ids=ids_of(prompts, 3 * [(2, 1)]))
    del prompts["attention_mask"]
    for cached in (True, False):
        found = logits_of(model, prompts, image_grids=3 * [(2, 1)], use_cache=cached)
        close(found, wanted)


def test_without_grids_nothing_changes(model, prompts):
    plain = copy.deepcopy(model)
    comemo_kernels.unpatch(plain)
    options = OPTIONS | {"max_new_tokens": 4}
    close(logits_of(model, prompts), logits_of(plain, prompts))
    assert torch.equal(model.generate(**prompts, **options), plain.generate(**prompts, **options))
    with pytest.raises(ValueError, match="image_gird"):
        model.generate(**prompts, image_gird=GRIDS, **options)


@pytest.mark.parametrize("mode", ["greedy", "beams", "static", "positional"])
def test_generated_ids_go_on_from_the_images(model, mode):
    prompts = make_prompts(padding="left")
    options = OPTIONS | {"max_new_tokens": 6}
    wanted = decode(model, prompts, GRIDS)
    inputs = prompts | options | {"image_grids": GRIDS}
    if mode == "beams":  # the first of as many beams as there are continuations: the same ids
        ids = ids_of(prompts)
        wanted = model.generate(**prompts, **options, position_ids=ids, num_beams=3)
        inputs["num_beams"] = 3
    if mode == "static":
        inputs |= {"cache_implementation": "static", "disable_compile": True}
    found = (
        model.generate(inputs.pop("input_ids"), **inputs)
        if mode == "positional"
        else model.generate(**inputs)
    )
    assert torch.equal(found, wanted)
    assert not torch.equal(model.generate(**prompts, **options), wanted)


def test_a_second_turn_on_the_cache(model):
    """The whole conversation's ids and grids, and the new images."""
    first = make_prompts((((2, 1), (1, 1)),))
    options = OPTIONS | {"max_new_tokens": 4, "return_dict_in_generate": True}
    out = model.generate(**first, **options, image_grids=GRIDS[:2])
    second = make_prompts((((1, 2),),))
    ids = torch.cat([out.sequences, second["input_ids"]], dim=1)
    both = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    wanted = decode(model, both, GRIDS, 4)
    cache = {cache_name(model): out[next(name for name in CACHES if name in out)]}
    given = both | {"pixel_values": second["pixel_values"]} | cache
    found = model.generate(**given, **options, image_grids=GRIDS).sequences
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="whole conversation"):
        model.generate(
            second["input_ids"], image_grids=GRIDS[2:], pixel_values=second["pixel_values"], **cache
        )
    with pytest.raises(ValueError, match="cache must be empty"):
        model(**second, image_grids=GRIDS[2:], **cache)


def test_videos_are_frames_of_one_tile(model):
    prompts = make_prompts((((1, 1), (1, 1), (1, 1)),))
    found = logits_of(model, prompts, image_grids=3 * [(1, 1)])
    close(found, logits_of(model, prompts))


def test_gradients(model, prompts):
    def learn(**options):
        model.zero_grad()
        labels = prompts["input_ids"].masked_fill(prompts["attention_mask"] == 0, -100)
        model(**prompts, labels=labels, **options).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted = learn(position_ids=ids_of(prompts))
    for mine, theirs in zip(learn(image_grids=GRIDS), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", [1, 3])
def test_other_sizes_of_tiles(side):
    model, prompts = make_internvl(side), make_prompts(side=side)
    with comemo_kernels.patched(model):
        found = logits_of(model, prompts, image_grids=GRIDS)
        close(found, logits_of(model, prompts, position_ids=ids_of(prompts, side=side)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_grids": GRIDS[:2]}, "2 grids of 16 image tokens for prompts that hold 28"),
        ({"image_grids": [(1, 1), (2, 1), (1, 2)]}, "one run of image tokens"),
        ({"image_grids": [(2, 1), (1, 1), (1, -2)]}, "-2"),
        ({"image_grids": 3}, "image_grids|grids"),
        ({"position_ids": torch.zeros(2, 22).long()}, "exclude each other"),
        ({"attention_mask": torch.ones(2, 3).long()}, r"attention_mask must be \(2, "),
        ({"input_ids": None}, r"input_ids must be \[B, N\], got None"),
    ],
)
@pytest.mark.parametrize("verb", ["forward", "generate"])
def test_errors(model, verb, options, message):
    given = make_prompts(padding="left") | {"image_grids": GRIDS} | options
    if given["input_ids"] is None:
        del given["pixel_values"]
        given["inputs_embeds"] = torch.zeros(2, 4, 32)
    with pytest.raises(ValueError, match=message) as error:
        getattr(model, verb)(**given)
    assert str(error.value).startswith((f"{verb}: ", "rope_dhr_positions: "))


def test_errors_of_generate(model):
    given = make_prompts(padding="left") | {"image_grids": GRIDS, "max_new_tokens": 1}
    with pytest.raises(ValueError, match="use_cache must be True"):
        model.generate(**given, use_cache=False)
    del given["attention_mask"]
    with pytest.raises(ValueError, match="attention_mask must be given for padded prompts"):
        model.generate(**given)


def test_flash_attention_is_refused(model):
    given = make_prompts() | {"image_grids": GRIDS}
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = "flash_attention_2"
    try:
        for call in (model, model.generate, model.model):
            with pytest.raises(ValueError, match="flash attention takes their ids"):
                call(**given)
    finally:
        config._attn_implementation = before


def test_tiles_that_are_no_squares_are_refused():
    model, prompts = make_internvl(), make_prompts()
    model.config.vision_config.image_size = (16, 32)
    with comemo_kernels.patched(model), pytest.raises(ValueError, match="squares"):
        model(**prompts, image_grids=GRIDS)


@pytest.mark.kernel
def test_on_kernels(device):
    model, prompts = make_internvl(), make_prompts(padding="left")
    wanted = logits_of(model, prompts, position_ids=ids_of(prompts))
    prompts = {name: value.to(device) for name, value in prompts.items()}
    with comemo_kernels.patched(model.to(device)):
        found = logits_of(model, prompts, image_grids=GRIDS).cpu()
    kept = prompts["attention_mask"].bool().cpu()
    close(found[kept], wanted[kept])
