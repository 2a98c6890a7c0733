"""ImageMemory and spans, alone and in the model."""

import pytest
import torch
from conftest import DEVICE
from harness import LOGITS
from small import place

from comemo_kernels import (
    ImageMemory,
    distance_table,
    rotary_table,
    spans_from_cu_seqlens,
    spans_from_images,
)


def example(lengths=(4, 0, 6)):
    M = sum(lengths)
    return ImageMemory.from_media(torch.randn(M, 8), torch.arange(M), lengths)


def test_spans_of_prompts_follow_one_another():
    memory = example()
    assert memory.spans.tolist() == [[[0, 4]], [[4, 4]], [[4, 10]]]
    assert memory.active.flatten().tolist() == [True, False, True]
    assert example((3, 2)).active is None
    assert len(memory) == 10


def test_beams_share_keys_and_values():
    memory = example()
    memory.update(3, torch.randn(10, 2, 4), torch.randn(10, 2, 4))
    beams = memory.repeat_interleave(2)
    assert beams.keys[3] is memory.keys[3]
    assert beams.spans[:, 0].tolist() == [[0, 4], [0, 4], [4, 4], [4, 4], [4, 10], [4, 10]]
    assert beams.active.flatten().tolist() == [True, True, False, False, True, True]
    assert beams.nbytes == memory.nbytes == 2 * 10 * 2 * 4 * 4
    memory.update(7, memory.keys[3], memory.values[3])
    assert beams.keys is memory.keys, "layers built later are seen by both"


def test_wrong_lengths_raise():
    with pytest.raises(ValueError, match="must agree on the number of image tokens"):
        ImageMemory.from_media(torch.randn(5, 8), torch.arange(5), [2, 2])
    with pytest.raises(ValueError, match="must agree on the number of image tokens"):
        ImageMemory.from_media(torch.randn(5, 8), torch.arange(4), [5])


def test_spans_of_packed_samples():
    spans = spans_from_cu_seqlens(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 7, 7]), 7)
    assert spans[0].tolist() == [[0, 4]] * 2 + [[7, 7]] * 3 + [[7, 7]] * 2
    with pytest.raises(ValueError, match=r"must be \[samples \+ 1\]"):
        spans_from_cu_seqlens(torch.tensor([0, 2]), torch.tensor([0, 1, 2]), 2)


def test_a_memory_without_media_raises(model):
    memory = ImageMemory(torch.tensor([[[0, 4]]]))
    with pytest.raises(ValueError, match="neither keys of mixin layer 1 nor the media"):
        model(input_ids=torch.tensor([[5]], device=DEVICE), image_memory=memory)


def test_a_prompt_without_its_image_tokens_raises(model):
    memory = ImageMemory.from_media(torch.randn(4, 128), torch.arange(4), [4])
    image_id = model.config.image_token_id
    ids = torch.tensor([[5, image_id, image_id, 7]], device=DEVICE)
    with pytest.raises(ValueError, match=r"prompts with \[2\] image tokens must hold the whole"):
        model(input_ids=ids, image_memory=memory)


def test_keys_and_values_own_no_larger_storage(model):
    """A view into the projection's output would keep twice the bytes that `nbytes` reports."""
    layer = model.model.language_model.layers[1].mixin
    mixin = model.config.mixin_config
    ids = torch.arange(6, device=DEVICE)
    cos, sin = rotary_table(ids[None], mixin.head_dim, mixin.rope_theta)
    angles = cos[0], sin[0], ids.int()
    layer.kv_proj.register_forward_hook(lambda *_: None)  # then the module is called
    with torch.no_grad():
        for _ in ("called", "fused"):
            for tensor in layer.build(torch.randn(6, 128).to(DEVICE), angles):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
            layer.kv_proj._forward_hooks.clear()


def test_spans_of_images_that_later_tokens_see():
    """Two images of 4 and 6 tokens that end at tokens 2 and 5."""
    last = torch.tensor([2, 5])
    so_far = [[0, 0]] * 2 + [[0, 4]] * 3 + [[0, 10]] * 2
    assert spans_from_images(last, [4, 6], 7).tolist() == [so_far]
    latest = [[0, 0]] * 2 + [[0, 4]] * 3 + [[4, 10]] * 2
    assert spans_from_images(last, [4, 6], 7, latest=True).tolist() == [latest]
    with pytest.raises(ValueError, match=r"must be \[I\] for 1 sizes"):
        spans_from_images(last, [4], 7)


