"""Transformers' conventions: argument names, outputs, inputs, submodels, configs, export."""

import copy
import json

import pytest
import torch
from conftest import TRACED
from small import make_model, make_prompts, one_more, place
from transformers import AutoConfig, DynamicCache, LlamaConfig
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

import comemo
from comemo import CoMemoConfig, CoMemoForConditionalGeneration, CoMemoModel
from comemo.outputs import CACHE
from comemo_kernels import ImageMemory

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def prompts(model):
    torch.manual_seed(1)
    return make_prompts(model)


# --- both names of the KV cache ---


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(model, prompts, name):
    with torch.no_grad():
        out = model(**prompts, **{name: DynamicCache()}, use_cache=True)
        assert out.cache is out.past_key_values is out["cache"] is out["past_key_values"]
        assert out.cache.get_seq_length() == prompts["input_ids"].shape[1]
        step = one_more(prompts, out)
        held = step.pop("past_key_values")
        whole = model(
            input_ids=torch.cat([prompts["input_ids"], step["input_ids"]], 1),
            attention_mask=step["attention_mask"],
            pixel_values=prompts["pixel_values"],
            tile_grid=prompts["tile_grid"],
        )
        found = model(**step, **{name: held}).logits[:, -1]
        base = model.model(**prompts, **{name: DynamicCache()}, use_cache=True)
    assert torch.allclose(found, whole.logits[:, -1], atol=2e-5)
    assert base.cache is base.past_key_values
    answer = model.generate(**prompts, **GREEDY)
    given = DynamicCache()
    assert torch.equal(model.generate(**prompts, **GREEDY, **{name: given}), answer)
    assert given.get_seq_length() == answer.shape[1] - 1
    told = model.generate(**prompts, **GREEDY, return_dict_in_generate=True)
    assert getattr(told, CACHE).get_seq_length() == answer.shape[1] - 1


def test_two_caches_are_refused(model, prompts):
    both = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    with pytest.raises(ValueError, match=r"cache.*past_key_values|past_key_values.*cache"):
        model(**prompts, **both)
    with pytest.raises(ValueError, match="generate: cache and past_key_values are two names"):
        model.generate(**prompts, **both, **GREEDY)


def test_an_unknown_keyword_is_an_error(model, prompts):
    for whole in (model, model.model):
        with pytest.raises(ValueError, match=r"takes its named arguments.*'cash'"):
            whole(**prompts, cash=DynamicCache())
    with pytest.raises(ValueError, match="cash"):
        model.generate(**prompts, **GREEDY, cash=1)


# --- outputs ---


def test_outputs_are_dictionaries_and_tuples(model, prompts):
    with torch.no_grad():
        for whole, first in ((model, "logits"), (model.model, "last_hidden_state")):
            told = whole(**prompts, output_hidden_states=True, output_attentions=False)
            plain = whole(**prompts, return_dict=False)
            assert isinstance(plain, tuple)
            assert torch.equal(plain[0], told[first])
            assert torch.equal(told[0], told[first])
            assert isinstance(told.image_memory, ImageMemory)
            assert len(told.hidden_states) == 5
            tiles = told.image_outputs.pooler_output
            assert tiles.shape == (3, model.config.tokens_per_tile, 64)
            assert whole(input_ids=prompts["input_ids"]).image_outputs is None


def test_image_features_like_internvl(model, prompts):
    tiles = prompts["pixel_values"]
    with torch.no_grad():
        wanted = model.model.project_images(tiles)
        for whole in (model, model.model):
            told = whole.get_image_features(tiles, output_hidden_states=True)
            assert torch.allclose(told.pooler_output, wanted, atol=1e-5)
            assert told.last_hidden_state.shape == (3, 65, 32)
            assert len(told.hidden_states) == 2
            assert whole.get_image_features(tiles).hidden_states is None
            (first, pooled) = whole.get_image_features(tiles, return_dict=False)
            assert torch.equal(pooled, told.pooler_output)
            assert torch.equal(first, told.last_hidden_state)
        other = model.get_image_features(tiles, vision_feature_layer=-2).pooler_output
        assert not torch.allclose(other, wanted)
        before, model.config.select_layer = model.config.select_layer, -2
        try:
            assert torch.allclose(model.model.project_images(tiles), other, atol=1e-5)
        finally:
            model.config.select_layer = before
    for told, options in (
        ("vision_feature_layer must be one of the 2 hidden states, got 7", {"layer": 7}),
        ("vision_feature_select_strategy must be 'default', got 'full'", {"strategy": "full"}),
    ):
        names = {"layer": "vision_feature_layer", "strategy": "vision_feature_select_strategy"}
        with pytest.raises(ValueError, match=told):
            model.get_image_features(tiles, **{names[k]: v for k, v in options.items()})
    with pytest.raises(ValueError, match=r"must be a tensor \[tiles, 3, side, side\]"):
        model.get_image_features(tiles[0])


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (lambda tiles: tiles.cpu().numpy(), "ndarray"),
        (lambda tiles: tiles[0], r"\(3, 112, 112\)"),
        (lambda tiles: tiles[:, :1], r"\(3, 1, 112, 112\)"),
        (lambda tiles: tiles[..., ::2], r"\(3, 3, 112, 56\)"),
        (lambda tiles: tiles[..., ::2, ::2], r"\(3, 3, 56, 56\)"),
    ],
)
def test_tiles_of_another_shape_are_refused(model, prompts, spoil, got):
    prompts["pixel_values"] = spoil(prompts["pixel_values"])
    told = rf"pixel_values must be a tensor \[tiles, 3, 112, 112\], got {got}"
    for verb in (model, model.model, model.generate):
        with pytest.raises(ValueError, match=told):
            verb(**prompts)


