"""Batch inference in one process: requests, answers, order, what is kept, what is refused."""

import json

import pytest
import torch
from batches import QUESTIONS, answer, draw, mixed_rows, read, write_requests

from comemo.batch import BatchSettings
from comemo.batch.answering import Answerer, group_of, seed_of
from comemo.batch.options import complete_options
from comemo.batch.parts import PartReader, RunFolder
from comemo.batch.requests import parse_line, read_request
from comemo.batch.settings import identify_checkpoint
from comemo.batch.work import group_requests
from comemo.cli.arguments import shipped_checkpoint
from comemo.cli.checkpoints import load_checkpoint
from comemo.images import load_image
from comemo.store.store import MemoryStore

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("its ranks are forks, which have no virtual GPU"),
]
SAMPLED = {"temperature": 5.0, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def nano():
    return load_checkpoint(shipped_checkpoint())


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path)
    return tmp_path


def request(item, line=1, system=None, **defaults):
    return read_request(item, line, "root", defaults, system)


# --- requests ---


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "broken JSON: "),
        (b"[1]", r"must be a JSON object, got \[1\]"),
        (b'{"id": NaN}', "NaN is not a JSON value"),
        (b"\xff{}", "must be UTF-8"),
        (b"[" * 100_000, "broken JSON: "),
        (b"{}", "question must be a text that is not empty, got None"),
        (b'{"question": " "}', "question must be a text"),
        (b'{"question": "a", "max_tokens": 1}', "'max_tokens': did you mean max_new_tokens"),
        (b'{"question": "a", "xyzzy": 1}', "'xyzzy': wanted some of question, image, id"),
        (b'{"question": "a", "image": 3}', "image must be a path or a list of paths, got 3"),
        (b'{"question": "a", "image": [""]}', "image must be a path"),
        (b'{"question": "a", "history": ["b"]}', "history must be a list of"),
        (b'{"question": "a", "history": [["b", null]]}', "history must be a list of"),
        (b'{"question": "a", "system": 1}', "system must be a text, got 1"),
        (b'{"question": "<image> a"}', "got 1 for 0 paths"),
        (b'{"question": "<image> a", "image": ["b", "c"]}', "got 1 for 2 paths"),
        (b'{"question": "a", "messages": []}', "got messages and question"),
        (b'{"messages": []}', "at least one message"),
        (b'{"messages": ["a"]}', "messages must be a list of objects"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "must be of role user"),
        (b'{"messages": [{"role": "user", "content": [{"type": "video"}]}]}', "got 'video'"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "got 1 for 0"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image", "path": 1}]}]}', "got 1"),
        (b'{"question": "a", "max_new_tokens": 0}', "max_new_tokens must be a whole number"),
        (b'{"question": "a", "max_new_tokens": true}', "max_new_tokens must be"),
        (b'{"question": "a", "temperature": 0}', "temperature .* greedy answers need none"),
        (b'{"question": "a", "top_p": 0}', "top_p must be a number above 0 and at most 1"),
        (b'{"question": "a", "do_sample": 1}', "do_sample must be true or false"),
        (b'{"question": "a", "stop_strings": []}', "stop_strings must be a text"),
    ],
)
def test_bad_lines(line, said):
    with pytest.raises(ValueError, match=said):
        request(parse_line(line))


def test_images_are_in_the_order_of_their_marks():
    turns = {"history": [["a", "b"]], "question": "c"}
    found = request(turns | {"image": ["x.png", "/y.png"]})
    assert found.images == ("root/x.png", "/y.png")
    assert [one["content"] for one in found.messages] == ["<image>\n<image>\na", "b", "c"]
    marked = turns | {"question": "c <image>", "image": "x.png"}
    assert [one["content"] for one in request(marked).messages] == ["a", "b", "c <image>"]
    parts = [{"type": "image"}, {"type": "image_url", "image_url": {"url": "z.png"}}, "d <image>"]
    messages = [
        {"role": "user", "content": "<image> first"},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": parts},
    ]
    found = request({"messages": messages, "image": ["x.png", "y.png"]}, system="s")
    assert found.images == ("root/x.png", "root/y.png", "root/z.png")
    assert found.messages == [{"role": "system", "content": "s"}, *messages]
    bare = {"messages": [{"role": "user", "content": ["d <image>"]}], "image": "x.png"}
    assert request(bare).messages[0]["content"] == [{"type": "image"}, "d <image>"]
    data = "data:image/png;base64,AAAA"
    assert request({"question": "a", "image": [data]}).images == (data,)