def test_ids_are_split_into_biases_and_ids_within_images():
    """Two images in one prompt, and one in another."""
    ids = torch.tensor([5, 6, 7, 8, 20, 21, 3, 4])
    memory = ImageMemory.from_media(torch.randn(8, 2), ids, [6, 2], [4, 2, 2])
    assert memory.ids.tolist() == [0, 1, 2, 3, 0, 1, 0, 1]
    assert memory.starts.tolist() == [0, 4, 6]
    assert memory.biases.tolist() == [[5, 20, 3]]
    assert torch.equal(memory.position_ids, ids)
    absolute = ImageMemory.from_media(torch.randn(8, 2), ids, [6, 2], [4, 2, 2], absolute=True)
    assert torch.equal(absolute.ids, ids.int())
    assert torch.equal(absolute.position_ids, ids)
    with pytest.raises(ValueError, match="must agree"):
        ImageMemory.from_media(torch.randn(8, 2), ids, [6, 2], [4, 3, 1])  # across prompts
    elsewhere = memory.reading(memory.spans, torch.tensor([[5, 20, 3], [9, 9, 9]]))
    assert elsewhere.keys is memory.keys
    assert elsewhere.position_ids[1].tolist() == [9, 10, 11, 12, 9, 10, 9, 10]
    assert elsewhere.repeat_interleave(2).biases.tolist() == [[5, 20, 3]] * 2 + [[9, 9, 9]] * 2
    assert memory.repeat_interleave(2).biases.shape == (1, 3)


def test_a_distance_table_is_cached():
    device = torch.device("cpu")
    with torch.inference_mode():
        cos, sin = distance_table(8, 1e4, 50, device)
    assert not cos.is_inference()
    assert distance_table(8, 1e4, 50, device)[0] is cos
    wanted, _ = rotary_table(torch.tensor([[49]]), 8, 1e4)
    assert torch.equal(cos[49], wanted[0, 0])
    assert sin[0].abs().max() == 0


# --- in the model ---


def image_prompt(model, tiles=3):
    config = model.config
    count = tiles * config.tokens_per_tile
    ids = torch.randint(10, 300, (1, count + 8))
    ids[:, 4 : 4 + count] = config.image_token_id
    side = config.vision_config.image_size[0]
    prompt = {"input_ids": ids, "pixel_values": torch.randn(tiles, 3, side, side)}
    return place(prompt) | {"tile_grid": [(tiles - 1, 1)]}


@pytest.mark.parametrize("grid", [True, False])
def test_absolute_and_relative_keys_give_the_same_logits(model, grid):
    batch = image_prompt(model)
    if not grid:
        batch["tile_grid"] = None
    with torch.no_grad():
        relative = model(**batch, use_cache=True)
        model.config.memory_positions = "absolute"
        absolute = model(**batch, use_cache=True)
    assert (relative.logits - absolute.logits).abs().max() < LOGITS
    keys = [out.image_memory.keys[1] for out in (relative, absolute)]
    assert (keys[0] - keys[1]).abs().max() > 0.1, "the keys differ"
    assert torch.equal(*(out.image_memory.values[1] for out in (relative, absolute)))


def test_modules_that_are_not_fusable_are_called(model):
    """Hooks represent adapters, quantisation and offloading: calling the modules gives the same."""
    batch = image_prompt(model)
    mixin = model.model.language_model.layers[1].mixin
    calls, handles = [], []
    with torch.no_grad():
        plain = model(**batch, use_cache=True)
        for name in ("q_proj", "kv_proj", "o_proj"):
            module = getattr(mixin, name)
            hook = lambda *_, name=name: calls.append(name)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
        called = model(**batch, use_cache=True)
    for handle in handles:
        handle.remove()
    assert calls == ["kv_proj", "q_proj", "o_proj"]
    torch.testing.assert_close(called.logits, plain.logits)
    for layer, keys in plain.image_memory.keys.items():
        torch.testing.assert_close(called.image_memory.keys[layer], keys)


def test_autocast_converts_keys_and_values(model):
    batch = image_prompt(model)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        memory = model(**batch, use_cache=True).image_memory
        del batch["pixel_values"]
        again = model(**batch, image_memory=memory).logits
    assert {t.dtype for t in memory.keys.values()} == {torch.bfloat16}
    assert again.isfinite().all()


def test_layers_built_together_share_storage(model):
    with torch.no_grad():
        memory = model(**image_prompt(model), use_cache=True).image_memory
    (storage,) = {t.untyped_storage().data_ptr() for t in memory.keys.values()}
    held = [*memory.keys.values(), *memory.values.values()]
    assert memory.nbytes == sum(t.nbytes for t in held) == held[0].untyped_storage().nbytes()
    assert storage


def test_a_memory_without_spans_raises(model):
    media = torch.randn(4, 128).to(DEVICE)
    memory = ImageMemory.from_media(media, torch.arange(4), [4]).reading(None)
    with (
        pytest.raises(ValueError, match=r"image_memory\.spans must say"),
        torch.no_grad(),
    ):
        model(input_ids=torch.tensor([[5]], device=DEVICE), image_memory=memory)
