"""The image memory as an object."""

import pytest
import torch

from comemo_kernels import ImageMemory, rotary_table, spans_from_cu_seqlens


def example(lengths=(4, 0, 6)):
    M = sum(lengths)
    return ImageMemory.from_media(torch.randn(M, 8), torch.arange(M), lengths)


def test_spans_lie_one_after_the_other():
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


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="must agree on the number of image tokens"):
        ImageMemory.from_media(torch.randn(5, 8), torch.arange(5), [2, 2])
    with pytest.raises(ValueError, match="must agree on the number of image tokens"):
        ImageMemory.from_media(torch.randn(5, 8), torch.arange(4), [5])


def test_spans_of_a_pack():
    spans = spans_from_cu_seqlens(torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 7, 7]), 7)
    assert spans[0].tolist() == [[0, 4]] * 2 + [[7, 7]] * 3 + [[7, 7]] * 2
    with pytest.raises(ValueError, match=r"must be \[samples \+ 1\]"):
        spans_from_cu_seqlens(torch.tensor([0, 2]), torch.tensor([0, 1, 2]), 2)


def test_a_memory_without_its_media_says_so(model):
    memory = ImageMemory(torch.tensor([[[0, 4]]]))
    with pytest.raises(ValueError, match="neither keys of mixin layer 1 nor the media"):
        model(input_ids=torch.tensor([[5]]), image_memory=memory)


def test_a_prompt_without_its_image_tokens_says_so(model):
    memory = ImageMemory.from_media(torch.randn(4, 128), torch.arange(4), [4])
    image_id = model.config.image_token_id
    with pytest.raises(ValueError, match=r"prompts with \[2\] image tokens must hold the whole"):
        model(input_ids=torch.tensor([[5, image_id, image_id, 7]]), image_memory=memory)


def test_keys_and_values_own_no_more_than_they_hold(model):
    """A view into the projection's output would hold twice the bytes that `nbytes` tells."""
    layer = model.model.language_model.layers[1].mixin
    mixin = model.config.mixin_config
    table = rotary_table(torch.arange(6)[None], mixin.head_dim, mixin.rope_theta)
    with torch.no_grad():
        for tensor in layer.build(torch.randn(6, 128), table):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
