"""Meta files and JSON lines."""

import copy
import json
import os
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from train_lines import write_lines

from comemo.train.data.lines import Lines
from comemo.train.data.meta import Collection, read_collections


def test_a_meta_file(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    write_lines(tmp_path / "a.jsonl", [{}])
    entries = {
        "a": {"root": "images", "annotation": "a.jsonl", "data_augment": True, "length": 1},
        "b": {
            "root": "",
            "annotation": str(tmp_path / "a.jsonl"),
            "repeat_time": 2,
            "max_dynamic_patch": 6,
        },
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    first, second = read_collections(str(tmp_path / "meta.json"))
    folder, file = str(tmp_path), str(tmp_path / "a.jsonl")
    assert first == Collection("a", file, f"{folder}/images", True, 1.0, 1, None)
    assert second == Collection("b", file, folder, False, 2.0, None, 6)
    monkeypatch.chdir(tmp_path)  # paths that exist are taken as they are
    assert read_collections("meta.json")[0].annotation == "a.jsonl"


def test_a_jsonl_file_is_a_dataset(tmp_path):
    path = write_lines(tmp_path / "a.b.jsonl", [{}])
    assert read_collections(path) == [Collection("a.b", path, str(tmp_path))]
    (tmp_path / "images").mkdir()
    root = str(tmp_path / "images")
    assert read_collections(path, root) == [Collection("a.b", path, root)]
    with pytest.raises(ValueError, match="root must be an existing folder, got '/none'"):
        read_collections(path, "/none")


@pytest.mark.parametrize(
    ("repeat", "lines", "count"),
    [(1, 7, 7), (2.5, 4, 10), (0.5, 7, 3), (0.01, 7, 1), (3, 2, 6), (1.2, 4, 4), (0.5, 0, 0)],
)
def test_repetitions(repeat, lines, count):
    assert Collection("a", "a", ".", repeat=repeat).count(lines) == count


def test_a_wrong_length_is_told(caplog):
    collection = Collection("a", "a.jsonl", ".", length=5)
    collection.check_length(5)
    assert not caplog.records
    collection.check_length(7)
    (record,) = caplog.records
    message = "a: the meta file gives length 5, a.jsonl has 7 lines: all are used"
    assert record.getMessage() == message


RIGHT = {"root": "", "annotation": "a.jsonl"}


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ([], "must hold a JSON object of datasets"),
        ({}, "must hold a JSON object of datasets"),
        ({"a": 3}, "dataset 'a' of .* must be a JSON object, got 3"),
        ({"a": {"root": ""}}, "dataset 'a' of .* must have the key annotation"),
        ({"a": {"annotation": "a.jsonl"}}, "must have the key root"),
        ({"a": RIGHT | {"repeat": 2}}, "must have keys of .*repeat_time.*, got 'repeat'"),
        ({"a": RIGHT | {"repeat_time": 0}}, "repeat_time must be above 0, got 0"),
        ({"a": RIGHT | {"repeat_time": float("nan")}}, "repeat_time must be above 0, got nan"),
        ({"a": RIGHT | {"repeat_time": "1"}}, "repeat_time must be int or float, got '1'"),
        ({"a": RIGHT | {"repeat_time": True}}, "repeat_time must be int or float, got True"),
        ({"a": RIGHT | {"data_augment": 1}}, "data_augment must be bool, got 1"),
        ({"a": RIGHT | {"max_dynamic_patch": 1025}}, "must be from 1 to 1024, got 1025"),
        ({"a": RIGHT | {"length": -1}}, "length must be from 1 to .*, got -1"),
        ({"a": RIGHT | {"length": 2.0}}, "length must be int, got 2.0"),
        (
            {"a": RIGHT | {"max_dynamic_patch": 0}},
            "max_dynamic_patch must be from 1 to 1024, got 0",
        ),
        ({"a": RIGHT | {"root": None}}, "root must be str, got None"),
        ({"a": RIGHT | {"root": "none"}}, "dataset 'a' .* root must be an existing folder"),
        ({"a": RIGHT | {"root": "a.jsonl"}}, "dataset 'a' .* root must be an existing folder"),
        ({"a": RIGHT | {"annotation": "b.jsonl"}}, "dataset 'a' .*wanted an existing file, got"),
        ({"a": RIGHT | {"annotation": ""}}, "dataset 'a' .*wanted an existing file, got"),
        ({"a": RIGHT | {"annotation": "a\0b"}}, "dataset 'a' .*wanted an existing file, got"),
    ],
)
def test_wrong_meta_files(tmp_path, meta, message):
    write_lines(tmp_path / "a.jsonl", [{}])
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=message):
        read_collections(str(tmp_path / "meta.json"))


def test_wrong_paths_of_meta_files(tmp_path):
    for path in ("", None, str(tmp_path), "none.json", "none.jsonl", "a\0b"):
        with pytest.raises(ValueError, match="data: wanted"):
            read_collections(path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_collections(str(tmp_path / "meta.json"))
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match="wanted a file, got a pipe"):
        read_collections(str(tmp_path / "pipe.jsonl"))
    with pytest.raises(ValueError, match="root must be None for a meta file"):
        read_collections(str(tmp_path / "meta.json"), root=".")


CONTENT = st.lists(
    st.sampled_from([b"{}", b"", b" ", b"\t\r", b'{"a": 1}', b" {}", b"\xef\xbb\xbf", b"\x0b"])
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=CONTENT,
    ending=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    bom=st.booleans(),
    block=st.sampled_from([3, 7, 1 << 20]),
)
def test_lines_are_found(tmp_path, parts, ending, last, bom, block):
    content = ending.join(parts) + (ending if last else b"")
    path = tmp_path / "a.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + content)
    if content.startswith(b"\xef\xbb\xbf") and not bom:
        content = content[3:]
    expected = [
        (number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comemo.train.data.lines._BLOCK", block)
        lines = Lines(str(path))
    found = [(lines.number(index), lines.read(index).rstrip(b"\n")) for index in range(len(lines))]
    assert found == expected


def test_an_index_is_found_again(tmp_path, monkeypatch):
    path, cache = write_lines(tmp_path / "a.jsonl", [{"a": j} for j in range(50)]), tmp_path / "c"
    lines = Lines(path, cache)
    (stored,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("comemo.train.data.lines._find_lines", None)  # not needed
        again = Lines(path, cache)
        thirtieth = again.read(30)
        for other in (pickle.loads(pickle.dumps(again)), copy.deepcopy(lines)):
            assert (len(other), other.read(30)) == (50, thirtieth)
    assert json.loads(thirtieth) == {"a": 30}
    assert len(pickle.dumps(again)) < 1000
    for damage in (b"", stored.read_bytes()[:300], b"none"):
        stored.unlink()
        stored.write_bytes(damage)
        assert Lines(path, cache).read(30) == thirtieth
    write_lines(tmp_path / "a.jsonl", [{"a": j} for j in range(60)])
    assert len(Lines(path, cache)) == 60
    assert len(list(cache.iterdir())) == 2


def test_an_empty_file_has_no_lines(tmp_path):
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert len(Lines(str(tmp_path / "a.jsonl"), tmp_path / "cache")) == 0
        assert len(Lines(str(tmp_path / "a.jsonl"))) == 0
