"""`comemo eval nano`, `comemo draw`, and the name `nano` in place of a directory."""

import json
import os
import re
from pathlib import Path

import pytest
from commands import QUICK, fails, run
from PIL import Image

from comemo import nano
from comemo.cli import arguments, info
from comemo.nano.drawing import draw
from comemo.nano.held_out import held_out
from comemo.nano.questions import KINDS
from comemo.nano.scenes import LAYOUTS, SEEDS
from comemo.nano.showing import PICTURES, one_of_each_kind, shown_questions, shown_scene

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_table_of_all_kinds(capsys, tmp_path):
    path = tmp_path / "all.json"
    status, out, err = run(capsys, "eval", "nano", "--questions", "14", "--json", path)
    assert (status, err) == (0, "")
    facts = json.loads(path.read_text())
    lines = out.splitlines()
    assert lines[0].startswith("14 questions about held-out pictures")
    rows = [re.split(r" {2,}", line) for line in lines[3:]]
    assert [row[0] for row in rows] == [*KINDS, "overall"]
    for name, n, right, accuracy, interval, chance in rows:
        score = facts["overall"] if name == "overall" else facts["kinds"][name]
        assert (int(n), int(right)) == (score["n"], score["right"])
        assert accuracy == f"{100 * score['accuracy']:.1f} %"
        ends = [f"{100 * score[end]:.1f}" for end in ("low", "high")]
        assert re.findall(r"[\d.]+", interval) == ends
        assert chance == f"{100 * score['chance']:.1f} %"
    asked = [(one.question, one.answer, one.seed) for one in held_out(14)]
    assert asked == [(one["question"], one["truth"], one["seed"]) for one in facts["answers"]]


