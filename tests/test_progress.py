"""Progress bars and streamed answers."""

import io
import math
import threading

import pytest
import torch
from conftest import DEVICE

import comemo
from comemo.chat.streamers import TokenClock
from comemo.cli import progress

pytestmark = pytest.mark.usefixtures("one_thread")


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_go_even_on_an_error(loaded):
    model = loaded[0]
    before = hooks(model)

    def fail():
        with progress.reading_bar(model, 1):
            assert hooks(model) == before + 2 + 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert hooks(model) == before


def test_bar_counts_its_own_thread_only(loaded, picture_file, capsys):
    model, tokenizer = loaded
    pixel_values, grid = comemo.load_image(picture_file)

    def chat():
        model.chat(tokenizer, pixel_values, "a", {"max_new_tokens": 3}, target_aspect_ratio=grid)

    with progress.reading_bar(model, 1) as bar:
        assert bar.state() == ("encoding the images", 0, 2)
        other = threading.Thread(target=chat)
        other.start()
        other.join()
        assert bar.calls == {"vision": 0, "text": 0}
        chat()
        assert bar.calls["vision"] == 2
        assert bar.state()[0] == "writing"
        assert bar.calls["text"] % 4 == 0
    assert capsys.readouterr().err == ""


def test_bar_knows_of_rounds(loaded, capsys):
    """More tiles than `tiles_at_once` pass the vision tower in several rounds."""
    model = loaded[0]
    tiles = torch.zeros(5, 3, 448, 448, device=DEVICE)
    model.config.tiles_at_once, before = 2, model.config.tiles_at_once
    try:
        with progress.reading_bar(model, 5) as bar, torch.no_grad():
            assert bar.state() == ("encoding the images", 0, 6)
            model.model.project_images(tiles)
            assert bar.calls["vision"] == 6
            assert bar.state()[0] == "reading the prompt"
    finally:
        model.config.tiles_at_once = before


def test_bar_shows_after_its_delay_if_forced(loaded, capsys):
    model = loaded[0]
    for delay, shown in ((0.0, True), (60.0, False)):
        with progress.reading_bar(model, 1, delay=delay, force=True) as bar:
            for _ in range(100):
                if not shown or "encoding the images" in capsys.readouterr().err:
                    break
                bar._closed.wait(0.05)
            else:
                pytest.fail("no bar")
            bar.close()
            bar.close()
    assert "seeing" not in capsys.readouterr().err


class Letters:
    """A tokenizer whose ids are bytes."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", "replace").replace(" n't", "n't")


@pytest.mark.parametrize(
    "text",
    [
        "Two words",
        "  indented\n\n    - a list\n    - of two\n",
        "图中有一只猫。It is 黑色 🐈.",
        "I do n't know",
        "the end<|im_end|> and more",
        "https://example.org/" + 60 * "a" + "<|im_end|>",
        "",
    ],
)
def test_streamed_text_is_the_answer(text):
    out, started = io.StringIO(), []
    streamer = progress.AnswerStreamer(
        Letters(), "<|im_end|>", out, before=lambda: started.append(out.getvalue())
    )
    streamer.put(torch.tensor([[1]]))
    wanted = text.split("<|im_end|>")[0].strip().replace(" n't", "n't")
    for byte in text.encode():
        streamer.put(torch.tensor([byte]))
        assert wanted.startswith(out.getvalue())
    streamer.end()
    assert out.getvalue() == wanted + "\n"
    assert started == [""]


def test_answers_cannot_steer_a_terminal():
    """Nor a program that reads them from a pipe."""
    out = io.StringIO()
    streamer = progress.AnswerStreamer(Letters(), "<|im_end|>", out)
    streamer.extend_to("\x1b[2J\tx\n\x9b\r\u202e\ud800")
    assert out.getvalue() == r"\x1b[2J" + "\tx\n" + r"\x9b\x0d\u202e\ud800"


def test_a_long_word_comes_before_its_end():
    out = io.StringIO()
    streamer = progress.AnswerStreamer(Letters(), "<|im_end|>", out)
    for value in ([[1]], list(b"a" * 100)):
        streamer.put(torch.tensor(value))
    assert len(out.getvalue()) > 50


def test_clock_of_a_single_token():
    clock = TokenClock()
    clock.put(torch.tensor([[1, 2]]))
    clock.put(torch.tensor([3]))
    clock.end()
    assert clock.first >= 0
    assert math.isnan(clock.per_token)
