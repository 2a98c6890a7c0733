"""The model that training begins with: every layout of its parts, and what is new in it."""

import copy
import io
import itertools

import pytest
import torch
from conftest import SLOW
from safetensors.torch import load_file, save_file
from small import make_prompts
from start_parts import (  # noqa: F401
    CONTROL,
    EVERY_TWO,
    LANGUAGE,
    SIZES,
    VISION,
    add_byte_level,
    add_llama_pieces,
    assert_same,
    make,
)
from transformers import LlamaForCausalLM

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor, prompts
from comemo.cli import main as cli
from comemo.train.models.embeddings import interpolate_positions
from comemo.train.models.start import start_model
from comemo.train.settings import StartSettings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("a model is made on the CPU"),
]
# Each layout once, with and without control tokens; all combinations in the full suite.
FEW = list(zip(VISION, LANGUAGE, (True, False, True, True, False), strict=True))
PARTS = FEW + [
    pytest.param(*parts, marks=SLOW)
    for parts in itertools.product(VISION, LANGUAGE, (True, False))
    if parts not in FEW
]


# --- weights and tokens ---


@pytest.mark.parametrize(("vision", "language", "bare"), PARTS)
def test_a_model_of_parts(make, tmp_path, vision, language, bare):
    settings, source = make(vision, language, bare)
    model, processor = start_model(settings, seed=3)
    ours, theirs = model.state_dict(), source.state_dict()
    if language == "llama_tied":
        theirs["lm_head.weight"] = theirs["model.language_model.embed_tokens.weight"]
    new = {name for name in ours if ".mixin." in name}
    if vision in ("intern_vit", "internvl_vision"):
        new |= {name for name in ours if "multi_modal_projector" in name}
    grown = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    assert_same(ours, theirs, [name for name in ours if name not in new | set(grown)])
    rows, tokens = SIZES[language.split("_")[0]]
    known = rows if language.startswith("internlm2") and not bare else tokens
    assert all(torch.equal(ours[name][:known], theirs[name][:known]) for name in grown)
    for name in new:
        if name.endswith("gate") or name.endswith("0.bias"):
            assert not ours[name].any()
        elif "norm" in name or name.endswith("projector.0.weight"):
            assert torch.equal(ours[name], torch.ones_like(ours[name]))
    # the vocabulary and the tokens
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(CONTROL))
    assert len(set(ids)) == len(CONTROL)
    assert model.config.image_token_id == ids[2]
    assert model.lm_head.out_features == len(ours[grown[1]]) == model.config.text_config.vocab_size
    assert model.config.text_config.vocab_size >= len(tokenizer)
    if bare:
        assert ids == [*range(tokens, tokens + len(CONTROL))]
        for name in grown:
            mean = theirs[name][:tokens].double().mean(0).float()
            assert torch.allclose(ours[name][ids], mean.expand(len(ids), -1), atol=1e-6)
    # what is saved
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = CoMemoForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(ours, loaded.state_dict())
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    text = "<|im_start|>user\n<image>\nthe boat<|im_end|>"
    again = CoMemoProcessor.from_pretrained(tmp_path)
    found = [prompts.encode_with_images(p.tokenizer, text, [2]) for p in (processor, again)]
    assert found[0] == found[1]
    assert found[0].count(ids[2]) == 2
    assert again.tokens_per_tile == processor.tokens_per_tile == 16
    assert again.chat_template == prompts.chat_template()
    assert "planted" not in (tmp_path / "tokenizer_config.json").read_text()
    rows = again(text=["the boat", "the"])["input_ids"]
    assert rows.shape[0] == 2


def test_a_fresh_model_answers_as_its_language_model(make):
    settings, _ = make("internvl_chat", "llama")
    model, _ = start_model(settings, seed=0)
    batch = make_prompts(model)
    out = model(**batch, use_cache=False)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    images = batch["input_ids"] == model.config.image_token_id
    assert images.any()
    embeds = embeds.clone()
    embeds[images] = model.model.project_images(batch["pixel_values"]).flatten(0, 1)
    llama = LlamaForCausalLM.from_pretrained(settings.language, dtype=torch.float32)
    llama.resize_token_embeddings(model.config.text_config.vocab_size, mean_resizing=False)
    llama.lm_head.weight = model.lm_head.weight
    mask = batch["attention_mask"]
    ids = model.model.prompt_position_ids(images, mask, batch["tile_grid"])
    wanted = llama(inputs_embeds=embeds, attention_mask=mask, position_ids=ids).logits
    assert torch.allclose(out.logits[mask.bool()], wanted[mask.bool()], atol=1e-4)


@pytest.mark.parametrize("language", ["internlm2", "llama_in_internvl"])
def test_a_fresh_model_is_a_trained_one_with_closed_gates(make, language):
    settings, source = make("comemo", language, bare=False)
    model, _ = start_model(settings, seed=0)
    closed = copy.deepcopy(source)
    for name, weight in closed.named_parameters():
        if name.endswith("gate"):
            weight.data.zero_()
    for each in (model, closed):  # both see the ids of the source's prompts as images
        each.config.image_token_id = 299
    batch, rows = make_prompts(closed), closed.config.text_config.vocab_size
    wanted = closed(**batch).logits
    kept = slice(0, 200)  # ids whose rows did not change
    assert rows <= model.config.text_config.vocab_size
    assert torch.allclose(model(**batch).logits[..., kept], wanted[..., kept], atol=1e-5)


