"""Published checkpoints: every variant loads, saves bit for bit, and gives clear errors."""

import json
import shutil

import oracle
import pytest
import torch
from conftest import DEVICE
from harness import assert_relative
from published import LLAMA, VARIANTS, published_config, published_weights, write
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoTokenizer

import comemo
import comemo_kernels as ops
from comemo import CoMemoConfig, CoMemoForConditionalGeneration


def example(model, grid=(2, 1)):
    model.config.image_token_id = 7
    tiles = grid[0] * grid[1] + 1
    count = tiles * model.config.tokens_per_tile
    input_ids = torch.cat([torch.tensor([1, 9, 11]), torch.full((count,), 7), torch.arange(20, 26)])
    return {
        "input_ids": input_ids[None],
        "pixel_values": torch.randn(tiles, 3, 56, 56),
        "tile_grid": [grid],
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_round_trips_bit_for_bit(tmp_path, name):
    config = published_config(**VARIANTS[name])
    weights = published_weights(config)
    model = AutoModel.from_pretrained(write(tmp_path / "in", config, weights)).eval()
    assert isinstance(model, CoMemoForConditionalGeneration)
    batch = example(model)
    with torch.no_grad():
        logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    model.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    saved = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        saved |= load_file(shard)
    assert saved.keys() == weights.keys()
    for key, weight in weights.items():
        assert torch.equal(saved[key], weight), key
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    for part in ("llm_config", "vision_config", "mixin_config"):
        for key, value in config[part].items():
            assert written[part].get(key, False) == value, (part, key)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, logits)
    assert again.config.to_diff_dict() == model.config.to_diff_dict()


