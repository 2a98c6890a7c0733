"""The model that training begins with: every layout of its parts, and what is new in it."""

import copy
import io
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import SLOW
from safetensors.torch import load_file, save_file
from small import make_prompts
from start_parts import (
    CONTROL,
    LANGUAGE,
    VISION,
    add_byte_level,
    add_llama_pieces,
    add_sentencepiece,
    assert_same,
    make_language,
    make_source,
    make_vision,
    write,
)
from transformers import LlamaForCausalLM

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor, prompts
from comemo.cli import main as cli
from comemo.train.embeddings import interpolate_positions
from comemo.train.settings import StartSettings
from comemo.train.start import start_model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("a model is made on the CPU"),
]
EVERY_TWO = {"mixin_config": {"mixin_every_n_layers": 2}}
SIZES = {"internlm2": (440, 440), "llama": (300, 270)}  # rows of the model, tokens of the tokenizer
# Each layout once, with and without control tokens; all combinations in the full suite.
FEW = list(zip(VISION, LANGUAGE, (True, False, True, True, False), strict=True))
PARTS = FEW + [
    pytest.param(*parts, marks=SLOW)
    for parts in itertools.product(VISION, LANGUAGE, (True, False))
    if parts not in FEW
]


@pytest.fixture(scope="module")
def make(tmp_path_factory, demo_checkpoint):
    """Directories of the parts, each made once; returns settings and the source of both."""
    root, made = tmp_path_factory.mktemp("parts"), {}

    def directories(vision="intern_vit", language="llama", bare=True):
        kind = language.split("_")[0]
        size, _ = SIZES[kind]
        size += 0 if bare or kind == "llama" else len(CONTROL)
        key = kind, size
        source = made.setdefault(key, None) or make_source(kind, size)
        made[key] = source
        for layout, build in ((vision, make_vision), (language, make_language)):
            folder = root / f"{layout}-{kind}-{size}-{bare}-{build.__name__}"
            if not folder.exists():
                build(layout, source, folder)
                if build is make_language and kind == "llama":
                    add_byte_level(folder, bare)
                elif build is make_language:
                    add_sentencepiece(folder, demo_checkpoint, bare)
            made[build] = str(folder)
        settings = StartSettings(
            vision=made[make_vision], language=made[make_language], model=dict(EVERY_TWO)
        )
        return settings, source

    return directories


def copy_of(directory, folder):
    """A copy of a directory that a test may change: its weights, its config, and the folder."""
    folder.mkdir()
    for path in Path(directory).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), config, folder


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


# --- errors ---


def edited(make, folder, part="language", change=None, config=None, files=()):
    """Settings with a copy of a directory, after changes of its weights and its config."""
    settings, _ = make()
    weights, old, copied = copy_of(getattr(settings, part), folder / "edited")
    if change is not None:
        change(weights)
    write(copied, weights, old | (config or {}))
    for name in files:
        (copied / name).write_bytes(b"\x80")
    setattr(settings, part, str(copied))
    return settings


def lose_two(weights):
    del weights["model.layers.0.mlp.up_proj.weight"], weights["model.norm.weight"]


def add_one(weights):
    weights["model.layers.0.mlp.extra.weight"] = torch.zeros(2)


def cut_one(weights):
    weights["model.norm.weight"] = torch.zeros(3)


def quantise(weights):
    weights["model.norm.weight"] = torch.zeros(64, dtype=torch.int8)


def make_deeper(weights):
    weights["encoder.layers.1.ls1"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"change": lose_two}, ["missing: ['model.language_model.layers.0.mlp.up_proj.weight', "]),
        ({"change": add_one}, ["unexpected: ['model.layers.0.mlp.extra.weight']"]),
        ({"change": cut_one}, ["of another shape: ['model.norm.weight (3,)", "(64,)"]),
        ({"change": quantise}, ["model.norm.weight I8"]),
        ({"part": "vision", "change": make_deeper}, ["unexpected: ['encoder.layers.1.ls1']"]),
        ({"part": "vision", "config": {"model_type": "clip"}}, ["start.vision", "clip"]),
        ({"part": "vision", "config": {"use_mean_pooling": False}}, ["no final norm"]),
        ({"config": {"model_type": "qwen2"}}, ["start.language: model_type", "qwen2"]),
        ({"config": {"architectures": ["MistralForCausalLM"]}}, ["MistralForCausalLM"]),
        ({"config": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}}, ["dynamic"]),
        ({"config": {"hidden_size": None}}, ["start.language", "hidden_size"]),
        ({"config": {"hidden_size": "64"}}, ["hidden_size", "'64'"]),
    ],
)
def test_wrong_directories(make, tmp_path, options, words):
    pattern = ".*".join(map(re.escape, words))
    with pytest.raises(ValueError, match=pattern):
        start_model(edited(make, tmp_path, **options), seed=0)


