"""`comemo chat` as users see it."""

import io
import re
import shutil
import signal
import sys

import pytest
import torch
from commands import QUICK, expected, fails, run
from PIL import Image

import comemo
from comemo.cli import main as cli
from comemo.cli import progress
from comemo.cli.terminal import plain

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return demo_checkpoint


@pytest.fixture(scope="module")
def picture(picture_file):
    return picture_file


def test_chat_streams_what_chat_returns(capsys, checkpoint, loaded, picture):
    status, out, err = run(capsys, "chat", checkpoint, "What?", "--image", picture, *QUICK)
    assert (status, err) == (0, "")
    assert out == expected(loaded, picture, "What?") + "\n"


def test_question_may_follow_the_options(capsys, checkpoint, loaded, picture):
    _, out, _ = run(capsys, "chat", checkpoint, "--image", picture, *QUICK, "What?")
    assert out == expected(loaded, picture, "What?") + "\n"


def test_every_image_gets_its_mark(capsys, checkpoint, loaded, picture):
    two = ["--image", picture, "--image", picture]
    _, out, _ = run(capsys, "chat", checkpoint, "Same?", *two, *QUICK)
    assert out == expected(loaded, picture, "<image>\n<image>\nSame?", 2) + "\n"
    _, out, _ = run(capsys, "chat", checkpoint, "Is <image> like <image>?", *two, *QUICK)
    assert out == expected(loaded, picture, "Is <image> like <image>?", 2) + "\n"
    assert "a <image> mark for each of its 2 images, or none, got 3" in fails(
        capsys, "chat", checkpoint, "<image>" * 3, *two, *QUICK
    )


def test_options_reach_the_model(capsys, checkpoint, picture, monkeypatch):
    seen = {}

    def ask(self, question, images, *, streamer):
        seen.update(self.options, dtype=self.model.dtype, tiles=len(images[0][0]))
        seen.update(said=self._state.conversation, streamer=streamer)
        return "answer"

    monkeypatch.setattr(comemo.ChatSession, "ask", ask)
    wide = picture.with_name("wide.png")
    Image.new("RGB", (900, 300)).save(wide)
    argv = ["chat", checkpoint, "What?", "--image", wide, "--max-tiles", "3"]
    argv += ["--system", "Be brief"]
    argv += ["--rope", "original", "--dtype", "bfloat16", "--num-beams", "3", "--top-k", "5"]
    argv += ["--temperature", "0.5", "--repetition-penalty", "1.5"]
    status, out, _ = run(capsys, *argv)
    assert (status, out) == (0, "answer\n")
    assert seen["streamer"] is None
    assert (seen["said"].system_message, seen["said"].rope) == ("Be brief", "original")
    assert (seen["dtype"], seen["do_sample"], seen["temperature"]) == (torch.bfloat16, True, 0.5)
    assert (seen["num_beams"], seen["top_k"], seen["repetition_penalty"]) == (3, 5, 1.5)
    assert (seen["max_new_tokens"], seen["tiles"]) == (512, 4)


def test_original_rope(capsys, checkpoint, loaded, picture):
    words = ["--image", picture, "--rope", "original", *QUICK]
    _, out, _ = run(capsys, "chat", checkpoint, "What?", *words)
    assert out == expected(loaded, picture, "What?", grid=False) + "\n"


def test_beams_print_at_the_end(capsys, checkpoint, loaded, picture):
    _, out, _ = run(
        capsys, "chat", checkpoint, "What?", "--image", picture, "--num-beams", "2", *QUICK
    )
    assert out == expected(loaded, picture, "What?", num_beams=2) + "\n"


def test_a_seed_repeats(capsys, checkpoint):
    words = ["chat", checkpoint, "hello", "--sample", "--seed", "7", *QUICK]
    first, again = run(capsys, *words), run(capsys, *words)
    assert first == again
    assert first[0] == 0