def test_options_of_a_request_go_first():
    assert complete_options({}, {}) == {"do_sample": False, "max_new_tokens": 512}
    heat = {"temperature": 0.5}
    assert complete_options(heat, {"max_new_tokens": 7}) == {
        "do_sample": True,
        "max_new_tokens": 7,
        "temperature": 0.5,
    }
    assert complete_options({"do_sample": False}, heat) == complete_options({}, {})
    assert complete_options({"top_k": None}, {"top_p": 0.5, "do_sample": True})["top_p"] == 0.5


def test_batches_have_one_set_of_options_and_images_or_none():
    kinds = [{"image": "x"}, {}, {"image": "y", "max_new_tokens": 9}, SAMPLED]
    rows = [{"question": "a"} | kinds[i % 4] for i in range(16)]
    found = list(group_requests([request(row, i) for i, row in enumerate(rows)], 3))
    assert sorted(one.line for group in found for one in group) == list(range(16))
    for group in found:
        assert len({i % 4 for i in (one.line for one in group)}) == 1
    assert sorted(map(len, found)) == [1] * 7 + [3] * 3
    assert group_of(request({"question": "a", "stop_strings": "b"})) is None
    many = [request({"question": "a", "max_new_tokens": i + 1}, i) for i in range(40)]
    groups = group_requests(many, 2)
    assert [one.line for one in next(groups)] == [0]  # before all were read


# --- answers ---


def test_prompts_are_those_of_chat(nano, folder, monkeypatch):
    """Embeddings, positions and start tokens, for each form of a request."""
    model, processor = nano
    given = []
    monkeypatch.setattr(
        model, "generate", lambda **inputs: given.append(inputs) or torch.tensor([[1, 2]])
    )
    tiles, grid = load_image(folder / "wide.png", 64)
    system, turns = "Be <|im_end|> brief.", [("<image>\nWhat is it?", "a"), ("<|im_end|>?", None)]
    _, wanted = model.prepare_chat(
        processor.tokenizer, tiles, turns, None, [grid], system_message=system
    )
    asked = {"question": turns[1][0], "history": [["What is it?", "a"]], "system": system}
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "<|im_end|>?"},
    ]
    answerer = Answerer(model, processor, BatchSettings("nano"))
    for item in (asked, {"messages": messages}):
        one = read_request(item | {"image": "wide.png"}, 1, folder, {}, None)
        (result,) = answerer.answer([one])
        assert (result.error, result.tokens) == (None, 1)
    for inputs in given:
        for name in ("inputs_embeds", "position_ids", "input_ids", "attention_mask"):
            assert torch.equal(inputs[name], wanted[name]), name


def test_answers_are_those_of_each_alone(nano, folder):
    write_requests(folder, mixed_rows())
    alone, first = answer(folder, nano, batch=1, name="a.jsonl")
    assert (alone.lines, alone.answered, alone.missing) == (11, 11, 0)
    assert [row["line"] for row in first] == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12]
    assert (first[0]["id"], first[3]["id"]) == ("a", {"n": [1, None]})
    assert all(len(row["answer"]) >= 1 and 1 <= row["tokens"] <= 8 for row in first)
    assert first[4]["tokens"] <= 3
    assert answer(folder, nano, batch=4, name="b.jsonl")[1] == first
    model, processor = nano
    tiles, grid = load_image(folder / "0.png", 64)
    said = model.chat(
        processor.tokenizer, tiles, QUESTIONS[0], {"max_new_tokens": 8}, target_aspect_ratio=[grid]
    )
    assert first[0]["answer"] == said


