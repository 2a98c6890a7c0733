"""`comemo look`: words, colours, the sheet, and the command."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import fails, run
from nano_words import load
from PIL import Image

from comemo import nano
from comemo.cli import main as cli
from comemo.look import sheet
from comemo.look.asking import Look
from comemo.look.colours import VIRIDIS, on_grey, paint_heat
from comemo.look.picture import PictureHeat
from comemo.look.sheet import draw_look
from comemo.look.words import Word, split_words

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("the command chooses the device by itself"),
]
ROOT = Path(__file__).parents[1]
KEPT = ROOT / "docs" / "images" / "look.png"
STOP = "<|im_end|>"


class Pieces:
    """A tokenizer whose tokens are bytes of text."""

    def __init__(self, *pieces):
        self.pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]

    def decode(self, tokens, skip_special_tokens):
        assert skip_special_tokens
        return b"".join(self.pieces[token] for token in tokens).decode(errors="replace")


def words_of(*pieces):
    return split_words(Pieces(*pieces), torch.arange(len(pieces)), STOP)


def test_words_begin_with_a_space():
    assert words_of("a", " pur", "ple", " cir", "cle", ",", " ", "one", STOP) == [
        Word("a", (0,)),
        Word("purple", (1, 2)),
        Word("circle,", (3, 4, 5)),
        Word("one", (6, 7)),
    ]
    assert words_of("one", "\n", "two", " ...", " -", "3", ' "', "x", '"') == [
        Word("one", (0,)),
        Word("two ...", (1, 2, 3)),
        Word("-3", (4, 5)),
        Word('"x"', (6, 7, 8)),
    ]
    assert words_of(STOP) == words_of("", " ", STOP) == words_of() == []


def test_wide_characters_and_bytes_of_one():
    fox = "狐".encode()
    assert words_of("红", "色", "。", fox[:1], fox[1:2], fox[2:], "é".encode()[:1]) == [
        Word("红", (0,)),
        Word("色。", (1, 2)),
        Word("狐", (3, 4, 5)),
    ]


def test_words_of_a_real_tokenizer():
    tokenizer = load()[1].tokenizer
    text = "a purple circle, an orange star and the number 48"
    tokens = torch.tensor(tokenizer.encode(text + STOP, add_special_tokens=False))
    words = split_words(tokenizer, tokens, STOP)
    assert [word.text for word in words] == text.split()
    held = [token for word in words for token in word.tokens]
    assert held == list(range(len(held)))
    assert len(tokens) - len(held) in (1, 2)  # the stop token


def lightness(colour):
    """CIE L*, of sRGB."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour / 255]
    y = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
    return 116 * y ** (1 / 3) - 16


def test_the_scale_is_even_in_grey_too():
    """Its lightness ascends in nearly equal steps, so that hues are not needed to read it."""
    steps = np.diff([lightness(np.array(colour, float)) for colour in VIRIDIS])
    assert steps.min() > 0.75 * steps.mean()
    assert steps.max() < 1.25 * steps.mean()


def test_heat_is_painted_where_it_is():
    cells = torch.zeros(3, 5)
    cells[1, 3] = 2
    picture = Image.new("RGB", (105, 63), "grey")  # cells of 21 pixels
    painted = np.asarray(paint_heat(picture, cells, 2.0), int)
    legend = np.asarray(on_grey(np.array([[0.0, 1.0]]), np.full((1, 2), 128.0)), int)[0]
    assert np.abs(painted[31, 73] - legend[1]).max() <= 1
    assert np.abs(painted[5, 10] - legend[0]).max() <= 1
    assert np.abs(painted[60, 95] - legend[0]).max() <= 1
    dark, light = (
        np.asarray(paint_heat(Image.new("RGB", (9, 9), colour), cells, 2.0, (50, 30)), int)
        for colour in ("black", "white")
    )
    assert dark.shape == (30, 50, 3)
    assert (light - dark).min() > 40  # the picture shows through
    for wrong in ((torch.zeros(3), 1.0), (torch.zeros(0, 3), 1.0), (cells, 0.0)):
        with pytest.raises(ValueError, match="paint_heat: cells must be"):
            paint_heat(picture, *wrong)


def made_up(words, height=2, width=3):
    """A look with one hot cell for each word."""
    tiles = torch.zeros(words, height, width)
    for index in range(words):
        tiles[index].view(-1)[index % (height * width)] = 1
    heat = PictureHeat(tiles, tiles, torch.zeros_like(tiles))
    even = torch.full((height, width), 1 / 6)
    whole = PictureHeat(*(t.mean(0) for t in heat))
    whole = whole if words else PictureHeat(even, even, torch.zeros_like(even))
    named = [Word(f"word{index}", (index,)) for index in range(words)]
    text = " ".join(word.text for word in named)
    return Look("What?", text, named, (1,), (0.5,), torch.zeros(1, words, 6), heat, whole)


@pytest.fixture
def told(monkeypatch):
    """Texts that are drawn."""
    texts = []
    draw = sheet.ImageDraw.ImageDraw.text

    def see(self, place, text, *rest, **more):
        texts.append(text)
        draw(self, place, text, *rest, **more)

    monkeypatch.setattr(sheet.ImageDraw.ImageDraw, "text", see)
    return texts


