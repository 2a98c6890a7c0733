"""Models of other packages on the kernels themselves: in Triton's interpreter or on a GPU."""

import copy

import pytest
import torch
from patching import gradients, prompt_of, tiny_published

import comemo_kernels as ops
from bench.published_model.chat_model import repair_generate

GREEDY = {
    "max_new_tokens": 2,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
}


@pytest.mark.kernel
def test_published_generates_the_same(device):
    model = tiny_published(llm={"num_hidden_layers": 2}).to(device)
    inputs = {name: value.to(device) for name, value in prompt_of((2, 1)).items()}
    published = repair_generate(copy.deepcopy(model)).generate(**inputs, **GREEDY)
    with ops.patched(model):
        ours = model.generate(**inputs, **GREEDY)
    assert torch.equal(published.sequences, ours.sequences)
    for one, other in zip(published.scores, ours.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


@pytest.mark.kernel
def test_published_block_trains_the_same(device):
    model = tiny_published().to(device)
    block = model.language_model.model.layers[1].gated_cross_attn_layer
    block.cross_attn_media_position_ids = torch.arange(8, device=device)[None]
    block.cross_attn_text_position_ids = torch.arange(6, device=device)[None]
    bounds = torch.tensor([[0, 2, 6]], device=device), torch.tensor([[0, 3, 8]], device=device)
    block.cross_attn.cu_seqlens_q, block.cross_attn.cu_seqlens_k = bounds
    x, media = torch.randn(1, 6, 32, device=device), torch.randn(1, 8, 32, device=device)
    plain = block(x, media)
    wanted = gradients(block, plain)
    with ops.patched(model):
        ours = block(x, media)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    for name, grad in gradients(block, ours).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-3, atol=1e-3, msg=name)
