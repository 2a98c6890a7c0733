"""Training data of comemo-nano: what `comemo train` reads, from seeds for training alone."""

import json
from pathlib import Path

import pytest
from nano_truth import answers_about_pair, answers_to
from PIL import Image

from comemo.nano import dataset
from comemo.nano.__main__ import export
from comemo.nano.dataset import write_albums, write_items, write_lessons, write_pictures
from comemo.nano.scenes import SEEDS, make_lesson, make_pair, make_scene
from comemo.nano.start import make_start
from comemo.nano.words import COLOURS, LETTERS, SHAPES, WORDS
from comemo.train.recipe import check
from comemo.train.settings import DataSettings, StageSettings, StartSettings, TrainSettings

WRITERS = {
    "items": write_items,
    "albums": write_albums,
    "lessons": write_lessons,
    "pictures": write_pictures,
}
FIRST = 6  # the seed of a pair


SLOW = pytest.mark.slow
EVERY = ["pictures", *(pytest.param(name, marks=SLOW) for name in WRITERS if name != "pictures")]
LINES = 7  # two of them are pairs


@pytest.fixture(scope="module", params=EVERY)
def written(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "new" / "folder"
    WRITERS[request.param](folder, LINES, FIRST)
    return request.param, folder, read(folder, request.param)


def read(folder, name):
    """The lines of one file."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_every_line_has_its_pictures(written):
    name, folder, lines = written
    again = dataset.AGAIN.get(name, 1)  # lines about each picture
    assert len(lines) == LINES * again
    named = [path for line in lines for path in _paths(line)]
    files = [str(file.relative_to(folder)) for file in folder.rglob("*.jpg")]
    assert sorted(named) == sorted(files * again)
    for path in files:
        with Image.open(folder / path) as image:
            assert image.mode == "RGB"
            assert (image.size == (128, 128)) == (name in ("items", "albums"))
    for index, line in enumerate(lines):
        seed = FIRST + index // again
        turns = line["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        marks = [turn["value"].count("<image>\n") for turn in turns[::2]]
        assert len(_paths(line)) == sum(marks)
        if name == "albums":
            assert marks == [1] * dataset.ALBUM
        else:
            pair = name == "pictures" and seed % dataset.PAIRS == 0
            assert marks == [1 + pair] + [0] * (len(marks) - 1)


def test_answers_are_right_and_give_no_other_away(tmp_path):
    write_pictures(tmp_path, LINES, FIRST)
    lines = read(tmp_path, "pictures") + read(tmp_path, "layouts")
    assert len(lines) > LINES
    for line in lines:
        seed = int(Path(_paths(line)[0]).stem.rstrip("ab"))
        asked, given = check_answers("pictures", seed, line)
        # What names everything comes last, and before it no shape or text is named in two turns.
        wholes = [question.startswith("Describe") for question in asked]
        assert not any(wholes[:-1])
        turns = [
            f"{one} {two}"
            for one, two, whole in zip(asked, given, wholes, strict=True)
            if not whole
        ]
        named = [name for turn in turns for name in set(dataset._NAMES.findall(turn))]
        assert len(named) == len(set(named)), turns


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_lessons, "colours"), (write_lessons, "lessons"), (write_pictures, "places")],
)
def test_lessons_ask_for_a_thing_or_place_once(write, name, tmp_path):
    write(tmp_path, 12, FIRST)
    lines = read(tmp_path, name)
    assert len({_paths(line)[0] for line in lines}) > 2
    for line in lines:
        seed = int(Path(_paths(line)[0]).stem)
        asked, given = check_answers("lessons" if write is write_lessons else name, seed, line)
        if name == "colours":
            assert set(given) <= set(COLOURS)
        else:
            named = [f"{one} {two}" for one, two in zip(asked, given, strict=True)]
            places = make_lesson(seed).places() if name == "lessons" else make_scene(seed).places()
            told = [p for text in named for p, own in places.items() if dataset._has(text, own)]
            assert len(told) == len(set(told))


def check_answers(name, seed, line):
    """Questions and answers of a line, all right and all different."""
    asked = [turn["value"].replace("<image>\n", "") for turn in line["conversations"][::2]]
    given = [turn["value"] for turn in line["conversations"][1::2]]
    for question, answer in zip(asked, given, strict=True):
        assert right_answers(name, seed, question) == [answer]
    assert len(asked) == len(set(asked))
    return asked, given


def right_answers(name, seed, question):
    if name == "lessons":
        return answers_to(make_lesson(seed), question)
    if seed % dataset.PAIRS == 0:
        return answers_about_pair(make_pair(seed), question)
    return answers_to(make_scene(seed), question)


@pytest.mark.parametrize("name", ["items", "albums"])
def test_items_are_named_by_known_words(name, tmp_path):
    WRITERS[name](tmp_path, 60 if name == "items" else 6)
    known = {*COLOURS, *SHAPES, *LETTERS, *WORDS, *map(str, range(10, 100))}
    asked = set()
    for line in read(tmp_path, name):
        told = [turn["value"] for turn in line["conversations"]]
        for question, answer in zip(told[::2], told[1::2], strict=True):
            asked.add(question.removeprefix("<image>\n").split()[0])
            *rest, last = answer.split()
            assert last in known
            assert {*rest} <= {"a", "an", "the", "word", "letter", "number", *COLOURS}
    assert asked == {"Describe", "Which"}


def _paths(line):
    return [line["image"]] if isinstance(line["image"], str) else line["image"]


def test_training_accepts_it(written, tmp_path):
    """Every line, whole."""
    name, folder, lines = written
    make_start(tmp_path / "start")
    settings = TrainSettings(
        start=StartSettings(checkpoint=str(tmp_path / "start")),
        data=DataSettings(
            train=str(folder / f"{name}.jsonl"),
            max_tokens=2048,
            max_dynamic_patch=1 if name in ("items", "albums") else 12,
            bad_data="stop",
            too_long="refuse",
            workers=0,
        ),
        run=("one",),
        stages={"one": StageSettings(epochs=1.0)},
    )
    plan = check(settings)
    assert plan.samples == len(lines)
    assert plan.faults.total == 0


@pytest.mark.parametrize("write", WRITERS.values())
def test_the_same_seeds_give_the_same_files(write, tmp_path, monkeypatch):
    """One after the other, in one process or in several."""
    write(tmp_path / "a", 4)
    write(tmp_path / "b", 2)
    first, same = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in _files(tmp_path / name)}
        for name in "ab"
    )
    kept = {path: data for path, data in same.items() if path.suffix == ".jpg"}
    assert kept
    assert kept.items() <= first.items()
    files = {path for path in same if path.suffix == ".jsonl"}
    assert files == {path for path in first if path.suffix == ".jsonl"}
    assert all(first[path].startswith(same[path]) for path in files)


@SLOW
def test_several_processes_write_the_same(tmp_path, monkeypatch):
    write_items(tmp_path / "one", 6)
    monkeypatch.setattr(dataset, "ROUND", 2)
    write_items(tmp_path / "several", 6)
    names = {path.relative_to(tmp_path / "one") for path in _files(tmp_path / "one")}
    assert len(names) == 7
    for name in names:
        one, several = (tmp_path / folder / name for folder in ("one", "several"))
        assert one.read_bytes() == several.read_bytes()


def _files(folder: Path):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("write", WRITERS.values())
@pytest.mark.parametrize(
    ("count", "first"),
    [
        (0, 0),
        (-1, 0),
        (1, -1),
        (1, SEEDS["held-out"].start),
        (1, SEEDS["demo"].start),
        (2, SEEDS["train"].stop - 1),
    ],
)
def test_other_seeds_are_refused(write, count, first, tmp_path):
    with pytest.raises(ValueError, match=rf"{write.__name__}: the seeds must be in .*{first}"):
        write(tmp_path / "data", count, first)
    assert not (tmp_path / "data").exists()


def test_every_thing_of_an_album_is_of_a_training_seed(tmp_path):
    last = SEEDS["train"].stop // dataset.ALBUM
    with pytest.raises(ValueError, match="write_albums: the seeds must be in "):
        write_albums(tmp_path / "data", 1, last)
    write_albums(tmp_path / "data", 1, last - 1)


def test_export_deletes_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"^export: the folder must be new or empty"):
        export(tmp_path / "model", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_pair_with_two_questions_is_no_album(monkeypatch, tmp_path):
    asked = [
        dataset.Question("compare", "Which picture has more things?", "the first"),
        dataset.Question("compare", "How many things are in the first picture?", "3"),
    ]
    monkeypatch.setattr(dataset, "questions_about_pair", lambda *given: asked)
    write_pictures(tmp_path, 1, FIRST)
    (line,) = read(tmp_path, "pictures")
    told = [turn["value"].count("<image>") for turn in line["conversations"][::2]]
    assert told == [2, 0]