@pytest.mark.parametrize("size", [(300, 200), (90, 900), (900, 30)])
@pytest.mark.parametrize("words", [0, 3, 30])
def test_every_word_has_its_map(words, size, told):
    """Up to the most; the sheet says how many are left out."""
    picture = Image.new("RGB", size, "white")
    drawn = draw_look(picture, made_up(words))
    titles = [text for text in told if text.startswith("word") and " " not in text]
    assert titles == [f"word{index}" for index in range(min(words, 24))]
    assert ("6 more words have no map." in " ".join(told)) == (words == 30)
    assert "the whole answer: 100% tiles, 0% thumbnail" in told
    assert drawn.width == 1244
    assert draw_look(picture, made_up(words)).tobytes() == drawn.tobytes()
    assert draw_look(picture, made_up(words), 2).height <= drawn.height


def test_long_texts_are_cut(told):
    look = made_up(2)
    look.words[:] = [Word("x" * 500, (0,)), Word("y\ny", (1,))]
    look = replace(look, question="long " * 10_000, answer="z" * 10_000)
    draw_look(Image.new("RGB", (30, 20)), look)
    cut = {text[0]: text for text in told if text[0] in "xz"}
    assert all(text.endswith("...") and len(text) < 300 for text in cut.values())
    assert sorted(cut) == ["x", "z"]
    assert "y y" in told
    lines = [text for text in told if text.startswith("long")]
    assert len(lines) == 9
    assert told[9] == "..."
    with pytest.raises(ValueError, match="draw_look: most_words must be at least 0, got -1"):
        draw_look(Image.new("RGB", (30, 20)), look, -1)


# --- the command ---


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["draw", "objects.png", "--seed", "0", "--layout", "objects"]) == 0
    return tmp_path


def test_an_answer_and_its_sheet(drawn, capsys):
    """The commands of docs/look.md give its picture."""
    words = ["nano", "objects.png", "Describe everything in the picture.", "-o", "look.png"]
    status, out, err = run(capsys, "look", *words, "--dtype", "float32")
    assert (status, err) == (0, "")
    asked = ["chat", "nano", words[2], "--image", words[1], "--dtype", "float32"]
    assert out == run(capsys, *asked)[1] + "look.png\n"
    assert f'comemo look {words[0]} {words[1]} "{words[2]}" {words[3]} {words[4]}' in (
        ROOT / "docs" / "look.md"
    ).read_text(encoding="utf-8")
    new, kept = (Image.open(path).convert("RGB") for path in ("look.png", KEPT))
    assert new.size == kept.size
    # Other releases of Pillow may draw letters otherwise.
    assert np.abs(np.asarray(new, int) - np.asarray(kept, int)).mean() < 1
    assert sorted(path.name for path in drawn.iterdir()) == ["look.png", "objects.png"]


def test_layers_and_tiles(drawn, capsys):
    words = ["look", "nano", "objects.png", "How many shapes are there?", "-o", "a.PNG"]
    assert run(capsys, *words, "--layers", "5", "3", "--max-tiles", "1")[0] == 0
    with Image.open("a.PNG") as image:
        assert image.format == "PNG"


def test_errors_come_before_any_work(drawn, capsys, monkeypatch):
    from comemo.cli import look

    monkeypatch.setattr(look, "ask_and_look", lambda *_, **__: pytest.fail("computed"))
    before = Path("objects.png").read_bytes()
    words = ["look", "nano", "objects.png", "What?", "-o"]
    assert "a file ending in .png, got 'a.jpg'" in fails(capsys, *words, "a.jpg")
    assert "an existing directory" in fails(capsys, *words, "none/a.png")
    assert "would overwrite its picture" in fails(capsys, *words, "./objects.png")
    assert "of [1, 3, 5], got [0, 1]" in fails(capsys, *words, "a.png", "--layers", "0", "1")
    assert "question is empty" in fails(capsys, *words[:3], " ", "-o", "a.png")
    assert "none.png" in fails(capsys, "look", "nano", "none.png", "What?", "-o", "a.png")
    assert "arguments are required: -o" in fails(capsys, *words[:-1])
    assert Path("objects.png").read_bytes() == before
    assert [path.name for path in drawn.iterdir()] == ["objects.png"]


def test_a_checkpoint_that_is_not_whole(drawn, capsys):
    Path("broken").mkdir()
    Path("broken/config.json").write_bytes((nano.checkpoint() / "config.json").read_bytes())
    words = ["look", "broken", "objects.png", "What?", "-o", "a.png"]
    assert "has no tokenizer_config.json" in fails(capsys, *words)


def test_an_old_sheet_is_replaced_whole(drawn, capsys, monkeypatch):
    Path("look.png").write_bytes(b"old")

    def fail(self, target, kind):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    words = ["look", "nano", "objects.png", "How many shapes are there?", "-o", "look.png"]
    status, _, err = run(capsys, *words)
    assert status == 1
    assert "No space left" in err
    assert Path("look.png").read_bytes() == b"old"
    assert sorted(path.name for path in drawn.iterdir()) == ["look.png", "objects.png"]