# --- inputs ---


def test_position_ids_of_embeddings_come_from_their_mask(model):
    ids = place(torch.randint(10, 200, (2, 9)))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        found = model(inputs_embeds=embeds, attention_mask=mask).logits
        assert torch.allclose(found, model(input_ids=ids, attention_mask=mask).logits, atol=1e-5)
    wanted = model.generate(ids, attention_mask=mask, **GREEDY)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), wanted)
    alone = model.generate(ids[1:], **GREEDY)[:, 9:]
    assert torch.equal(model.generate(inputs_embeds=embeds[1:], **GREEDY), alone)
    both = model.generate(ids, inputs_embeds=embeds, attention_mask=mask, **GREEDY)
    assert torch.equal(both[:, 9:], wanted)


def test_images_replace_embeddings_at_image_ids(model, prompts):
    embeds = model.get_input_embeddings()(prompts["input_ids"])
    with torch.no_grad():
        wanted = model(**prompts).logits
        assert torch.allclose(model(**prompts, inputs_embeds=embeds).logits, wanted, atol=1e-5)
    answer = model.generate(**prompts, **GREEDY)
    assert torch.equal(model.generate(**prompts, inputs_embeds=embeds, **GREEDY), answer)
    del prompts["input_ids"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="need input_ids"):
            call(**prompts, inputs_embeds=embeds)


def test_embeddings_need_a_cache_and_no_speculative_decoding(model):
    embeds = place(torch.randn(1, 5, 64))
    with pytest.raises(ValueError, match=r"inputs_embeds need a cache.*use_cache=False"):
        model.generate(inputs_embeds=embeds, use_cache=False, **GREEDY)
    with pytest.raises(ValueError, match=r"speculative decoding needs.*got inputs_embeds"):
        model.generate(inputs_embeds=embeds, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="need pixel_values"):
        model(input_ids=place(torch.ones(1, 5).long()), inputs_embeds=embeds)


def test_without_input_generation_starts_at_the_bos_token(model):
    start = model.generate(place(torch.tensor([[1]])), **GREEDY)
    assert torch.equal(model.generate(bos_token_id=1, **GREEDY), start)
    assert torch.equal(model.generate(**GREEDY), start)  # from the text config
    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.generation_config = copy.deepcopy(model.generation_config)
    other.config.text_config.bos_token_id = other.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="generate: give input_ids, inputs_embeds or a bos_token"):
        other.generate(**GREEDY)
    ids = place(torch.tensor([[1]]))
    with pytest.raises(ValueError, match="inputs and input_ids are two names of one argument"):
        model.generate(ids, input_ids=ids, **GREEDY)


def test_right_padding_is_refused(model):
    ids = place(torch.randint(10, 200, (3, 6)))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match=r"padded on the left .* ends with padding in rows \[1\]"):
        model.generate(ids, attention_mask=mask, **GREEDY)


# --- speculative decoding ---


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
def test_speculative_decoding_changes_no_answer(model, prompts, drafts):
    prompts = {n: x[1:] if n in ("input_ids", "attention_mask") else x for n, x in prompts.items()}
    prompts["pixel_values"], prompts["tile_grid"] = prompts["pixel_values"][1:], [(1, 1)] * 2
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(**prompts, **options)
    more = {"prompt_lookup_num_tokens": 3} if drafts == "lookup" else {"assistant_model": model}
    assert torch.equal(model.generate(**prompts, **options, **more), wanted)


# --- submodels and configs ---


@pytest.mark.parametrize("original", [True, False])
def test_a_model_without_head_is_saved_and_loaded(model, prompts, tmp_path, original):
    model.model.save_pretrained(tmp_path / "base", save_original_format=original)
    model.save_pretrained(tmp_path / "whole", save_original_format=original)
    with torch.no_grad():
        wanted = model.model(**prompts).last_hidden_state
        for folder in ("base", "whole"):
            loaded = CoMemoModel.from_pretrained(tmp_path / folder).eval().to(wanted.device)
            assert torch.equal(loaded(**prompts).last_hidden_state, wanted)
    with pytest.raises(ValueError, match=r"missing_keys: \['lm_head.weight'\]"):
        CoMemoForConditionalGeneration.from_pretrained(tmp_path / "base")


