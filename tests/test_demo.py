"""The demo, and the checkpoint that it makes."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer

import comemo
from comemo.chat.streamers import TokenClock
from comemo.cli import demo
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


def test_letters_are_the_tiles_places():
    assert demo.cell_letters((2, 1), 4, "row") == ["A A B B"] * 4
    assert demo.cell_letters((2, 2), 4, "row") == ["A A B B"] * 2 + ["C C D D"] * 2
    assert demo.cell_letters((2, 2), 4, "column") == ["A A C C"] * 2 + ["B B D D"] * 2


def run(capsys, *words):
    """The output of the demo without its times."""
    assert cli.main(["demo", *words]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return re.sub(r"\d+\.\d+ s", "", out)


def test_demo_prints_what_the_session_reports(tmp_path, capsys, monkeypatch):
    sessions, seen = [], []
    ask, project = demo.ChatSession.ask, comemo.CoMemoModel.project_images

    def watched(self, question, images=None, **options):
        seen.append(0)
        answer = ask(self, question, images, **options)
        sessions.append((self, self.report, answer))
        return answer

    def counted(self, *inputs):
        seen[-1] += 1
        return project(self, *inputs)

    monkeypatch.setattr(demo.ChatSession, "ask", watched)
    monkeypatch.setattr(comemo.CoMemoModel, "project_images", counted)
    words = ["--tiles", "4", "--tokens", "5", "--keep", str(tmp_path / "kept")]
    out = run(capsys, *words)
    assert "It is not trained" in out
    assert "grid 2 x 2, 5 tiles" in out
    assert "1,280 image tokens" in out
    for _, report, answer in sessions:
        read = f"{report.read_tokens:,} of {report.prompt_tokens:,} prompt tokens read"
        assert f"   A: {answer}\n   {read}, first token after" in out
        assert report.new_tokens == 5
    session, first, _ = sessions[0]
    assert first.read_tokens == first.prompt_tokens > 1280
    second = session.report
    assert second.prompt_tokens - second.read_tokens >= first.prompt_tokens
    assert seen == [1, 0], "no vision tower for the second question"
    memory = session._state.memory
    assert (len(memory), len(memory.keys)) == (1280, 2)
    assert f"1,280 image tokens in 2 mixin layers,\n   {memory.nbytes / 1e6:.1f} MB" in out
    assert "python -m bench decode" in out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 100
    assert (tmp_path / "kept" / "picture.png").is_file()
    assert cli.main(["demo", *words]) == 2
    assert "empty or new directory" in capsys.readouterr().err


def test_demo_with_an_image_of_one_tile_and_one_token(tmp_path, capsys):
    path = tmp_path / "square.png"
    demo.draw_picture(200, 200).save(path)
    words = ["--image", str(path), "--tokens", "1", "--seed"]
    out = run(capsys, *words, "5")
    assert "square.png, 200 x 200 px -> grid 1 x 1, 1 tile" in out
    assert "256 image tokens in 2 mixin layers" in out
    assert run(capsys, *words, "5") == out
    assert run(capsys, *words, "6") != out


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
    clock = TokenClock()
    clock.put(torch.tensor([[1, 2]]))
    clock.put(torch.tensor([3]))
    clock.end()
    assert clock.first >= 0
    assert math.isnan(clock.per_token)
