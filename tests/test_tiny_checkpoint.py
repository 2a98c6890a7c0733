"""The tiny untrained checkpoint that tests and benchmarks use."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer

import comemo
from comemo.cli.tiny_checkpoint import make_checkpoint
from comemo.processing.new_tokenizer import RENAMED_TOKENS
from comemo.tokenizer import ADDED_TOKENS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return demo_checkpoint


def test_checkpoint_is_in_the_published_layout(checkpoint, golden):
    config = json.loads((checkpoint / "config.json").read_text())
    assert {"llm_config", "vision_config", "mixin_config"} <= config.keys()
    ours, published = (comemo_names(path) for path in (checkpoint, golden / "ckpt_a"))
    assert ours == published
    decoder = json.loads((checkpoint / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert all(token["special"] for token in decoder.values())


def comemo_names(directory):
    with safe_open(directory / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_checkpoint_depends_on_the_seed_alone(checkpoint, tmp_path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    make_checkpoint(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    make_checkpoint(tmp_path / "other", seed=1)
    files = sorted(path.name for path in checkpoint.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in files:
        original = (checkpoint / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == original
        if name != "model.safetensors":
            assert (tmp_path / "other" / name).read_bytes() == original
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert weights != (checkpoint / "model.safetensors").read_bytes()


def test_tokenizer_reads_words_and_control_tokens(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert isinstance(tokenizer, comemo.InternLM2Tokenizer)
    text = "the picture, 猫 🐈\n  two"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    for token in (*RENAMED_TOKENS, *ADDED_TOKENS):
        (index,) = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(index) == token
    assert AutoProcessor.from_pretrained(checkpoint).tokens_per_tile == 256


def test_gates_are_open(loaded):
    gates = [p.item() for name, p in loaded[0].named_parameters() if name.endswith("_gate")]
    assert len(gates) == 4
    assert all(gate > 0.4 for gate in gates)
