"""The memory that keeps no keys and values gives the same tokens as one that does."""

from dataclasses import replace

import pytest
import torch
from bench.counting import count_calls
from bench.recompute import RecomputedMemory
from transformers import AutoProcessor

import comemo_kernels as ops
from comemo.cli import demo

pytestmark = pytest.mark.usefixtures("one_thread")


def test_both_memories_give_the_same_tokens(demo_checkpoint, loaded):
    model, processor = loaded[0], AutoProcessor.from_pretrained(demo_checkpoint)
    inputs = processor(images=demo.draw_picture(900, 500), text="<image>\nwhat is it?", max_num=2)
    ids, core = inputs["input_ids"], model.model
    mask = core.find_image_tokens(ids)
    grid = inputs["tile_grid"]
    positions = core.prompt_position_ids(mask, torch.ones_like(ids), grid)
    with torch.no_grad():
        memory = core.build_image_memory(inputs["pixel_values"], mask, positions)
    rebuilt = RecomputedMemory.of(memory)
    mixins = [layer.mixin for layer in core.language_model.layers if layer.mixin is not None]
    options = {"tile_grid": grid, "max_new_tokens": 8, "min_new_tokens": 8}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with (
        count_calls([ops], "build_memory") as whole,
        count_calls(mixins, "build") as built,
    ):
        kept = model.generate(ids, image_memory=memory, **options)
        assert (whole, built) == ([1], [0])
        again = model.generate(ids, image_memory=rebuilt, **options)
        assert (whole, built) == ([1], [2 * 8])
    assert torch.equal(kept.sequences, again.sequences)
    for ours, theirs in zip(kept.logits, again.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert memory.nbytes == 2 * 2 * 3 * 256 * 4 * 64 * 4
    assert (rebuilt.nbytes, len(rebuilt)) == (0, len(memory))
    assert "build" not in vars(mixins[0])
    with pytest.raises(ValueError, match="media"):
        RecomputedMemory.of(replace(memory, media=None))