def without(folder, name):
    (folder / "edited" / name).unlink()


@pytest.mark.parametrize(
    ("name", "left", "words"),
    [
        ("model.safetensors", "pytorch_model.bin", "save_pretrained"),
        ("model.safetensors", "a.txt", "must hold model.safetensors"),
        ("config.json", None, "must hold a config.json"),
        ("tokenizer.json", None, "must hold a tokenizer.json"),
    ],
)
def test_absent_files(make, tmp_path, name, left, words):
    settings = edited(make, tmp_path, files=[left] if left else ())
    without(tmp_path, name)
    with pytest.raises(ValueError, match=words):
        start_model(settings, seed=0)


@pytest.mark.parametrize(
    "named", [{"a": "../x.safetensors"}, {"a": "x.bin"}, {"a": "absent.safetensors"}, {}, []]
)
def test_wrong_indices(make, tmp_path, named):
    settings = edited(make, tmp_path)
    index = tmp_path / "edited" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": named}))
    with pytest.raises(ValueError, match="must name safetensors files beside it"):
        start_model(settings, seed=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"vision": None}, "either checkpoint, or both"),
        ({"checkpoint": "x"}, "either checkpoint, or both"),
        (
            {"checkpoint": "/absent", "vision": None, "language": None},
            "start.checkpoint: there is no directory '/absent'",
        ),
        ({"vision": 3}, "start.vision: must be a path"),
        ({"vision": "/absent"}, "there is no directory '/absent'"),
        ({"tokenizer": "/absent"}, "there is no directory '/absent'"),
        ({"projector": "/absent.safetensors"}, "there is no file"),
        ({"projector": "a.bin"}, "pickle"),
        ({"model": []}, "start.model: must be values by name"),
        ({"model": {"tile_oder": "row"}}, "got 'tile_oder'"),
        ({"model": {"image_token_id": 3}}, "got 'image_token_id'"),
        ({"model": {"tile_order": "diagonal"}}, "tile_order must be one of"),
        ({"model": {"mixin_config": 3}}, "mixin_config must be values by name"),
        ({"model": {"mixin_config": {"heads": 3}}}, "got 'heads'"),
        ({"model": {"mixin_config": {"num_heads": 0}}}, "num_heads"),
        ({"model": {}}, "mixin_every_n_layers"),  # every fourth: the fixture's settings have two
        ({"model": {"force_image_size": 100, **EVERY_TWO}}, "multiple of the patch size 14"),
        ({"model": {"force_image_size": "x", **EVERY_TWO}}, "force_image_size must be a number"),
        ({"model": {"force_image_size": 126, **EVERY_TWO}}, "downsample_ratio"),
    ],
)
def test_wrong_settings(make, given, words):
    settings, _ = make()
    if given == {"model": {}}:
        settings.model = {"mixin_config": {"mixin_every_n_layers": 5}}
    else:
        for name, value in given.items():
            setattr(settings, name, value)
    with pytest.raises(ValueError, match=words):
        start_model(settings, seed=0)


def test_a_projector_of_another_width(make, tmp_path):
    settings, _ = make()
    settings.projector = str(tmp_path / "p.safetensors")
    save_file({"0.weight": torch.zeros(7), "mlp1.1.bias": torch.zeros(64)}, settings.projector)
    with pytest.raises(ValueError, match=r"start\.projector.*missing.*of another shape"):
        start_model(settings, seed=0)
    save_file({"2.weight": torch.zeros(7)}, settings.projector)
    with pytest.raises(ValueError, match=r"keys must be mlp1"):
        start_model(settings, seed=0)


def test_a_projector_that_does_not_fit_begins_anew(make, demo_checkpoint, caplog):
    settings, _ = make()
    settings.vision = str(demo_checkpoint)
    model, _ = start_model(settings, seed=0)
    assert "does not fit" in caplog.text
    norm = model.model.multi_modal_projector[0]
    assert torch.equal(norm.weight, torch.ones(256))
    assert model.config.tokens_per_tile == 256
