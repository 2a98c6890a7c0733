"""The published model under our operations: the same numbers, built once, and nothing left."""

import contextlib
import copy
import threading
import types

import pytest
import torch
import virtual_gpu
from conftest import GPU
from patching import (
    assert_patched_matches,
    gradients,
    prompt_of,
    tiny_published,
    unchanged,
)
from torch import nn

import comemo_kernels as ops
from bench.published_model.chat_model import repair_generate
from comemo_kernels.patching import published_block

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
}


@pytest.fixture
def model():
    return tiny_published()


def generate(model, *grids, dhr=True, factor=1.0, **options):
    inputs = prompt_of(*grids, dhr=dhr)
    for name, value in inputs.items():
        value = (value * factor).to(model.dtype) if value.is_floating_point() else value
        inputs[name] = value if model.device.type == "meta" else value.to(model.device)
    return model.generate(**inputs, **(GREEDY | options))


def both(model, *grids, **options):
    """What the model generates unpatched and patched."""
    published = generate(repair_generate(copy.deepcopy(model)), *grids, **options)
    with ops.patched(model):
        return published, generate(model, *grids, **options)


@pytest.mark.parametrize("dhr", [True, False], ids=["dhr", "rope"])
@pytest.mark.parametrize("grids", [[(2, 1)], [(1, 1), (2, 3)], []], ids=str)
def test_generates_the_same(model, grids, dhr):
    with unchanged(model):
        published, ours = both(model, *grids, dhr=dhr)
    assert torch.equal(published.sequences, ours.sequences)
    for one, other in zip(published.scores, ours.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"top": {"ps_version": "v1", "select_layer": -2}},
        {"llm": {"bias": True}},
        {"mixin": {"mixin_every_n_layers": 1, "head_dim": 8}},
    ],
    ids=str,
)
def test_generates_the_same_for_other_settings(config):
    published, ours = both(tiny_published(**config), (2, 1))
    assert torch.equal(published.sequences, ours.sequences)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"num_beams": 3}, marks=pytest.mark.slow),
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=str,
)
def test_generates_several_rows(model, options):
    torch.manual_seed(1)
    published = generate(repair_generate(copy.deepcopy(model)), (2, 1), **options)
    torch.manual_seed(1)
    with ops.patched(model):
        ours = generate(model, (2, 1), **options)
    assert torch.equal(published.sequences, ours.sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_err_no_more(model, dtype):
    def run(model, factor):
        out = generate(repair_generate(model), (2, 1), max_new_tokens=3, factor=factor)
        return {f"logits {i}": scores for i, scores in enumerate(out.scores[:1])}

    assert_patched_matches(model.to(dtype), run)


def train(model, factor=1.0):
    """A packed row: text alone with a dummy picture, one image, two images."""
    prompts = [prompt_of(), prompt_of((2, 1)), prompt_of((1, 1), (1, 2))]
    rows = [prompt["input_ids"].shape[1] for prompt in prompts]
    tiles = torch.tensor([[1, 3, 4]])
    pixels = torch.cat(
        [torch.zeros(1, 3, 56, 56), *(p["pixel_values"] for p in prompts if "pixel_values" in p)]
    )
    media = [p["cross_attention_media_position_ids"] for p in prompts[1:]]
    return model(
        pixel_values=(pixels * factor).to(model.dtype),
        input_ids=torch.cat([p["input_ids"] for p in prompts], 1),
        attention_mask=torch.tensor([[0, *rows]]).cumsum(1),
        position_ids=torch.cat([p["position_ids"] for p in prompts], 1),
        image_flags=torch.tensor([0] + [1] * 7),
        seq_imgs=tiles,
        cross_attention_media_position_ids=torch.cat([torch.arange(4)[None], *media], 1),
    ).logits


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [
        (torch.float32, True),
        (torch.bfloat16, False),
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_trains_the_same(model, dtype, checkpointing):
    model.train().to(dtype)

    def run(model, factor):
        model.language_model.model.gradient_checkpointing = checkpointing
        logits = train(model, factor)
        return {"logits": logits} | gradients(model, logits)

    assert_patched_matches(model, run)


def test_a_mask_with_a_hole_is_refused():
    mask = torch.tensor([[True, False, True], [True, True, False]])[None, None]
    with pytest.raises(ValueError, match="one interval"):
        published_block.spans_of_mask(mask)
    spans = published_block.spans_of_mask(torch.tensor([[[[False] * 3, [False, True, True]]]]))
    assert spans.tolist() == [[[0, 0], [1, 3]]]


def test_memory_is_built_once(model):
    calls = []
    layers = model.language_model.model.layers
    blocks = [layer.gated_cross_attn_layer for layer in layers]
    with ops.patched(model):
        for block in filter(None, blocks):
            block.cross_attn.to_kv.register_forward_hook(lambda *args: calls.append(1))
        generate(model, (2, 1))
    assert len(calls) == 2  # once per mixin layer, and the hooks fired


@pytest.mark.skipif(GPU, reason="there is a real one")
def test_a_decode_step_of_a_layer_syncs_nowhere(model, virtual):
    """A CUDA graph could capture it: no number is read, nothing is copied from the host."""
    with contextlib.ExitStack() as stack:
        if not virtual:
            stack.enter_context(virtual_gpu.present())
        model.to("cuda")
        layer = model.language_model.model.layers[1]
        media, ids = torch.randn(1, 8, 32, device="cuda"), torch.arange(8, device="cuda")[None]
        blocks = [layer.gated_cross_attn_layer]
        reading = published_block.Reading(media, ids, ids[:, :3], blocks)
        token = published_block.READING.set(reading)
        stack.callback(published_block.READING.reset, token)
        stack.enter_context(ops.patched(model))
        stack.enter_context(torch.no_grad())
        x, more = (torch.randn(1, n, 32, device="cuda") for n in (3, 1))
        _, past = layer(x, position_ids=ids[:, :3], use_cache=True)

        def step():
            layer(more, position_ids=ids[:, :1], past_key_value=past, use_cache=True)

        virtual_gpu.capture(step, 1)


def test_a_model_inside_the_call_of_another_reads_its_own_images(model):
    other = tiny_published(seed=1)
    block = other.language_model.model.layers[1].gated_cross_attn_layer
    block.cross_attn_media_position_ids = torch.arange(4)[None]
    block.cross_attn_text_position_ids = torch.arange(3)[None]
    x, features, found = torch.randn(1, 3, 32), torch.randn(1, 4, 32), []
    with torch.no_grad(), ops.patched(model), ops.patched(other):
        wanted = block(x, features)
        hook = model.language_model.output.register_forward_hook(
            lambda *_: found.append(block(x, features))
        )
        generate(model, (2, 1), max_new_tokens=2)
        hook.remove()
    assert len(found) == 2
    assert all(torch.equal(each, wanted) for each in found)


def test_an_interrupted_call_leaves_nothing(model):
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    with ops.patched(model):
        wanted = generate(model, (2, 1)).sequences
        with unchanged(model):
            hook = model.language_model.output.register_forward_hook(stop)
            with pytest.raises(Stop):
                generate(model, (1, 2))
            hook.remove()
        assert torch.equal(generate(model, (2, 1)).sequences, wanted)
        assert all(layer.vis_x is None for layer in model.language_model.model.layers)


def test_threads_do_not_disturb_each_other(model):
    grids = [[(2, 1)], [(1, 2), (1, 1)], []] * 2
    found = {}

    def run(index):
        with ops.patched(model):
            found[index] = generate(model, *grids[index]).sequences

    with unchanged(model):
        with ops.patched(model):
            wanted = [generate(model, *each).sequences for each in grids]
        threads = [threading.Thread(target=run, args=(i,)) for i in range(len(grids))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[i], wanted[i]) for i in range(len(grids)))


def parts(model):
    """Every module of a mixin layer and its decoder layer, by name."""
    return dict(model.language_model.model.layers[1].named_modules())


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_hooks_run(model, before):
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1), max_new_tokens=2).sequences
    names = [name for name in parts(model) if "rotary" not in name]
    for name in names:
        if name == "gated_cross_attn_layer.cross_attn.rotary_emb":
            continue
        ran: list[int] = []
        with contextlib.ExitStack() as stack:
            if not before:
                stack.enter_context(ops.patched(model))
            hook = parts(model)[name].register_forward_hook(lambda *args, ran=ran: ran.append(1))
            stack.callback(hook.remove)
            if before:
                stack.enter_context(ops.patched(model))
            assert torch.equal(generate(model, (2, 1), max_new_tokens=2).sequences, wanted), name
        assert ran, name


