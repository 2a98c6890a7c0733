"""The command line as its users meet it: output, exit status, one line for what went wrong."""

import io
import json
import re
import shutil
import signal
import sys
import warnings

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import logging

import comemo
from comemo.cli import info, progress
from comemo.cli import main as cli
from comemo.cli.terminal import plain

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return demo_checkpoint


@pytest.fixture(scope="module")
def picture(picture_file):
    return picture_file


def run(capsys, *argv, stdin=None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def fails(capsys, *argv):
    """The one line on stderr."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("comemo: error: ")
    assert err.count("\n") == 1
    return err


def expected(loaded, picture, question, pictures=1, grid=True, **options):
    model, tokenizer = loaded
    pixel_values, chosen = comemo.load_image(picture)
    tiles = len(pixel_values)
    answer = model.chat(
        tokenizer,
        torch.cat([pixel_values] * pictures),
        question,
        {"max_new_tokens": 6, **options},
        num_patches_list=[tiles] * pictures,
        target_aspect_ratio=[chosen] * pictures if grid else None,
    )
    return plain(answer, "\n\t")


def test_help_and_version(capsys):
    assert run(capsys)[:2] == (0, cli._parser().format_help())
    for argv in (["--version"], ["chat", "--help"], ["map", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(argv)
        assert ended.value.code == 0
    assert comemo.__version__ in capsys.readouterr().out


def test_chat_streams_what_chat_returns(capsys, checkpoint, loaded, picture):
    status, out, err = run(capsys, "chat", checkpoint, "What?", "--image", picture, *QUICK)
    assert (status, err) == (0, "")
    assert out == expected(loaded, picture, "What?") + "\n"


def test_question_may_follow_the_options(capsys, checkpoint, loaded, picture):
    _, out, _ = run(capsys, "chat", checkpoint, "--image", picture, *QUICK, "What?")
    assert out == expected(loaded, picture, "What?") + "\n"


def test_every_picture_gets_its_mark(capsys, checkpoint, loaded, picture):
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
    status, out, err = run(
        capsys,
        *("chat", checkpoint, "--image", picture, *QUICK),
        stdin="One?\n\nTwo?\n/new\nOne?\n/quit\nnever asked\n",
        monkeypatch=monkeypatch,
    )
    assert (status, err) == (0, "")
    assert out == plain("\n".join([*wanted, wanted[0]]) + "\n", "\n\t")


def test_a_bad_question_does_not_end_a_conversation(capsys, checkpoint, monkeypatch):
    status, out, err = run(
        capsys,
        *("chat", checkpoint, *QUICK),
        stdin="see <image>\nhello\n",
        monkeypatch=monkeypatch,
    )
    assert status == 2
    assert out.count("\n") == 1
    assert err.splitlines() == [
        "comemo: error: the question must have a <image> mark for each of its 0 images, or none,"
        " got 1"
    ]


def test_a_picture_may_come_later(capsys, checkpoint, loaded, picture, monkeypatch):
    model, _ = loaded
    session = comemo.ChatSession(
        model, comemo.CoMemoProcessor.from_pretrained(checkpoint), max_new_tokens=6
    )
    wanted = [session.ask("One?"), session.ask("Two?", comemo.load_image(picture))]
    wanted += [session.regenerate()]
    session.reset()
    wanted += [session.ask("Three?", comemo.load_image(picture))]
    status, out, err = run(
        capsys,
        *("chat", checkpoint, "--timing", *QUICK),
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
    status, out, err = run(
        capsys,
        *("chat", checkpoint, "--image", picture, "-v", *QUICK),
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


def test_map(capsys, picture, tmp_path):
    status, out, err = run(capsys, "map", picture, "-o", tmp_path / "map.png", "--bias", "20")
    assert (status, out, err) == (0, f"{tmp_path / 'map.png'}\n", "")
    with Image.open(tmp_path / "map.png") as drawn:
        assert drawn.width > 400


def test_info(capsys, checkpoint, loaded):
    status, out, err = run(capsys, "info", checkpoint, "--json")
    facts, model = json.loads(out), loaded[0]
    assert (status, err) == (0, "")
    assert facts == json.loads(json.dumps(info.describe_checkpoint(checkpoint)))
    assert facts["total"]["parameters"] == model.num_parameters()
    assert facts["total"]["bytes"] == 4 * model.num_parameters()
    layers = model.model.language_model.layers
    mixins = sum(p.numel() for layer in layers if layer.mixin for p in layer.mixin.parameters())
    assert facts["parts"]["mixin layers"]["parameters"] == mixins
    tower = sum(p.numel() for p in model.model.vision_tower.parameters())
    assert facts["parts"]["vision tower"]["parameters"] == tower
    assert facts["mixin"]["before_layers"] == [2, 4]
    assert facts["memory_bytes_per_tile"]["float32"] == 2 * 2 * 4 * 64 * 256 * 4
    _, out, _ = run(capsys, "info", checkpoint)
    assert f"{model.num_parameters():,}" in out
    assert max(map(len, out.splitlines()[1:])) <= 100


def test_info_of_a_published_checkpoint(capsys, golden):
    facts = info.describe_checkpoint(golden / "ckpt_a")
    assert set(facts["parts"]) == set(info.PARTS)
    assert facts["total"]["dtypes"] == ["BF16"]
    assert facts["total"]["bytes"] == 2 * facts["total"]["parameters"]
    assert (facts["tile_order"], facts["decode_positions"]) == ("column", "raw")


def test_info_of_our_own_layout(tmp_path, loaded, checkpoint):
    loaded[0].save_pretrained(tmp_path, save_original_format=False)
    assert (
        info.describe_checkpoint(tmp_path)["parts"] == info.describe_checkpoint(checkpoint)["parts"]
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["chat"], "MODEL"),
        (["sing"], "invalid choice: 'sing'"),
        (["chat", "M", "a", "b"], "unrecognized arguments: b"),
        (["chat", "M", "a", "--colour"], "--colour"),
        (["chat", "M", " "], "empty"),
        (["chat", "/no/such", "a"], "no directory '/no/such'"),
        (["info", "/no/such"], "no directory '/no/such'"),
        (["chat", "M", "a", "--max-new-tokens", "0"], "at least 1 and at most 1,000,000, got '0'"),
        (["chat", "M", "a", "--max-new-tokens", "many"], "got 'many'"),
        (["chat", "M", "a", "--top-p", "1.5"], "at most 1, got '1.5'"),
        (["chat", "M", "a", "--temperature", "nan"], "got 'nan'"),
        (["chat", "M", "a", "--max-tiles", "5000"], "5000"),
        (["chat", "M", "a", "--rope", "square"], "invalid choice: 'square'"),
        (["chat", "M", "a", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["map", "/no/such.png", "-o", "map.png"], "/no/such.png"),
        (["map", "/no/such.png"], "-o"),
        (["map", "a.png", "-o", "a.png", "--bias", "-1"], "--bias"),
        (["demo", "--image", "/no/such.png"], "/no/such.png"),
        (["demo", "--tiles", "41"], "at most 40"),
    ],
)
def test_mistakes_on_the_command_line(capsys, argv, said):
    assert said in fails(capsys, *argv)


def test_mistakes_with_files(capsys, checkpoint, picture, tmp_path):
    for path, said in (
        (tmp_path / "no.png", "No such file"),
        (tmp_path, "picture file"),
        (checkpoint / "config.json", "not a picture"),
    ):
        assert said in fails(capsys, "chat", checkpoint, "a", "--image", path)
    assert "no config.json" in fails(capsys, "chat", tmp_path, "a")
    assert "no device 'abacus'" in fails(capsys, "chat", checkpoint, "a", "--device", "abacus")
    assert ".png" in fails(capsys, "map", picture, "-o", tmp_path / "map.jpg")


def broken(checkpoint, tmp_path, name, content=None):
    """A copy without one file, or with other bytes in it."""
    copy = tmp_path / "broken"
    shutil.copytree(checkpoint, copy)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", b"{", "JSON"),
        ("config.json", b'{"model_type": "llama"}', "another model"),
        ("config.json", b'{"model_type": "comemo_chat", "tile_order": "zigzag"}', "zigzag"),
        ("config.json", b"[]", "another model"),
        ("tokenizer.model", None, "tokenizer.model"),
        ("tokenizer.model", b"no model", "wanted a sentencepiece model"),
        ("tokenizer_config.json", None, "has no tokenizer_config.json"),
        ("model.safetensors", None, "safetensors"),
        ("model.safetensors", b"no weights", "model.safetensors"),
    ],
)
def test_broken_checkpoints(capsys, checkpoint, tmp_path, name, content, said):
    copy = broken(checkpoint, tmp_path, name, content)
    assert said in fails(capsys, "chat", copy, "a", *QUICK)
    if not name.startswith("tokenizer"):
        assert said in fails(capsys, "info", copy)


def test_missing_weights_are_named(capsys, checkpoint, tmp_path):
    copy = broken(checkpoint, tmp_path, "generation_config.json")
    weights = load_file(copy / "model.safetensors")
    del weights["mlp1.1.bias"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert "multi_modal_projector.1.bias" in fails(capsys, "chat", copy, "a", *QUICK)


def test_debug_shows_the_traceback(capsys):
    status, _, err = run(capsys, "chat", "/no/such", "a", "--debug")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("comemo: error: ")


def test_settings_of_the_libraries_come_back(capsys, checkpoint):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled(), list(warnings.filters)
    run(capsys, "info", checkpoint)
    fails(capsys, "info", "/no/such")
    assert before == (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        list(warnings.filters),
    )
