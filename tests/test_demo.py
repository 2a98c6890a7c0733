"""The demo: what it asks, what it prints, and that this is what was measured."""

import os
import re
import subprocess
import sys
import tempfile

import pytest
from commands import fails, run
from PIL import Image

from comemo.cli import demo, demo_savings, terminal
from comemo.cli.arguments import shipped_checkpoint
from comemo.cli.checkpoints import load_checkpoint
from comemo.images import load_image
from comemo.nano.drawing import draw
from comemo.nano.showing import one_of_each_kind, shown_questions, shown_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def watched(monkeypatch):
    """Every session of the demo with its questions and answers, in order."""
    asked = []
    ask = demo.ChatSession.ask

    def watch(self, question, images=None, **options):
        answer = ask(self, question, images, **options)
        asked.append((self, question, answer, self.report))
        return answer

    monkeypatch.setattr(demo.ChatSession, "ask", watch)
    return asked


def untimed(out, folder):
    """What the demo printed, without times and places."""
    out = re.sub(r" *\d+\.\d+ (s|ms)\b", " TIME", out.replace(str(folder), "DIR"))
    return re.sub(r"DIR/comemo-\w+", "DIR", out)


def test_demo_prints_what_happened(capsys, tmp_path, watched):
    status, out, err = run(capsys, "demo", "--seed", "4", "--keep", tmp_path / "kept")
    assert (status, err) == (0, "")
    scene = shown_scene(4)
    picture = tmp_path / "kept" / "picture-4.png"
    with Image.open(picture) as drawn:
        assert drawn.tobytes() == draw(scene).tobytes()
        size = drawn.size
    pixels, grid = load_image(picture, 64, watched[0][0].model.config.max_dynamic_patch)
    assert f"{picture}\n   {size[0]} x {size[1]} px -> grid {grid[0]} x {grid[1]}" in out
    assert f"{len(pixels)} x 16 = {16 * len(pixels):,} image tokens" in out
    asked = one_of_each_kind(shown_questions(scene))
    session = watched[0][0]
    talk = [one for one in watched if one[0] is session]
    assert [one[1] for one in talk] == [question.text for question in asked]
    right = 0
    for question, (_, text, answer, _) in zip(asked, talk, strict=True):
        good = answer == question.answer
        right += good
        mark = "right" if good else "WRONG"
        assert f"   Q: {text}\n   A: {answer}   (truth: {question.answer}, {mark}, " in out
    assert f"{right} of {len(asked)} right" in out
    first, last = talk[0][3], talk[-1][3]
    assert first.read_tokens == first.prompt_tokens > 16 * len(pixels)
    assert last.read_tokens < 60 < last.prompt_tokens
    assert f"read {first.read_tokens:,} of {first.prompt_tokens:,} prompt tokens" in out
    assert f"The last one read {last.read_tokens:,} of {last.prompt_tokens:,}" in out
    assert re.search(r"without a store +[\d.]+ ms, 4 vision layers run", out)
    assert re.search(r"with it +[\d.]+ ms, 0 vision layers run", out)
    assert re.search(r"reused +[\d.]+ ms a token, +0 computed anew", out)
    assert re.search(rf"rebuilt +[\d.]+ ms a token, +{3 * demo_savings.STEPS} computed anew", out)
    assert not re.search("[\x00-\x09\x0b-\x1f]", out), "no preview without a terminal"
    assert max(map(len, untimed(out, tmp_path).splitlines())) <= 110
    again = run(capsys, "demo", "--seed", "4")
    assert untimed(again[1], tempfile.gettempdir()) == untimed(out, tmp_path / "kept")
    (path,) = re.findall(r"^   (/.*/comemo-.*\.png)$", again[1], re.MULTILINE)
    with Image.open(path) as drawn:
        assert drawn.size == size, "it stays after the demo"
    os.remove(path)
    os.rmdir(os.path.dirname(path))
    assert "File exists" in run(capsys, "demo", "--seed", "4", "--keep", tmp_path / "kept")[2]


