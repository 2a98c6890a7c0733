"""Everything a line of training data can do wrong: named, counted, and no crash."""

import errno
import json
import os

import pytest
from faults import in_time
from train_lines import (  # noqa: F401
    loader_of,
    pictures,
    read,
    reader_of,
    settings_for,
    talk,
    words,
    write_lines,
)

from comemo.train.data.faults import BadSample
from comemo.train.data.meta import Collection

pytestmark = pytest.mark.usefixtures("one_thread")


BAD = {
    b"{": "broken JSON",
    b"\xff": "broken JSON",
    b"[" * 100_000: "broken JSON",
    b"7": "not an object",
    b"[]": "not an object",
}
TURNS = {
    "no conversations": [None, [], {}, "hi", [talk()["conversations"][0]]],
    "starts with the assistant": [[("gpt", "a"), ("human", "b")]],
    "roles do not alternate": [
        [("human", "a"), ("human", "b")],
        [("human", "a"), ("gpt", "b"), ("system", "c"), ("gpt", "d")],
    ],
    "ends without an answer": [[("human", "a")], [("human", "a"), ("gpt", "b"), ("human", "c")]],
    "empty answer": [[("human", "a"), ("gpt", " \n")], [("human", "a"), ("gpt", [])]],
    "wrong value": [
        ["hi"],
        [{"from": "human"}],
        [{"role": "user", "value": "a"}],
        [("robot", "a"), ("gpt", "b")],
        [([], "a"), ("gpt", "b")],
        [("human", 3), ("gpt", "b")],
        [("human", "\ud800"), ("gpt", "b")],
    ],
    "unknown content": [
        [("human", [{"type": "audio"}]), ("gpt", "b")],
        [("human", [{"type": "image", "image": "w.png"}]), ("gpt", "b")],
        [("human", [{"type": "text", "text": 3}]), ("gpt", "b")],
        [("human", ["a"]), ("gpt", "b")],
        [("human", [{"type": []}]), ("gpt", "b")],
    ],
    "marks and images differ": [
        [("human", "<image>"), ("gpt", "b")],
        [("human", "a"), ("gpt", "<image>")],
        [("system", "<image>"), ("human", "a"), ("gpt", "b")],
    ],
}
MORE = {
    "wrong value": [
        {"image": 3},
        {"image": ["w.png", None]},
        {"image": "a\0b"},
        {"image": "w.png", "video": "v"},
        {"video": "w.png", "clip": [2, 1]},
        {"video": "w.png", "clip": "1"},
    ],
    "marks and images differ": [{"image": ["w.png", "s.png"]}],
    "image missing": [
        {"image": "none.png"},
        {"image": "w.png/a"},
        {"image": "http://x/y.png"},
        {"video": ["none.png"]},
    ],
    "image broken": [
        {"image": "cut.png"},
        {"image": "text.png"},
        {"image": "."},
        {"image": "a" * 300},
    ],
    "video unreadable": [
        {"video": "film.mp4"},
        {"video": "empty"},
        {"video": ["s.png", "text.png"]},
        {"video": "w.png", "clip": [0, 1]},
    ],
}


def bad_lines():
    for line, kind in BAD.items():
        yield kind, line
    for kind, cases in TURNS.items():
        for turns in cases:
            if isinstance(turns, list):
                turns = [
                    {"from": turn[0], "value": turn[1]} if isinstance(turn, tuple) else turn
                    for turn in turns
                ]
            yield kind, {"conversations": turns}
    for kind, cases in MORE.items():
        for more in cases:
            yield kind, talk("what?", "a", **more)


@pytest.fixture
def damaged(pictures):
    (pictures / "cut.png").write_bytes((pictures / "w.png").read_bytes()[:2000])
    (pictures / "text.png").write_text("none")
    (pictures / "film.mp4").write_bytes(b"\0" * 50)
    (pictures / "empty").mkdir()
    return pictures


def test_bad_lines_are_named(words, damaged):
    reader = reader_of(words)
    collection = Collection("data", "data.jsonl", str(damaged))
    for kind, line in bad_lines():
        line = line if isinstance(line, bytes) else json.dumps(line).encode()
        with pytest.raises(BadSample) as error:
            reader.read(collection, line, None)
        assert (error.value.kind, line[:200]) == (kind, line[:200])
        assert error.value.message
        assert "Traceback" not in str(error.value)
        if b"cut.png" not in line and b"text.png" not in line:  # pixels are not read
            with pytest.raises(BadSample) as error:
                reader.measure(collection, line, None)
            assert error.value.kind == kind


def test_bad_lines_are_counted_by_the_loader(words, damaged):
    cases = list(bad_lines())
    good = talk("what?", "a boat")
    path = write_lines(damaged / "bad.jsonl", [good, *(line for _, line in cases)])
    loader = loader_of(words, settings_for("", eval=path, workers=2), held_out=True)
    (batch,) = list(loader)
    assert batch["samples"] == [("bad", path, 1)]
    kinds = [kind for kind, _ in cases]
    assert loader.faults.counts == {"bad": {kind: kinds.count(kind) for kind in set(kinds)}}
    places = [text for texts in loader.faults.examples["bad"].values() for text in texts]
    numbers = [int(text[len(path) + 1 :].split(":")[0]) for text in places]
    for text, number in zip(places, numbers, strict=True):
        assert text.startswith(f"{path}:{number}: ")
        assert loader.faults.examples["bad"][kinds[number - 2]].count(text) == 1


def test_a_failing_machine_is_no_bad_sample(words, pictures, monkeypatch):
    """Else a run with too many open files would skip all its data."""
    path = write_lines(pictures / "a.jsonl", [talk("what?", "a", image="w.png")] * 2)
    film = write_lines(pictures / "b.jsonl", [talk("what?", "a", video=["w.png"])] * 2)

    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("comemo.train.data.samples.open_image", fail)
    monkeypatch.setattr("comemo.train.data.frames.open_image", fail)
    for file in (path, film):
        with pytest.raises(RuntimeError, match=r"\.jsonl:1: (.|\n)*Too many open files"):
            list(loader_of(words, settings_for("", eval=file), held_out=True))


def test_files_of_another_kind_do_not_block(words, tmp_path):
    for name in ("pipe.png", "film"):
        os.mkfifo(tmp_path / name)
    for more, kind in [({"image": "pipe.png"}, "image broken"), ({"video": "film"}, "video")]:
        with in_time(), pytest.raises(BadSample, match=kind):
            read(words, tmp_path, talk("what?", "a", **more))