class Int8Like(nn.Module):
    """A linear layer whose weights are not a parameter."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("stored", linear.weight.data)

    def forward(self, x):
        return x @ self.stored.t()


@pytest.mark.parametrize(
    "name",
    [
        *("to_q", "to_kv", "wqkv", "w2"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("to_out", "w1", "wo")),
    ],
)
def test_replaced_linear_layers_are_called(model, name):
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1)).sequences
    for path, module in list(model.language_model.named_modules()):
        if path.endswith(f".{name}"):
            parent = model.language_model.get_submodule(path.rpartition(".")[0])
            setattr(parent, name, Int8Like(module))
    with ops.patched(model):
        assert torch.equal(generate(model, (2, 1)).sequences, wanted)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_adapters(model, before):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        target_modules=["to_q", "to_kv", "wqkv", "w2"], init_lora_weights=False
    )
    torch.manual_seed(3)
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    wanted = generate(repair_generate(adapted.base_model.model), (2, 1)).sequences
    torch.manual_seed(3)
    with unchanged(model) if before else contextlib.nullcontext():
        if before:
            model = copy.deepcopy(model)
        else:
            ops.patch(model)
        adapted = peft.get_peft_model(model, settings)
        with ops.patched(adapted):
            assert torch.equal(generate(adapted.base_model.model, (2, 1)).sequences, wanted)
        merged = adapted.merge_and_unload()
        with ops.patched(merged):
            assert torch.equal(generate(merged, (2, 1)).sequences, wanted)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_offloaded_weights(model, before):
    accelerate = pytest.importorskip("accelerate")
    wanted = generate(repair_generate(copy.deepcopy(model)), (2, 1)).sequences
    if before:
        accelerate.cpu_offload(model, execution_device="cpu")
    with ops.patched(model):
        if not before:
            accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.equal(generate(model, (2, 1)).sequences, wanted)


def test_what_runs_the_models_own_code_is_told(model):
    attention = model.language_model.model.layers[0].decoder_layer.attention
    ids = torch.arange(3)[None]
    with ops.patched(model) as patch:
        with pytest.warns(ops.PatchWarning, match="attention weights are asked for"):
            _, weights, _ = attention(torch.randn(1, 3, 32), None, ids, output_attentions=True)
        hook = model.mlp1[1].register_forward_hook(lambda *_: None)
        with pytest.warns(ops.PatchWarning, match="a part of the projector has to be called"):
            generate(model, (2, 1), max_new_tokens=2)
        hook.remove()
        refused = patch.report().refused
    assert refused["extract_feature"] == {"a part of the projector has to be called": 1}
    assert weights.shape == (1, 4, 3, 3)
    assert len(refused) == 2


def test_destroyed_rotary_buffers_are_refused(model):
    rotary = model.language_model.model.layers[1].gated_cross_attn_layer.cross_attn.rotary_emb
    for name in ("cos_cached", "inv_freq"):
        good = getattr(rotary, name)
        setattr(rotary, name, torch.full_like(good, 0.3))
        with unchanged(model), pytest.raises(ValueError, match=r"rotary buffers of .*layers\.1\."):
            ops.patch(model)
        setattr(rotary, name, good)
    attention = model.language_model.model.layers[0].decoder_layer.attention
    attention.rotary_emb(torch.zeros(1), seq_len=2000)  # grown: NTK scaling of its frequencies
    with ops.patched(model.bfloat16()):
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "wanted input_ids"),
        ({"position_ids": torch.zeros(1, 3)}, "position_ids must be"),
        ({"cross_attention_media_position_ids": torch.zeros(1, 3)}, "an id for each image token"),
        ({"pixel_values": torch.zeros(1, 3, 56, 56)}, "one image token for each"),
    ],
    ids=lambda value: "",
)
def test_arguments_that_do_not_fit(model, change, message):
    with ops.patched(model), unchanged(model), pytest.raises(ValueError, match=message):
        model.generate(**(prompt_of((2, 1)) | change), **GREEDY)


def test_position_ids_are_optional(model):
    with ops.patched(model):
        wanted = generate(model, (2, 1), dhr=False).sequences
        inputs = prompt_of((2, 1), dhr=False)
        del inputs["position_ids"], inputs["cross_attention_media_position_ids"]
        assert torch.equal(model.generate(**inputs, **GREEDY).sequences, wanted)


def test_patching_copies_no_weights(model):
    addresses = {name: p.data_ptr() for name, p in model.named_parameters()}
    with ops.patched(model):
        assert {name: p.data_ptr() for name, p in model.named_parameters()} == addresses


def test_other_models_are_not_taken(model):
    del model.mlp1
    with pytest.raises(TypeError, match="known are: the published CoMemo code"):
        ops.patch(model)
    with pytest.raises(TypeError, match="got SimpleNamespace"):
        ops.patched(types.SimpleNamespace())