def test_savings_are_measured(capsys):
    model, processor = load_checkpoint(shipped_checkpoint())
    tiles = load_image(draw(shown_scene(2)), 64, 12)
    question = "Is there a red star?"
    (reused, none), (rebuilt, builds) = demo_savings.time_tokens(model, processor, question, tiles)
    assert (none, builds) == (0, 3 * demo_savings.STEPS)
    assert reused > 0
    assert rebuilt > 0
    demo_savings.show_store(model, processor, question, tiles)
    assert re.search(r"has its image memory, \d{1,3}(,\d{3})* bytes", capsys.readouterr().out)


def test_an_image_of_ones_own(capsys, tmp_path, watched):
    path = tmp_path / "own.png"
    Image.new("RGB", (300, 300), "white").save(path)
    status, out, err = run(capsys, "demo", "--image", path, "Which shape is it?", "--tiles", "1")
    assert (status, err) == (0, "")
    assert watched[0][1] == "Which shape is it?"
    assert f"   Q: Which shape is it?\n   A: {watched[0][2]}   (" in out
    assert "1. Your picture\n   own.png\n   300 x 300 px -> grid 1 x 1, 1 tile, 1 x 16" in out
    assert "It was taught drawn pictures alone: 7 shapes in 8 colours" in out
    assert "Photographs are beyond it" in out
    assert "truth" not in out
    assert "position ids used: 16; with plain numbering: 16" in out
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--image", "/no/such.png"], "/no/such.png"),
        (["--tiles", "41"], "at most 40"),
        (["--seed", "x"], "got 'x'"),
        ([" "], "the question is empty"),
        (["--image", "a.png", "--seed", "1"], "are for a drawn picture"),
        (["--image", "a.png", "--keep", "kept"], "are for a drawn picture"),
        (["--model", "/no/such"], "no directory '/no/such'"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_mistakes(capsys, argv, said):
    assert said in fails(capsys, "demo", *argv)


def test_somebody_elses_directory_does_not_matter(capsys, tmp_path, monkeypatch):
    """To the demo, which nobody asked for a checkpoint; `chat nano` takes the directory."""
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)

    def load(directory):
        raise ValueError(f"loads {directory}")

    monkeypatch.setattr(demo, "load_checkpoint", load)
    assert f"loads {shipped_checkpoint()}\n" in fails(capsys, "demo")
    assert "holds no config.json" in fails(capsys, "chat", "nano", "a")


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"COLORTERM": "truecolor"}, True),
        ({"COLORTERM": "24bit", "NO_COLOR": ""}, True),
        ({"TERM": "xterm-direct"}, True),
        ({"TERM": "xterm-256color"}, False),
        ({"COLORTERM": "truecolor", "NO_COLOR": "1"}, False),
        ({}, False),
    ],
)
def test_a_preview_needs_colours(capsys, monkeypatch, environment, shown):
    for name in ("COLORTERM", "TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    image = Image.new("RGB", (80, 40), (1, 2, 3))
    image.paste((200, 100, 50), (0, 20, 80, 40))
    demo.show_preview(image, 8)
    assert capsys.readouterr().out == "", "this is not a terminal"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    demo.show_preview(image, 8)
    assert terminal.shows_colours() == shown
    rows = [
        8 * "\x1b[38;2;1;2;3m\x1b[48;2;1;2;3m▀",
        8 * "\x1b[38;2;200;100;50m\x1b[48;2;200;100;50m▀",
    ]
    wanted = "".join(f"   {row}\x1b[0m\n" for row in rows)
    assert capsys.readouterr().out == (wanted if shown else "")


@pytest.mark.slow
def test_demo_as_a_new_user_runs_it(tmp_path):
    ended = subprocess.run(
        [sys.executable, "-m", "comemo", "demo"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert re.search(r"\d of \d right", ended.stdout)
    assert len(list(tmp_path.glob("comemo-*/picture-*.png"))) == 1