def test_sub_configs_are_read_by_their_own_classes(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    told = model.config.to_dict()
    for name, kind in (("text_config", LlamaConfig), ("vision_config", InternVLVisionConfig)):
        part = kind.from_pretrained(tmp_path).to_dict()
        where = ("transformers_version", "_name_or_path")
        part, wanted = ({n: v for n, v in d.items() if n not in where} for d in (part, told[name]))
        assert part == wanted
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == model.config.to_diff_dict()
    assert CoMemoConfig(**told).to_dict() == told
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["llm_config"]["hidden_size"] == written["text_config"]["hidden_size"] == 64
    assert written["vision_config"]["image_size"] == 112  # as the published code reads it


def test_a_config_that_contradicts_itself_is_refused(model):
    told = model.config.to_dict()
    told["llm_config"]["hidden_size"] = 128
    with pytest.raises(ValueError, match=r"must agree, they differ in \['hidden_size'\]"):
        CoMemoConfig(**told)


@pytest.mark.parametrize("kind", ["dynamic", "linear"])
def test_rope_scaling_of_llama_is_accepted(model, kind):
    scaled = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e6}
    text = dict(model.config.text_config.to_dict(), rope_parameters=scaled)
    parts = {"vision_config": model.config.vision_config, "mixin_config": model.config.mixin_config}
    config = CoMemoConfig(text_config=text, **parts)
    assert config.rope_scaling == {"type": kind, "factor": 4.0}
    assert config.text_config.rope_parameters["rope_type"] == "default"
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    late = copy.deepcopy(model.config)
    late.rope_scaling = None
    late.text_config.rope_parameters = dict(scaled)
    assert CoMemoModel(late).config.rope_scaling == {"type": kind, "factor": 4.0}
    with pytest.raises(ValueError, match=r"must not differ"):
        CoMemoConfig(text_config=text, rope_scaling={"type": kind, "factor": 2.0}, **parts)


def test_unsupported_rope_scaling_is_refused(model):
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    text = model.config.text_config.to_dict() | {"rope_parameters": yarn}
    with pytest.raises(ValueError, match=r"type must be 'dynamic' or 'linear'.*yarn"):
        CoMemoConfig(text_config=text)
    late = copy.deepcopy(model.config)
    late.text_config.rope_parameters = yarn
    with pytest.raises(ValueError, match=r"type must be 'dynamic' or 'linear'.*yarn"):
        CoMemoForConditionalGeneration(late)
    for scaling in ({"type": "dynamic"}, {"factor": 2.0}, {"type": "linear", "factor": 0}):
        with pytest.raises(ValueError, match="with a positive factor and nothing else"):
            CoMemoConfig(rope_scaling=scaling)


# --- export ---


@pytest.fixture
def exported():
    from transformers.integrations import executorch

    executorch.register_dynamic_cache_export_support()

    def run(model, given):
        program = torch.export.export(model, (), copy.deepcopy(given), strict=False)
        return program.module()(**copy.deepcopy(given)).logits

    return run


@TRACED
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "what",
    ["step", *(pytest.param(w, marks=pytest.mark.slow) for w in ("images", "memory", "text"))],
)
def test_prefills_and_decode_steps_are_exported(exported, real_device, what):
    model = make_model().to(real_device)
    prompts = place(make_prompts(model), real_device)
    with torch.no_grad():
        out = model(**prompts, use_cache=True)
        whole = {n: prompts[n] for n in ("input_ids", "attention_mask")}
        given = {
            "text": {"input_ids": whole["input_ids"].clamp(max=200), "use_cache": False},
            "images": prompts | {"use_cache": False},
            "memory": whole | {"image_memory": out.image_memory, "use_cache": False},
            "step": place(one_more(prompts, out), real_device),
        }[what]
        wanted = model(**copy.deepcopy(given)).logits
        found = exported(model, given)
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_memory_is_a_pytree():
    from torch.utils import _pytree as pytree

    memory = ImageMemory.from_media(torch.randn(8, 4), torch.arange(8), [6, 2], [4, 2, 2])
    memory.update(1, torch.randn(8, 1, 2), torch.randn(8, 1, 2))
    leaves, tree = pytree.tree_flatten(memory)
    assert sum(isinstance(leaf, torch.Tensor) for leaf in leaves) == 7
    again = pytree.tree_unflatten(leaves, tree)
    assert (again.sizes, again.absolute) == ((4, 2, 2), False)
    assert torch.equal(again.keys[1], memory.keys[1])
    told = pytree.treespec_loads(pytree.treespec_dumps(tree))
    assert told == tree


def test_both_output_classes_are_public():
    assert {"CoMemoOutput", "CoMemoModelOutput"} <= set(comemo.__all__)