@pytest.mark.parametrize("order", ["row", "column"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_computes_what_its_weights_say(tmp_path, name, order):
    config = published_config(**VARIANTS[name]) | {"tile_order": order}
    weights = published_weights(config)
    model = AutoModel.from_pretrained(write(tmp_path / "in", config, weights)).eval()
    batch = example(model, grid=(2, 3))
    input_ids, side = batch["input_ids"][0], model.config.side
    image = (input_ids == 7).nonzero()[:, 0]
    ids = torch.empty_like(input_ids)
    ids[: image[0]] = torch.arange(3)
    ids[image] = ops.image_position_ids((2, 3), side, order, bias=3)
    ids[image[-1] + 1 :] = 3 + side**2 + torch.arange(6)
    wanted = oracle.logits(
        {key: weight.double() for key, weight in weights.items()},
        config,
        input_ids,
        ids,
        7,
        batch["pixel_values"].double(),
    )
    with torch.no_grad():
        found = model(**batch).logits[0]
    assert_relative(found, wanted.float())


def test_layouts_of_both_language_models_agree(tmp_path):
    """The same weights under InternLM2's and Llama's names are the same model."""
    config = published_config()
    weights = published_weights(config)
    renamed, head = {}, 8
    for key, weight in weights.items():
        name = key
        for old, new in (
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("attention_norm", "input_layernorm"),
            ("decoder_layer.ffn_norm", "decoder_layer.post_attention_layernorm"),
            ("model.tok_embeddings", "model.embed_tokens"),
            ("language_model.output", "language_model.lm_head"),
        ):
            name = name.replace(old, new) if "gated" not in name else name
        if "wqkv" in name:
            rows = weight.view(2, 4, head, -1)  # kv head, [q, q, k, v]
            parts = (rows[:, :2], rows[:, 2], rows[:, 3])
            for letter, part in zip("qkv", parts, strict=True):
                new = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                renamed[new] = part.reshape(-1, 32).clone()
        else:
            renamed[name] = weight
    llama = published_config(llm=LLAMA | {"rope_theta": 1e6})
    first = AutoModel.from_pretrained(write(tmp_path / "a", config, weights)).eval()
    second = AutoModel.from_pretrained(write(tmp_path / "b", llama, renamed)).eval()
    batch = example(first)
    example(second)
    with torch.no_grad():
        assert torch.equal(first(**batch).logits, second(**batch).logits)


def test_transformers_layout_loads_too(tmp_path, checkpoint, model):
    model.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.language_model.layers.1.mixin.q_proj.weight" in names
    again = AutoModel.from_pretrained(tmp_path).to(DEVICE)
    for (name, ours), theirs in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_model_without_its_head_loads_too(checkpoint, model):
    base = comemo.CoMemoModel.from_pretrained(checkpoint, dtype=torch.float32).to(DEVICE)
    for (name, ours), theirs in zip(
        base.state_dict().items(), model.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert base.config.image_token_id == model.config.image_token_id


def test_recorded_checkpoint_round_trips(tmp_path, checkpoint):
    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path)
    wanted = load_file(checkpoint / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, weight in wanted.items():
        assert found[key].dtype == weight.dtype == torch.bfloat16
        assert torch.equal(found[key], weight), key


def test_quick_start_runs_no_code_of_the_checkpoint(tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "ckpt")
    for name in ("modeling_comemo_chat", "configuration_comemo_chat", "tokenization_internlm2"):
        (tmp_path / "ckpt" / f"{name}.py").write_text("raise SystemExit('code was executed')")
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_comemo_chat.CoMemoChatConfig",
        "AutoModel": "modeling_comemo_chat.CoMemoChatModel",
    }
    (tmp_path / "ckpt" / "config.json").write_text(json.dumps(config))
    path = str(tmp_path / "ckpt")
    model = AutoModel.from_pretrained(
        path, torch_dtype=torch.bfloat16, trust_remote_code=True, low_cpu_mem_usage=True
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=False)
    assert isinstance(model, CoMemoForConditionalGeneration)
    assert model.dtype == torch.bfloat16
    assert isinstance(tokenizer, comemo.InternLM2Tokenizer)
    assert isinstance(AutoConfig.from_pretrained(path), CoMemoConfig)
    answer = model.chat(tokenizer, None, "hi", {"max_new_tokens": 2, "do_sample": False})
    assert isinstance(answer, str)


def test_published_config_gets_published_behaviour(checkpoint):
    config = CoMemoConfig.from_pretrained(checkpoint)
    chosen = (config.tile_order, config.decode_positions, config.ntk_length, config.rope)
    assert chosen == ("column", "raw", "token_count", "dhr")
    new = CoMemoConfig()
    chosen = (new.tile_order, new.decode_positions, new.ntk_length)
    assert chosen == ("row", "compressed", "position")
    again = CoMemoConfig.from_dict(new.to_dict())
    assert again.tile_order == "row"


@pytest.mark.parametrize(
    ("llm", "mixin", "layers"),
    [
        ({}, {}, 24),
        (
            {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
            | {"intermediate_size": 14336},
            {"language_dim": 4096, "vision_dim": 4096, "num_heads": 32, "intermediate_size": 14336},
            32,
        ),
    ],
    ids=["2B", "9B"],
)
def test_published_sizes(llm, mixin, layers):
    base = CoMemoConfig().to_dict()
    config = CoMemoConfig.from_dict(
        base
        | {
            "text_config": None,  # only the published names
            "llm_config": base["llm_config"] | {"head_dim": 128} | llm,
            "mixin_config": base["mixin_config"] | mixin,
        }
    )
    with torch.device("meta"):
        model = CoMemoForConditionalGeneration(config)
    assert config.mixin_layers == tuple(range(3, layers, 4))
    assert config.tokens_per_tile == 256
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx(2.60 if layers == 24 else 9.8, rel=0.06)


# --- errors ---


@pytest.fixture
def directory(tmp_path):
    config = published_config()
    return write(tmp_path / "ckpt", config, published_weights(config))


def change(directory, edit):
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


NORM = "language_model.model.norm.weight"
WQKV = "language_model.model.layers.0.decoder_layer.attention.wqkv.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop(NORM), r"missing_keys: \['model.language_model.norm.weight'\]"),
        (lambda w: w.update(extra=torch.ones(2)), r"unexpected_keys: \['extra'\]"),
        (lambda w: w.update({NORM: torch.ones(5)}), r"mismatched_keys: .*norm.weight.*5.*32"),
        (lambda w: w.update({WQKV: torch.ones(7, 32)}), r"mismatched_keys: .*layers.0.*q_proj.*7"),
    ],
    ids=["missing", "unexpected", "mismatched", "torn"],
)
def test_weights_that_do_not_fit_are_listed(directory, edit, message):
    change(directory, edit)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(directory)


def test_pickles_are_refused(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"must be safetensors, got \['pytorch_model.bin'\]"):
        AutoModel.from_pretrained(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_files_are_named(directory, name):
    (directory / name).unlink()
    with pytest.raises((OSError, ValueError), match=name):
        CoMemoForConditionalGeneration.from_pretrained(directory)


def test_a_missing_shard_is_named(tmp_path, directory):
    AutoModel.from_pretrained(directory).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises((OSError, ValueError), match=shard.name):
        AutoModel.from_pretrained(tmp_path / "out")


def test_a_truncated_file_is_an_error(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors.*not a whole safetensors file"):
        AutoModel.from_pretrained(directory)


def test_a_config_of_another_model_is_refused(directory):
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "internvl_chat"}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="must be 'comemo_chat', got 'internvl_chat'"):
        CoMemoForConditionalGeneration.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top": {"ps_version": "v3"}}, "ps_version must be one of"),
        ({"top": {"tile_order": "spiral"}}, "tile_order must be one of"),
        ({"top": {"select_layer": 9}}, "select_layer 9 is outside the 4 hidden states"),
        ({"mixin": {"vision_dim": 64}}, r"hidden_size 32, got \(32, 64\)"),
        ({"llm": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "got {'type': 'yarn'"),
        ({"llm": {"architectures": ["Qwen2ForCausalLM"]}}, "llm_architecture must be one of"),
        ({"top": {"llm_config": 3}}, "llm_config must be a dictionary, got 3"),
        ({"top": {"vision_config": []}}, r"vision_config must be a dictionary, got \[\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CoMemoConfig.from_dict(published_config(**change))
