"""Published checkpoints: every variant loads, saves bit for bit, and says what is wrong."""

import json
import shutil

import oracle
import pytest
import torch
from harness import assert_relative
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoTokenizer

import comemo
import comemo_kernels as ops
from comemo import CoMemoConfig, CoMemoForConditionalGeneration

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
}
VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "patch_size": 14,
    "qkv_bias": True,
    "norm_type": "layer_norm",
}
MIXIN = {
    "language_dim": 32,
    "vision_dim": 32,
    "head_dim": 16,
    "num_heads": 3,  # inner width 48: not the language model's
    "intermediate_size": 40,
    "mixin_every_n_layers": 2,
}
INTERNLM2 = {"architectures": ["InternLM2ForCausalLM"], "bias": False, "rope_theta": 1e6}
LLAMA = {"architectures": ["LlamaForCausalLM"], "rope_theta": 1e4}
VARIANTS = {
    "internlm2": {},
    "attention_bias": {"llm": {"bias": True}},
    "many_kv_heads": {"llm": {"num_key_value_heads": 4}},
    "llama": {"llm": LLAMA},
    "llama_bias": {"llm": LLAMA | {"attention_bias": True}},
    "linear_rope": {"llm": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
    "qk_norm": {"vision": {"qk_normalization": True, "layer_norm_eps": 1e-3}},
    "rms_norm": {"vision": {"norm_type": "rms_norm", "qkv_bias": False}},
    "fold_v1": {"top": {"ps_version": "v1", "select_layer": -2}},
    "mixin_every_layer": {"mixin": {"mixin_every_n_layers": 1, "head_dim": 8}},
}


def published_config(llm=None, vision=None, mixin=None, top=None):
    return {
        "model_type": "comemo_chat",
        "architectures": ["CoMemoChatModel"],
        "auto_map": {"AutoModel": "modeling_comemo_chat.CoMemoChatModel"},
        "llm_config": TEXT | INTERNLM2 | (llm or {}),
        "vision_config": VISION | {"image_size": 56} | (vision or {}),
        "mixin_config": MIXIN | (mixin or {}),
        "force_image_size": 56,
        "select_layer": -1,
        "ps_version": "v2",
        "downsample_ratio": 0.5,
        "template": "internlm2-chat",
        "torch_dtype": "float32",
    } | (top or {})


def published_weights(config):
    """Random weights under the published names, written from the layout's description."""
    llm, vision, mixin = (config[f"{part}_config"] for part in ("llm", "vision", "mixin"))
    d, f, h, g = (
        llm[k]
        for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    )
    head = d // h
    shapes = {}
    internlm2 = llm["architectures"] == ["InternLM2ForCausalLM"]
    for i in range(llm["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        own = f"{layer}.decoder_layer"
        if internlm2:
            shapes |= {
                f"{own}.attention.wqkv.weight": ((h + 2 * g) * head, d),
                f"{own}.attention.wo.weight": (d, d),
                f"{own}.feed_forward.w1.weight": (f, d),
                f"{own}.feed_forward.w3.weight": (f, d),
                f"{own}.feed_forward.w2.weight": (d, f),
                f"{own}.attention_norm.weight": (d,),
                f"{own}.ffn_norm.weight": (d,),
            }
            if llm["bias"]:
                shapes[f"{own}.attention.wqkv.bias"] = ((h + 2 * g) * head,)
                shapes[f"{own}.attention.wo.bias"] = (d,)
        else:
            rows = {"q_proj": d, "k_proj": g * head, "v_proj": g * head, "o_proj": d}
            for name, size in rows.items():
                shapes[f"{own}.self_attn.{name}.weight"] = (size, d)
                if llm.get("attention_bias"):
                    shapes[f"{own}.self_attn.{name}.bias"] = (size,)
            shapes |= {
                f"{own}.mlp.gate_proj.weight": (f, d),
                f"{own}.mlp.up_proj.weight": (f, d),
                f"{own}.mlp.down_proj.weight": (d, f),
                f"{own}.input_layernorm.weight": (d,),
                f"{own}.post_attention_layernorm.weight": (d,),
            }
        if (i + 1) % mixin["mixin_every_n_layers"] == 0:
            block = f"{layer}.gated_cross_attn_layer"
            inner, wide = mixin["num_heads"] * mixin["head_dim"], mixin["intermediate_size"]
            shapes |= {
                f"{block}.cross_attention_norm.weight": (d,),
                f"{block}.cross_attn.to_q.weight": (inner, d),
                f"{block}.cross_attn.to_kv.weight": (2 * inner, d),
                f"{block}.cross_attn.to_out.weight": (d, inner),
                f"{block}.attn_gate": (1,),
                f"{block}.ff_gate": (1,),
                f"{block}.ffn_norm_2.weight": (d,),
                f"{block}.ffn_2.w1.weight": (wide, d),
                f"{block}.ffn_2.w3.weight": (wide, d),
                f"{block}.ffn_2.w2.weight": (d, wide),
            }
    embed, head_name = (
        ("model.tok_embeddings", "output") if internlm2 else ("model.embed_tokens", "lm_head")
    )
    shapes |= {
        f"language_model.{embed}.weight": (llm["vocab_size"], d),
        f"language_model.{head_name}.weight": (llm["vocab_size"], d),
        "language_model.model.norm.weight": (d,),
    }
    c, w = vision["hidden_size"], vision["intermediate_size"]
    shapes |= {
        "vision_model.embeddings.class_embedding": (1, 1, c),
        "vision_model.embeddings.position_embedding": (1, 17, c),
        "vision_model.embeddings.patch_embedding.weight": (c, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": (c,),
        "mlp1.0.weight": (4 * c,),
        "mlp1.0.bias": (4 * c,),
        "mlp1.1.weight": (d, 4 * c),
        "mlp1.1.bias": (d,),
        "mlp1.3.weight": (d, d),
        "mlp1.3.bias": (d,),
    }
    for i in range(vision["num_hidden_layers"]):
        layer = f"vision_model.encoder.layers.{i}"
        shapes |= {
            f"{layer}.ls1": (c,),
            f"{layer}.ls2": (c,),
            f"{layer}.attn.qkv.weight": (3 * c, c),
            f"{layer}.attn.proj.weight": (c, c),
            f"{layer}.attn.proj.bias": (c,),
            f"{layer}.norm1.weight": (c,),
            f"{layer}.norm2.weight": (c,),
            f"{layer}.mlp.fc1.weight": (w, c),
            f"{layer}.mlp.fc1.bias": (w,),
            f"{layer}.mlp.fc2.weight": (c, w),
            f"{layer}.mlp.fc2.bias": (c,),
        }
        if vision["qkv_bias"]:
            shapes[f"{layer}.attn.qkv.bias"] = (3 * c,)
        if vision["norm_type"] == "layer_norm":
            shapes |= {f"{layer}.norm1.bias": (c,), f"{layer}.norm2.bias": (c,)}
        if vision.get("qk_normalization"):
            shapes |= {f"{layer}.attn.q_norm.weight": (c,), f"{layer}.attn.k_norm.weight": (c,)}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def write(directory, config, weights):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


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
        *(input_ids, ids, 7),
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


def test_native_layout_loads_too(tmp_path, checkpoint, model):
    model.save_pretrained(tmp_path, save_original_format=False)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "model.language_model.layers.1.mixin.q_proj.weight" in names
    again = AutoModel.from_pretrained(tmp_path)
    for (name, ours), theirs in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_model_without_its_head_loads_too(checkpoint, model):
    base = comemo.CoMemoModel.from_pretrained(checkpoint, dtype=torch.float32)
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
    assert (new.tile_order, new.decode_positions, new.ntk_length) == (
        *("row", "compressed"),
        "position",
    )
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


# --- what is wrong ---


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


def test_sharded_loading_of_the_published_layout_is_refused(directory):
    with pytest.raises(ValueError, match="sharded loading needs our own layout"):
        AutoModel.from_pretrained(directory, tp_plan="auto")


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
        ({"llm": {"rope_scaling": {"type": "yarn", "factor": 2.0}}}, "got 'yarn'"),
        ({"llm": {"architectures": ["Qwen2ForCausalLM"]}}, "llm_architecture must be one of"),
        ({"top": {"llm_config": 3}}, "llm_config must be a dictionary, got 3"),
        ({"top": {"vision_config": []}}, r"vision_config must be a dictionary, got \[\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        CoMemoConfig.from_dict(published_config(**change))
