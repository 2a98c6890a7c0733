"""The demonstration, the checkpoint it makes, and the memory it compares with."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

import comemo
import comemo_kernels as ops
from comemo.cli import demo, progress
from comemo.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return demo_checkpoint


@pytest.fixture(scope="module")
def model(loaded):
    return loaded[0]


def test_checkpoint_is_in_the_published_layout(checkpoint, golden):
    config = json.loads((checkpoint / "config.json").read_text())
    assert {"llm_config", "vision_config", "mixin_config"} <= config.keys()
    ours, published = (comemo_names(path) for path in (checkpoint, golden / "ckpt_a"))
    assert ours == published
    decoder = json.loads((checkpoint / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert all(token["special"] for token in decoder.values())


def comemo_names(directory):
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_checkpoint_depends_on_the_seed_alone(checkpoint, tmp_path):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    demo.make_checkpoint(tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    demo.make_checkpoint(tmp_path / "other", seed=1)
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
    for token in (*demo.RENAMED_TOKENS, *demo.ADDED_TOKENS):
        (index,) = tokenizer(token, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(index) == token
    assert AutoProcessor.from_pretrained(checkpoint).tokens_per_tile == 256


def test_gates_are_open(model):
    gates = [p.item() for name, p in model.named_parameters() if name.endswith("_gate")]
    assert len(gates) == 4
    assert all(gate > 0.4 for gate in gates)


def test_both_memories_give_the_same_tokens(checkpoint, model):
    processor = AutoProcessor.from_pretrained(checkpoint)
    inputs = processor(images=demo.draw_picture(900, 500), text="<image>\nwhat is it?", max_num=2)
    ids, core = inputs["input_ids"], model.model
    mask = core.find_image_tokens(ids)
    grid = inputs["tile_grid"]
    positions = core.prompt_position_ids(mask, torch.ones_like(ids), grid)
    with torch.no_grad():
        memory = core.build_image_memory(inputs["pixel_values"], mask, positions)
    rebuilt = demo.RecomputedMemory.of(memory)
    mixins = [layer.mixin for layer in core.language_model.layers if layer.mixin is not None]
    options = {"tile_grid": grid, "max_new_tokens": 8, "min_new_tokens": 8}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    with (
        progress.count_calls([ops], "build_memory") as whole,
        progress.count_calls(mixins, "build") as built,
    ):
        kept = model.generate(ids, image_memory=memory, **options)
        assert (whole, built) == ([1], [0])
        again = model.generate(ids, image_memory=rebuilt, **options)
        assert (whole, built) == ([1], [2 * 8])
    assert torch.equal(kept.sequences, again.sequences)
    for ours, theirs in zip(kept.logits, again.logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert memory.nbytes == 2 * 2 * 3 * 256 * 4 * 64 * 4
    assert (rebuilt.nbytes, len(rebuilt)) == (0, len(memory))
    assert "build" not in vars(mixins[0])
    with pytest.raises(ValueError, match="media"):
        demo.RecomputedMemory.of(replace(memory, media=None))


def test_letters_are_the_tiles_places():
    assert demo.cell_letters((2, 1), 4, "row") == ["A A B B"] * 4
    assert demo.cell_letters((2, 2), 4, "row") == ["A A B B"] * 2 + ["C C D D"] * 2
    assert demo.cell_letters((2, 2), 4, "column") == ["A A C C"] * 2 + ["B B D D"] * 2


def test_demo_shows_the_whole_way(tmp_path, capsys):
    words = ["demo", "--tiles", "4", "--tokens", "5", "--keep", str(tmp_path / "kept")]
    assert cli.main(words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Nothing is trained" in out
    assert "grid 2 x 2, 5 tiles" in out
    assert "1,280 image tokens" in out
    assert re.search(r"kept in the memory +2 ", out)
    assert re.search(r"built anew, as published +10 ", out)
    assert "the same 5 tokens: yes" in out
    assert "vision tower run 0 times, keys and values built 0 times" in out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    assert (tmp_path / "kept" / "picture.png").is_file()
    assert cli.main(words) == 2
    assert "empty or new directory" in capsys.readouterr().err


def test_demo_with_a_picture_of_one_tile_and_one_token(tmp_path, capsys):
    path = tmp_path / "square.png"
    demo.draw_picture(200, 200).save(path)
    assert cli.main(["demo", "--image", str(path), "--tokens", "1", "--seed", "5"]) == 0
    out = capsys.readouterr().out
    assert "square.png, 200 x 200 px -> grid 1 x 1, 1 tile" in out
    assert "the same 1 tokens: yes" in out


@pytest.mark.slow
def test_demo_as_a_new_user_runs_it():
    ended = subprocess.run(
        [sys.executable, "-m", "comemo", "demo", "--tokens", "4"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "3,328 image tokens" in ended.stdout


def test_clock_of_a_single_token():
    clock = progress.TokenClock()
    clock.put(torch.tensor([[1, 2]]))
    clock.put(torch.tensor([3]))
    clock.end()
    assert clock.first >= 0
    assert math.isnan(clock.per_token)