def test_drawn_answers_depend_on_seed_and_line_alone(nano, folder):
    row = {"question": QUESTIONS[0], "image": "0.png"}
    write_requests(folder, [row | SAMPLED] * 4 + [row])
    first = answer(folder, nano, name="a.jsonl")[1]
    assert len({one["answer"] for one in first[:4]}) > 1
    assert answer(folder, nano, name="b.jsonl", batch=8)[1] == first
    other = answer(folder, nano, name="c.jsonl", seed=1)[1]
    assert other[:4] != first[:4]
    assert other[4] == first[4]
    write_requests(folder, ["", row | SAMPLED | {"id": 1}, "", row | SAMPLED])
    assert answer(folder, nano, name="d.jsonl")[1][0]["answer"] == first[1]["answer"]
    assert len({seed_of(0, 1), seed_of(1, 0), seed_of(0, 11), seed_of(1, 1)}) == 4


def test_lines_about_one_picture_share_its_memory(nano, folder):
    write_requests(folder, [{"question": q, "image": "0.png"} for q in QUESTIONS])
    store = MemoryStore(directory=folder / "known")
    answer(folder, nano, store=store, batch=2)
    assert (store.stats.misses, store.stats.hits) == (1, 3)
    again = MemoryStore(directory=folder / "known")
    answer(folder, nano, store=again, name="b.jsonl")
    assert (again.stats.misses, again.stats.disk_hits) == (0, 1)


def test_bad_requests_stop_nobody(nano, folder):
    (folder / "text.png").write_text("no picture")
    long = "word " * 40_000
    rows = [
        {"question": "a", "image": "none.png", "id": 7},
        {"question": "a", "image": "text.png"},
        "{",
        {"question": long, "image": "0.png"},
        {"question": "\ud800"},
        {"question": QUESTIONS[0], "image": "0.png"},
        {"question": "a", "image": "http://a/b.png"},
    ]
    path, told = write_requests(folder, rows), []
    summary, found = answer(folder, nano, batch=8, tell=told.append)
    assert (summary.answered, summary.failed, summary.missing) == (1, 6, 0)
    for number, said in {
        1: f"No such file or directory: '{folder / 'none.png'}'",
        2: "is not an image that Pillow can read",
        3: "broken JSON",
        4: "the prompt needs position ids up to",
        5: "surrogate",
        7: "reads no URL, download the image",
    }.items():
        assert said in found[number - 1]["error"]
        assert any(line.startswith(f"{path}:{number}: ") and said in line for line in told)
    assert "answer" in found[5]
    assert found[0]["id"] == 7


