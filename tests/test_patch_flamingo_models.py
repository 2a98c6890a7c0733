"""A whole Flamingo is patched: generation, cached media, and what is plugged into its modules."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import SLOW
from flamingo_models import VISUAL, WIDTH, helpers, make_block, make_flamingo, make_prompt
from patching import unchanged
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, MptConfig, MptForCausalLM

import comemo_kernels

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def make_llama():
    language = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            **SIZES,
        )
    )
    return make_flamingo(language)


def make_mpt():
    language = MptForCausalLM(
        MptConfig(d_model=WIDTH, n_layers=2, n_heads=4, expansion_ratio=2, max_seq_len=64, **SIZES)
    )
    return make_flamingo(language, "transformer.blocks")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_llama()


@torch.no_grad()
def generate(model, vision, ids, mask=None, **options):
    """Token ids, and the scores of each step."""
    mask = (ids != 0).long() if mask is None else mask
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1} | options
    found = model.generate(
        vision, ids, mask, return_dict_in_generate=True, output_scores=True, **options
    )
    return found.sequences, torch.stack(found.scores)


def generate_unpatched(model, *given, **options):
    """Skips where the release of transformers cannot, because it leaves out a mask of ones."""
    try:
        return generate(model, *given, **options)
    except TypeError as error:
        if "attention_mask" not in str(error):
            raise
        pytest.skip(f"unpatched, too: {error}")


def assert_generates_as_unpatched(model, *given, **options):
    wanted, scores = generate_unpatched(model, *given, **options)
    with comemo_kernels.patched(model) as patch:
        found, close = generate(model, *given, **options)
    assert torch.equal(found, wanted)
    torch.testing.assert_close(close, scores, rtol=1e-4, atol=1e-4)
    assert not patch.report().refused


@pytest.mark.parametrize(
    ("make", "latest"),
    [
        (make_llama, True),
        pytest.param(make_llama, False, marks=SLOW),
        pytest.param(make_mpt, True, marks=SLOW),
        pytest.param(make_mpt, False, marks=SLOW),
    ],
)
def test_it_generates_as_unpatched(make, latest):
    model = make()
    for block in model.lang_encoder.gated_cross_attn_layers:
        if block is not None:
            block.attn.only_attend_immediate_media = latest
    vision, ids = make_prompt()
    padded = ids.clone()
    padded[1, :2] = 0
    assert_generates_as_unpatched(model, vision, padded)
    assert_generates_as_unpatched(model, vision, padded, num_beams=3)
    assert_generates_as_unpatched(model, vision, ids)
    assert_generates_as_unpatched(model, vision[:1], ids[:1], num_beams=2, num_return_sequences=2)


def test_a_static_cache(model):
    vision, ids = make_prompt()
    ids[1, :2] = 0
    options = {"cache_implementation": "static", "disable_compile": True}
    assert_generates_as_unpatched(model, vision, ids, **options)


def test_prompts_share_an_image(model):
    vision, ids = make_prompt(((1,), (4,)), images=1)
    assert_generates_as_unpatched(model, vision[:1], ids)


def test_the_language_model_alone_and_a_model_around_it(model):
    vision, ids = make_prompt()
    with torch.no_grad():
        wanted = model(vision, ids, torch.ones_like(ids)).logits
        for part in (model.lang_encoder, nn.ModuleDict({"inner": model})):
            with comemo_kernels.patched(part) as patch:
                assert len(patch.report().replaced) == 4
                found = model(vision, ids, torch.ones_like(ids)).logits
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


class Products(TorchFunctionMode):
    """Counts the products of some weights."""

    def __init__(self, weights):
        super().__init__()
        self.ids, self.count = {id(weight) for weight in weights}, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and id(args[1]) in self.ids:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_keys_and_values_are_computed_once(model):
    blocks = [block for block in model.lang_encoder.gated_cross_attn_layers if block is not None]
    weights = [block.attn.to_kv.weight for block in blocks]
    vision, ids = make_prompt()
    ids[1, :2] = 0
    with Products(weights) as products:
        generate_unpatched(model, vision, ids)
        assert products.count == 6 * len(blocks)
        with comemo_kernels.patched(model):
            products.count = 0
            generate(model, vision, ids)
            assert products.count == len(blocks)
            generate(model, vision, ids)
            assert products.count == 2 * len(blocks)


@torch.no_grad()
def test_cached_media(model):
    """Prompts of other lengths read the last image of media that are cached."""
    vision, ids = make_prompt()
    mask = torch.ones_like(ids)

    def run():
        model.cache_media(ids, vision)
        found = [
            model(None, text, mask[:, : text.shape[1]], clear_conditioned_layers=False).logits
            for text in (torch.full_like(ids, 7), torch.full_like(ids[:, :3], 9))
        ]
        model.cache_media(ids, 2 * vision)
        found.append(model(None, torch.full_like(ids, 7), mask).logits)
        model.uncache_media()
        return [*found, model(vision, ids, mask).logits]

    wanted = run()
    with comemo_kernels.patched(model):
        found = run()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(wanted[0], wanted[2])


def test_new_weights_count_for_media_that_are_kept():
    block, media = make_block().requires_grad_(False), torch.randn(1, 2, 5, VISUAL)
    x = torch.randn(1, 4, WIDTH)
    for change in (
        lambda: block.attn.to_kv.weight.mul_(2),
        lambda: block.load_state_dict(make_block().state_dict()),
        lambda: media.mul_(3),
        lambda: block.to(torch.bfloat16).float(),
    ):
        with comemo_kernels.patched(block):
            block(x, media, None, True)
            change()
            found = block(x, media, None, True)
        torch.testing.assert_close(found, block(x, media, None, True))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training(model, checkpointed):
    vision, ids = make_prompt()
    model = copy.deepcopy(model).train()
    if checkpointed:  # as train.py of open_flamingo does
        apply_activation_checkpointing(
            model, check_fn=lambda module: isinstance(module, helpers.GatedCrossAttentionBlock)
        )

    def learn():
        model.zero_grad()
        model(vision, ids, torch.ones_like(ids), labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted = learn()
    assert {"to_kv", "attn_gate", "perceiver"} <= {
        part for name in wanted for part in name.split(".")
    }
    with comemo_kernels.patched(model) as patch:
        found = learn()
    assert len(patch.report().replaced) == 4
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_nothing_is_left(model):
    vision, ids = make_prompt()
    model(vision, ids, torch.ones_like(ids))  # open_flamingo sets attributes of its layers
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    handle = model.lang_encoder.model.layers[3].register_forward_pre_hook(fail)
    with unchanged(model), comemo_kernels.patched(model):
        assert list(model.state_dict()) == list(weights)
        with pytest.raises(RuntimeError, match="stop"):
            model(vision, ids, torch.ones_like(ids))
        model.uncache_media()
    handle.remove()
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())


def fail(*_):
    raise RuntimeError("stop")
