"""Tiny vision towers, language models and tokenizers in the layouts that training begins with."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import make_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from comemo.train.settings import StartSettings

VISION = ("intern_vit", "internvl_chat", "internvl", "internvl_vision", "comemo")
LANGUAGE = ("internlm2", "llama", "llama_tied", "internlm2_in_internvl", "llama_in_internvl")
ARCHITECTURES = {"internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM"}
CONTROL = ("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>")
CONTROL += ("<box>", "</box>")
EVERY_TWO = {"mixin_config": {"mixin_every_n_layers": 2}}
SIZES = {"internlm2": (440, 440), "llama": (300, 270)}  # rows of the model, tokens of the tokenizer


def make_source(kind, vocab_size):
    """A model whose parts the directories hold."""
    return make_model(architectures=[ARCHITECTURES[kind]], vocab_size=vocab_size).cpu()


def published(model, folder):
    """Names and weights, and the config, as published."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]
    return load_file(folder / "model.safetensors"), config


def write(folder, weights, config):
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def whole_internvl(model, folder, kind="llama"):
    """A whole InternVL in the published layout."""
    weights, config = published(model, folder)
    names = {n: n.replace(".decoder_layer.", ".") for n in weights if "gated_cross" not in n}
    del config["mixin_config"]
    config |= {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling_planted.Planted"}}
    (folder / "modeling_planted.py").write_text("raise SystemExit('code was run')")
    return write(folder, {new: weights[old] for old, new in names.items()}, config)


def make_vision(layout, model, folder):
    """The vision tower of a model in a directory; returns its path."""
    if layout == "comemo":
        model.save_pretrained(folder)
        return str(folder)
    if layout == "internvl_chat":
        return whole_internvl(model, folder)
    if layout == "internvl_vision":
        model.model.vision_tower.save_pretrained(folder)
        return str(folder)
    if layout == "internvl":
        text = LlamaConfig(**llama_settings(model)).to_dict()
        vision = model.config.vision_config.to_dict()
        other = InternVLForConditionalGeneration(
            InternVLConfig(vision_config=vision, text_config=text)
        )
        other.model.vision_tower.load_state_dict(model.model.vision_tower.state_dict())
        ours = model.model.multi_modal_projector.state_dict()
        names = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
        other.model.multi_modal_projector.load_state_dict(
            {re.sub(r"^\d", lambda found: names[found[0]], n): w for n, w in ours.items()}
        )
        other.save_pretrained(folder)
        return str(folder)
    weights, config = published(model, folder)
    weights = {
        n.removeprefix("vision_model."): w for n, w in weights.items() if n.startswith("vision")
    }
    return write(folder, weights, config["vision_config"])


def llama_settings(model, tied=False):
    text = model.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "rope_parameters", "pad_token_id")
    return {name: getattr(text, name) for name in names} | {"tie_word_embeddings": tied}


def make_language(layout, model, folder):
    """The language model of a model in a directory; returns its path."""
    if layout.endswith("_in_internvl"):
        return whole_internvl(model, folder)
    if layout.startswith("llama"):
        other = LlamaForCausalLM(LlamaConfig(**llama_settings(model, layout == "llama_tied")))
        weights = {
            "model." + name: weight
            for name, weight in model.model.language_model.state_dict().items()
            if ".mixin." not in name
        }
        if layout == "llama":
            weights["lm_head.weight"] = model.lm_head.weight
        other.load_state_dict(weights, strict=layout == "llama")
        other.save_pretrained(folder)
        return str(folder)
    weights, config = published(model, folder)
    weights = {
        n.removeprefix("language_model.").replace(".decoder_layer.", "."): w
        for n, w in weights.items()
        if n.startswith("language_model.") and "gated_cross" not in n
    }
    return write(folder, weights, config["llm_config"] | {"model_type": "internlm2"})


def add_sentencepiece(directory, demo_checkpoint, bare):
    """The tokenizer of the demo; `bare` without the tokens that its model added."""
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        shutil.copy(demo_checkpoint / name, directory)
    if bare:
        (directory / "added_tokens.json").unlink()
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text())
        added = config["added_tokens_decoder"].items()
        config["added_tokens_decoder"] = {i: t for i, t in added if t["content"] not in CONTROL}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if key in config:
                config[key] = [name for name in config[key] if name not in CONTROL]
        path.write_text(json.dumps(config))


def add_byte_level(directory, bare):
    """A tokenizer.json of a Llama with 270 tokens; `bare` without control tokens of images."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", *(() if bare else ("<|im_start|>", "<|im_end|>", *CONTROL))]
    trainer = trainers.BpeTrainer(
        vocab_size=270,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the boat is on the water and the sea is calm"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=special
    ).save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    planted = {"auto_map": {"AutoTokenizer": ["tokenization_planted.Planted", None]}}
    planted["chat_template"] = "{{ 'of the language model' }}"
    path.write_text(json.dumps(json.loads(path.read_text()) | planted))
    (directory / "tokenization_planted.py").write_text("raise SystemExit('code was run')")


def add_llama_pieces(directory, demo_checkpoint):
    """The sentencepiece model of the demo as the tokenizer of a Llama, without a tokenizer.json."""
    shutil.copy(demo_checkpoint / "tokenizer.model", directory)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": "<unk>"}))


def assert_same(ours, theirs, names=None):
    """Compare weights by name."""
    names = ours.keys() if names is None else names
    different = [name for name in names if not torch.equal(ours[name], theirs[name])]
    assert different == []


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