def test_wrong_answers_and_their_pictures(capsys, tmp_path):
    """With the thumbnail alone some are wrong."""
    words = ("eval", "nano", "--kinds", "compare", "detail", "--questions", "4", "--tiles", "1")
    facts = json.loads(run(capsys, *words, "--json", "-")[1])
    assert (facts["tiles"], list(facts["kinds"])) == (1, ["detail", "compare"])
    wrong = [one for one in facts["answers"] if not one["right"]]
    assert wrong
    keep = tmp_path / "kept"
    out = run(capsys, *words, "--wrong", "3", "--keep", keep)[1]
    assert "the thumbnail alone" in out
    assert f"{len(wrong)} wrong answer" in out
    assert out.count("    truth   ") == min(3, len(wrong))
    first = wrong[0]
    assert f"{first['kind']}, {first['layout']} of seed {first['seed']}: {first['question']}" in out
    assert f"    truth   {first['truth']}\n    picture {keep}" in out
    (example,) = (one for one in held_out(4, ["compare", "detail"]) if one.seed == first["seed"])
    (path, *_) = sorted(keep.glob(f"{first['seed']}*.png"))
    with Image.open(path) as kept:
        assert kept.tobytes() == example.pictures()[0].tobytes()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["eval"], "nano"),
        (["eval", "pico"], "invalid choice: 'pico'"),
        (["eval", "nano", "--questions", "0"], "at least 1 and at most 10,000, got '0'"),
        (["eval", "nano", "--questions", "many"], "got 'many'"),
        (["eval", "nano", "--kinds", "smell"], "invalid choice: 'smell'"),
        (["eval", "nano", "--tiles", "0"], "got '0'"),
        (["eval", "nano", "--model", "/no/such"], "no directory '/no/such'"),
        (["eval", "nano", "--json", "/no/such/x.json"], "no directory '/no/such'"),
        (["eval", "nano", "--json", "-", "--wrong", "3"], "--wrong is for the table"),
        (["eval", "nano", "--keep", "DIR"], "--wrong N, which is missing"),
        (["draw"], "PNG"),
        (["draw", "x.jpg"], "must be a file ending in .png, got 'x.jpg'"),
        (["draw", "/no/such/x.png"], "No such file or directory: '/no/such/x.png'"),
        (["draw", "x.png", "--seed", "-1"], "got '-1'"),
        (["draw", "x.png", "--seed", str(PICTURES)], f"got '{PICTURES}'"),
        (["draw", "x.png", "--layout", "map"], "invalid choice: 'map'"),
    ],
)
def test_mistakes(capsys, argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_draw_writes_a_picture_and_its_answers(capsys, tmp_path):
    path = tmp_path / "drawn.png"
    status, out, err = run(capsys, "draw", path, "--seed", "7", "--layout", "form")
    assert (status, err) == (0, "")
    scene = shown_scene(7, "form")
    title, *lines = out.splitlines()
    image = draw(scene)
    assert title == f"{path}: {image.width} x {image.height} px, --seed 7 --layout form"
    asked = shown_questions(scene)
    assert lines == [f"  {one.text}  {one.answer}" for one in asked]
    assert {one.kind for one in asked} == {"detail", "yes/no", "caption"}
    with Image.open(path) as drawn:
        assert drawn.tobytes() == image.tobytes()
        assert max(drawn.size) >= 1000


def test_draw_replaces_nothing_unless_it_is_forced(capsys, tmp_path):
    path = tmp_path / "drawn.png"
    path.write_bytes(b"mine")
    words = ("draw", path, "--seed", "1")
    assert f"'{path}' exists; --force replaces it" in fails(capsys, *words)
    assert path.read_bytes() == b"mine"
    assert run(capsys, *words, "--force")[0] == 0
    with Image.open(path) as drawn:
        assert drawn.tobytes() == draw(shown_scene(1)).tobytes()
    assert list(tmp_path.iterdir()) == [path]
    directory, pipe = tmp_path / "folder.png", tmp_path / "pipe.png"
    directory.mkdir()
    os.mkfifo(pipe)
    assert "must be a file" in fails(capsys, "draw", directory, "--force")
    assert "wanted a file, got a pipe" in fails(capsys, "draw", pipe, "--force")


def test_pictures_to_show_are_new_and_mostly_objects(capsys, tmp_path):
    scenes = [shown_scene(number) for number in range(120)]
    assert all(scene.seed in SEEDS["demo"] for scene in scenes)
    layouts = [scene.layout for scene in scenes]
    assert set(layouts) == set(LAYOUTS)
    assert 60 < layouts.count("objects") < 100
    for scene in scenes:
        asked = shown_questions(scene)
        assert asked == shown_questions(scene)
        assert {one.kind for one in asked} <= KINDS.keys()
        kinds = [one.kind for one in one_of_each_kind(asked)]
        assert kinds == list(dict.fromkeys(one.kind for one in asked))
        assert len(kinds) >= 3
    seeds = {arguments_of_draw(capsys, tmp_path / f"{index}.png") for index in range(3)}
    assert len(seeds) == 3
    for wrong in (-1, PICTURES):
        with pytest.raises(ValueError, match=r"^shown_scene: wanted a number from 0 to"):
            shown_scene(wrong)


def arguments_of_draw(capsys, path):
    """The seed that `comemo draw` chooses."""
    return re.search(r"--seed (\d+)", run(capsys, "draw", path)[1])[1]


def test_nano_is_a_checkpoint_unless_a_directory_has_its_name(
    capsys, tmp_path, monkeypatch, demo_checkpoint
):
    monkeypatch.chdir(tmp_path)
    facts = json.loads(run(capsys, "info", "nano", "--json")[1])
    assert facts == info.describe_checkpoint(nano.checkpoint())
    assert facts["total"]["parameters"] < 3_000_000
    picture = tmp_path / "picture.png"
    assert run(capsys, "draw", picture, "--seed", "41", "--layout", "sign")[0] == 0
    words = ("chat", "nano", "Which colour is the sign?", "--image", picture, *QUICK)
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert out.strip() == shown_scene(41, "sign").sign["colour"]
    Path("nano").symlink_to(demo_checkpoint)
    assert json.loads(run(capsys, "info", "nano", "--json")[1])["directory"] == "nano"
    assert arguments.find_checkpoint("nano") == "nano"


def test_a_package_without_the_checkpoint(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(nano, "checkpoint", lambda: tmp_path / "none")
    for argv in (["demo"], ["eval", "nano"], ["chat", "nano", "a"], ["info", "nano"]):
        said = fails(capsys, *argv)
        assert "wanted comemo-nano in" in said
        assert "this copy of the package is not complete" in said