@pytest.mark.slow
def test_a_sentencepiece_model_of_a_llama(make, tmp_path, demo_checkpoint):
    settings, _ = make(language="internlm2")
    add_llama_pieces(tmp_path, demo_checkpoint)
    settings.tokenizer = str(tmp_path)
    model, processor = start_model(settings, seed=0)
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(CONTROL[0]) == 440
    ids = prompts.encode_with_images(tokenizer, "<image>\nthe boat on the water", [2])
    assert ids.count(model.config.image_token_id) == 2
    processor.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")
    again = CoMemoProcessor.from_pretrained(tmp_path / "saved").tokenizer
    assert prompts.encode_with_images(again, "<image>\nthe boat on the water", [2]) == ids


def test_new_weights_follow_the_seed_and_leave_the_generator_alone(make):
    settings, _ = make()
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, again, other = (start_model(settings, seed=s)[0].state_dict() for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(first, again)
    name = "model.language_model.layers.1.mixin.q_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert 0.018 < first[name].std() < 0.022  # the initialiser of the language model


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=SLOW)])
def test_shards_and_shorter_dtypes(make, tmp_path, dtype):
    settings, source = make("internvl_chat", "llama")
    LlamaForCausalLM.from_pretrained(settings.language).save_pretrained(
        tmp_path, max_shard_size="60KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokenizer, settings.language, settings.tokenizer = settings.language, str(tmp_path), None
    settings.tokenizer = tokenizer
    model, _ = start_model(settings, seed=0, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    name = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name].to(dtype))


# --- settings ---


@pytest.mark.parametrize("whole", [True, False])
def test_tiles_of_another_size(make, tmp_path, demo_checkpoint, whole):
    settings, source = make("internvl_chat", "llama")
    if whole:
        source.save_pretrained(tmp_path)
        add_byte_level(tmp_path, bare=False)
        settings = StartSettings(checkpoint=str(tmp_path), tokenizer=settings.language)
    settings.model |= {"force_image_size": 168, "ps_version": "v1"}
    model, processor = start_model(settings, seed=0)
    vision, old = model.model.vision_tower, source.model.vision_tower
    wanted = old.embeddings.interpolate_pos_encoding(torch.empty(1, 145, 32), 168, 168)
    assert torch.allclose(vision.embeddings.position_embeddings, wanted, atol=1e-6)
    tiles = torch.randn(2, 3, 168, 168)
    assert torch.allclose(vision(tiles)[0], old(tiles)[0], atol=1e-5)
    assert model.config.ps_version == "v1"
    assert model.config.tokens_per_tile == processor.tokens_per_tile == 36
    assert processor.image_processor.input_size == 168
    model.save_pretrained(tmp_path / "saved")
    again = CoMemoForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again.model.project_images(tiles), model.model.project_images(tiles))


def test_positions_of_the_same_size_stay():
    positions = torch.randn(1, 1 + 64, 8)
    assert torch.equal(interpolate_positions(positions, 8), positions)


def test_a_checkpoint_with_other_values_and_a_projector(make, tmp_path, demo_checkpoint):
    file = tmp_path / "projector.safetensors"
    weights = load_file(demo_checkpoint / "model.safetensors")
    mlp = {n: torch.randn_like(w) for n, w in weights.items() if n.startswith("mlp1.")}
    save_file({name.removeprefix("mlp1."): weight for name, weight in mlp.items()}, file)
    values = {"tile_order": "row", "max_dynamic_patch": 4, "llm_config": {"rope_scaling": None}}
    settings = StartSettings(checkpoint=str(demo_checkpoint), projector=str(file), model=values)
    model, processor = start_model(settings, seed=0)
    assert (model.config.tile_order, model.config.rope_scaling) == ("row", None)
    assert processor.image_processor.max_num == 4
    assert model.config.decode_positions == "compressed"
    plain = CoMemoForConditionalGeneration.from_pretrained(demo_checkpoint, dtype=torch.float32)
    ours, theirs = model.state_dict(), plain.state_dict()
    projector = {n for n in ours if "multi_modal_projector" in n}
    assert_same(ours, theirs, ours.keys() - projector)
    for name in projector:
        assert torch.equal(ours[name], mlp["mlp1." + name.removeprefix(min(projector)[:28])])


def test_sizes_of_mixin_layers_that_fit_the_language_model(make):
    settings, _ = make()
    settings.model = {"mixin_config": {"mixin_every_n_layers": 2, "head_dim": 8}}
    mixin = start_model(settings, seed=0)[0].config.mixin_config
    assert (mixin.head_dim, mixin.num_heads, mixin.intermediate_size) == (8, 8, 96)
    settings.model = dict(EVERY_TWO)
    mixin = start_model(settings, seed=0)[0].config.mixin_config
    assert (mixin.head_dim, mixin.num_heads) == (16, 4)  # 64 is no multiple of 128


@pytest.mark.slow
@pytest.mark.parametrize("language", ["llama", "internlm2"])
def test_the_command_chats_with_a_started_model(
    make, tmp_path, picture_file, capsys, monkeypatch, language
):
    model, processor = start_model(make(language=language)[0], seed=0)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    options = ["--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", io.StringIO("what is <IMG_CONTEXT>?\n"))
    status = cli.main(["chat", str(tmp_path), "--image", str(picture_file), *options])
    assert status == 0, capsys.readouterr()
