"""Keys and values built again for every token: how often, and that answers stay the same."""

from dataclasses import replace

import pytest
import torch
from harbour import draw_harbour
from transformers import AutoProcessor

import comemo_kernels as ops
from bench.counting import count_calls
from bench.recompute import RecomputedMemory, recomputing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def drawn(demo_checkpoint, loaded):
    """Model, prompt and the image memory of a drawn image, nothing built yet."""
    model, processor = loaded[0], AutoProcessor.from_pretrained(demo_checkpoint)
    prompt = processor(images=draw_harbour(900, 500), text="<image>\nwhat is it?", max_num=2)
    ids, core = prompt["input_ids"], model.model
    mask = core.find_image_tokens(ids)
    positions = core.prompt_position_ids(mask, torch.ones_like(ids), prompt["tile_grid"])
    with torch.no_grad():
        memory = core.build_image_memory(prompt["pixel_values"], mask, positions)
    return model, ids, prompt["tile_grid"], memory


def mixins_of(core):
    return [layer.mixin for layer in core.language_model.layers if layer.mixin is not None]


def test_both_memories_give_the_same_tokens(drawn):
    model, ids, grid, memory = drawn
    core, rebuilt = model.model, RecomputedMemory.of(memory)
    options = {"tile_grid": grid, "max_new_tokens": 8, "min_new_tokens": 8}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with (
        count_calls([ops], "build_memory") as whole,
        count_calls(mixins_of(core), "build") as built,
    ):
        kept = model.generate(ids, image_memory=memory, **options)
        assert (whole, built) == ([1], [0])
        with recomputing(core):
            again = model.generate(ids, image_memory=rebuilt, **options)
        assert (whole, built) == ([1], [2 * 8])
    assert torch.equal(kept.sequences, again.sequences)
    for ours, theirs in zip(kept.logits, again.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert memory.nbytes == 2 * 2 * 3 * 256 * 4 * 64 * 4
    assert (rebuilt.nbytes, len(rebuilt)) == (0, len(memory))
    assert "build" not in vars(mixins_of(core)[0])


def test_another_memory_is_built_once_as_usual(drawn):
    model, ids, grid, memory = drawn
    text = model.model.language_model
    with recomputing(model.model), count_calls([ops], "build_memory") as whole:
        model.generate(ids, image_memory=memory, tile_grid=grid, max_new_tokens=3)
        assert whole == [1]
    assert "build_memory" not in vars(text)
    with pytest.raises(KeyError), recomputing(model.model):
        raise KeyError
    assert "build_memory" not in vars(text)


def test_a_memory_without_media_is_refused(drawn):
    with pytest.raises(ValueError, match=r"^RecomputedMemory\.of: wanted a memory with its media"):
        RecomputedMemory.of(replace(drawn[3], media=None))