def test_conversation_from_a_pipe(capsys, checkpoint, loaded, picture, monkeypatch):
    model, tokenizer = loaded
    pixel_values, grid = comemo.load_image(picture)
    history, wanted = None, []
    for question in ("One?", "Two?"):
        answer, history = model.chat(
            tokenizer,
            pixel_values,
            question,
            {"max_new_tokens": 6},
            history=history,
            return_history=True,
            target_aspect_ratio=grid,
        )
        wanted.append(answer)
    argv = ["chat", checkpoint, "--image", picture, *QUICK]
    status, out, err = run(
        capsys,
        *argv,
        stdin="One?\n\nTwo?\n/new\nOne?\n/quit\nnever asked\n",
        monkeypatch=monkeypatch,
    )
    assert (status, err) == (0, "")
    assert out == plain("\n".join([*wanted, wanted[0]]) + "\n", "\n\t")


def test_a_bad_question_does_not_end_a_conversation(capsys, checkpoint, monkeypatch):
    argv = ["chat", checkpoint, *QUICK]
    status, out, err = run(
        capsys,
        *argv,
        stdin="see <image>\nhello\n",
        monkeypatch=monkeypatch,
    )
    assert status == 2
    assert out.count("\n") == 1
    assert err.splitlines() == [
        "comemo: error: the question must have a <image> mark for each of its 0 images, or none,"
        " got 1"
    ]


def test_an_image_may_come_later(capsys, checkpoint, loaded, picture, monkeypatch):
    model, _ = loaded
    session = comemo.ChatSession(
        model, comemo.CoMemoProcessor.from_pretrained(checkpoint), max_new_tokens=6
    )
    wanted = [session.ask("One?"), session.ask("Two?", comemo.load_image(picture))]
    wanted += [session.regenerate()]
    session.reset()
    wanted += [session.ask("Three?", comemo.load_image(picture))]
    argv = ["chat", checkpoint, "--timing", *QUICK]
    status, out, err = run(
        capsys,
        *argv,
        stdin=f"One?\n/image nowhere.png\n/image {picture}\nTwo?\n/again\n/new\nThree?\n",
        monkeypatch=monkeypatch,
    )
    assert status == 2
    assert out.splitlines() == list(map(plain, wanted))
    lines = err.splitlines()
    assert lines.pop(1).startswith("comemo: error: No such file or directory: 'nowhere.png'")
    for line, report in zip(lines, ["tokens read"] * 4, strict=True):
        assert report in line
        assert re.search(r"first token after \d+\.\d\d s, then \d+\.\d tokens/s\]$", line), line
    assert lines[2].startswith("[1 of ")


def test_threads(capsys, checkpoint):
    before = torch.get_num_threads()
    try:
        assert run(capsys, "chat", checkpoint, "a", "--threads", "2", *QUICK)[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_ctrl_c_stops_one_answer(capsys, checkpoint, loaded, picture, monkeypatch):
    put, calls = progress.AnswerStreamer.put, []

    def interrupt_once(self, value):
        calls.append(value)
        put(self, value)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.AnswerStreamer, "put", interrupt_once)
    argv = ["chat", checkpoint, "--image", picture, "-v", *QUICK]
    status, out, err = run(
        capsys,
        *argv,
        stdin="Stop me\nWhat?\n",
        monkeypatch=monkeypatch,
    )
    assert status == 0
    assert out.splitlines()[-1] == expected(loaded, picture, "What?")
    assert "stopped" in err


def test_ctrl_c_ends_a_single_question_quietly(capsys, checkpoint, monkeypatch):
    def interrupt(self, value):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.AnswerStreamer, "put", interrupt)
    assert run(capsys, "chat", checkpoint, "hello", *QUICK) == (130, "", "")


def test_at_a_terminal_an_empty_line_ends(capsys, checkpoint, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("hello\n\nnever asked\n"))
    status = cli.main(["chat", str(checkpoint), *QUICK])
    out, err = capsys.readouterr()
    assert (status, out.count("\n"), err) == (0, 1, "> > ")


def test_a_generation_config_may_say_nothing(capsys, demo_checkpoint, tmp_path):
    """Published checkpoints have one that names a version of transformers alone."""
    copy = tmp_path / "checkpoint"
    shutil.copytree(demo_checkpoint, copy)
    (copy / "generation_config.json").write_text('{"transformers_version": "4.37.2"}')
    assert cli.main(["chat", str(copy), "hello", *QUICK]) == 0