def test_a_batch_that_does_not_fit_is_answered_one_by_one(nano, folder, monkeypatch):
    write_requests(folder, [{"question": q, "image": "0.png"} for q in QUESTIONS])
    wanted = answer(folder, nano, batch=1, name="a.jsonl")[1]
    model, _ = nano
    generate, sizes = model.generate, []

    def full(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1 or len(sizes) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", full)
    summary, found = answer(folder, nano, batch=4)
    assert sizes == [4, 1, 1, 1, 1]
    assert found[:3] == wanted[:3]
    assert (summary.failed, found[3]["error"]) == (1, "CUDA out of memory")


# --- what is kept ---


def test_only_new_changed_and_failed_lines_are_answered(nano, folder, monkeypatch):
    rows = [{"question": q, "image": f"{i}.png"} for i, q in enumerate(QUESTIONS)]
    write_requests(folder, [*rows, {"question": "a", "image": "late.png"}])
    first = answer(folder, nano)[1]
    assert "error" in first[4]
    asked, answered = [], Answerer.answer

    def counted(self, requests, following):
        asked.extend(one.line for one in requests)
        return answered(self, requests, following)

    monkeypatch.setattr(Answerer, "answer", counted)
    (folder / "0.png").rename(folder / "late.png")
    rows[1]["question"] = "Is it green?"
    write_requests(folder, [*rows, {"question": "a", "image": "late.png"}, {"question": "new"}])
    found = answer(folder, nano)[1]
    assert sorted(asked) == [2, 5, 6]
    assert [found[i] for i in (0, 2, 3)] == [first[i] for i in (0, 2, 3)]
    assert all("answer" in row for row in found)
    asked.clear()
    write_requests(folder, rows[:2])  # shorter
    loads = []
    summary, found = answer(folder, loads)  # cannot be unpacked: it is not loaded
    assert (asked, summary.answered, len(found)) == ([], 2, 2)


def test_a_part_that_a_kill_cut_off(nano, folder):
    """Answers of earlier parts are kept; half a line, and what is no answer, are not."""
    rows = [{"question": q, "image": f"{i}.png"} for i, q in enumerate(QUESTIONS)]
    write_requests(folder, rows)
    whole = answer(folder, nano)[1]
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").unlink()
    parts = RunFolder(folder / "answers.jsonl")
    parts.path.mkdir()
    other = json.loads(lines[0]) | {"answer": "kept"}
    parts.part("old", 0).write_text(json.dumps(other) + "\n" + lines[1][:-5])
    parts.part("old", 1).write_text("[]\n{\n" + lines[3])
    parts.drop_plan()
    found = answer(folder, nano)[1]
    assert found == [whole[0] | {"answer": "kept"}, *whole[1:]]
    assert not parts.path.exists()
    assert sorted(p.name for p in folder.glob("answers*")) == ["answers.jsonl"]


def test_a_line_that_is_being_written_is_read_once_it_is_whole(tmp_path):
    reader, line = PartReader(tmp_path / "a"), b'{"line": 1, "digest": "a"}\n'
    assert list(reader.read()) == []
    (tmp_path / "a").write_bytes(line + line[:9])
    assert [offset for offset, _ in reader.read()] == [0]
    (tmp_path / "a").write_bytes(line + line[:-1])
    assert list(reader.read()) == []
    (tmp_path / "a").write_bytes(line + line + b'{"end": "full disk"}\n')
    assert [offset for offset, _ in reader.read()] == [len(line)]
    assert reader.end == "full disk"


def test_outputs_of_somebody_else_are_left_alone(nano, folder):
    path = write_requests(folder, [{"question": q} for q in QUESTIONS])
    output = folder / "answers.jsonl"
    output.write_text("mine\n")
    with pytest.raises(ValueError, match=r"^answer_file: .* holds no answers of this command"):
        answer(folder, nano)
    assert output.read_text() == "mine\n"
    first = answer(folder, nano, force=True)[1]
    for settings in ({"seed": 1}, {"model": "b"}, {"options": {}}, {"rope": "original"}):
        with pytest.raises(ValueError, match="of another model, or with other options"):
            answer(folder, nano, **settings)
    with pytest.raises(ValueError, match="another model"):
        answer(folder, nano, root=folder)
    write_requests(folder, [{"question": "other"}])
    with pytest.raises(ValueError, match="answers to other requests"):
        answer(folder, nano)
    assert read(output) == first
    assert [p.name for p in folder.glob("answers*")] == ["answers.jsonl"]
    assert len(answer(folder, nano, force=True)[1]) == 1
    with pytest.raises(ValueError, match="must be two files"):
        answer(folder, nano, name=path.name, force=True)
    with pytest.raises(ValueError, match="no directory"):
        answer(folder, nano, name="none/a.jsonl")
    (folder / "dir").mkdir()
    with pytest.raises(ValueError, match="output must be a file"):
        answer(folder, nano, name="dir")


def test_no_requests(nano, folder):
    write_requests(folder, ["", "  "])
    summary, found = answer(folder, nano)
    assert (summary.lines, summary.missing, found) == (0, 0, [])
    assert answer(folder, nano)[1] == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"rope": "none"}, "rope must be one of"),
        ({"options": {"num_beams": 0}}, "num_beams must be a whole number of at least 1"),
        ({"options": {"beams": 2}}, "options must be of"),
    ],
)
def test_wrong_settings(settings, said):
    with pytest.raises(ValueError, match=f"^BatchSettings: {said}"):
        BatchSettings("nano", **settings)


def test_a_checkpoint_is_known_by_its_contents(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(2**21))
        (tmp_path / name / "notes.txt").write_text(name)
    first = identify_checkpoint(tmp_path / "a")
    assert identify_checkpoint(tmp_path / "b") == first
    (tmp_path / "b" / "model.safetensors").write_bytes(bytes(2**21 - 1) + b"1")
    assert identify_checkpoint(tmp_path / "b") != first
    (tmp_path / "a" / "config.json").write_text("{ }")
    assert identify_checkpoint(tmp_path / "a") != first
