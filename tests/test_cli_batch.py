"""`comemo batch` as users see it: output, exit status, notes, Ctrl-C."""

import json
import shutil

import pytest
import torch
from batches import draw, read, write_requests
from commands import fails, run

import comemo
from comemo import nano
from comemo.cli import batch, info
from comemo.cli import main as cli

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ["--max-new-tokens", "8", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    draw(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def called(monkeypatch):
    """The settings that `answer_file` is called with; nothing is answered."""
    found = []

    def note(requests, output, load, settings, rank, **_):
        found.append((settings, rank))
        return batch.Summary(3, 3)

    monkeypatch.setattr(batch, "answer_file", note)
    return found


def test_help_shows_the_forms(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for text in ("requests.jsonl", "history", "messages", "torchrun", "Exit status", "--top-p"):
        assert text in out


def test_answers_are_those_of_chat(capsys, folder):
    rows = [{"question": "Which colour is it?", "image": f"{i}.png", "id": i} for i in range(2)]
    write_requests(folder, [*rows, {"question": "Hello."}])
    status, out, err = run(capsys, "batch", "nano", "requests.jsonl", "-o", "a.jsonl", *QUICK)
    assert (status, out, err) == (0, "a.jsonl: 3 answers\n", "")
    found = read(folder / "a.jsonl")
    for row, image in zip(found, (["--image", "0.png"], ["--image", "1.png"], []), strict=True):
        question = "Which colour is it?" if image else "Hello."
        words = ("chat", "nano", question, *image, *QUICK, "--dtype", "float32")
        assert run(capsys, *words)[1] == row["answer"] + "\n"
    assert [row.get("id") for row in found] == [0, 1, None]
    written = (folder / "a.jsonl").read_bytes()
    assert run(capsys, "batch", "nano", "requests.jsonl", "-o", "a.jsonl", *QUICK)[0] == 0
    assert (folder / "a.jsonl").read_bytes() == written


def test_failed_lines_are_named(capsys, folder):
    write_requests(folder, [{"question": "a", "image": "x\x1b.png"}, "{", {"question": "Hello."}])
    words = ("batch", "nano", folder / "requests.jsonl", "-o", "a.jsonl", *QUICK)
    status, out, err = run(capsys, *words)
    assert (status, out) == (1, "a.jsonl: 1 answer, 2 errors\n")
    first, second = sorted(err.splitlines())
    place = f"comemo: warning: {folder / 'requests.jsonl'}"
    assert first == f"{place}:1: No such file or directory: '{folder}/x\\x1b.png'"
    assert second.startswith(f"{place}:2: broken JSON: ")
    assert ["error" in row for row in read(folder / "a.jsonl")] == [True, True, False]


def test_root_and_store(capsys, folder):
    (folder / "asked").mkdir()
    write_requests(folder, [{"question": "What?", "image": "0.png"}] * 2, "asked/r.jsonl")
    words = ("batch", "nano", "asked/r.jsonl", "-o", "a.jsonl", *QUICK)
    assert run(capsys, *words)[0] == 1
    assert "with other options" in fails(capsys, *words, "--root", ".")
    again = (*words, "--root", ".", "--force", "--store", "known")
    assert run(capsys, *again)[:2] == (0, "a.jsonl: 2 answers\n")
    out = run(capsys, "store", "stats", "known", "--json")[1]
    assert json.loads(out)["images"] == 1


def test_options_reach_the_run(capsys, folder, called, monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    options = ("--temperature", "0.5", "--top-k", "3", "--num-beams", "2", "--seed", "7")
    others = ("--batch", "3", "--rope", "original", "--max-tiles", "2", "--system", "s")
    words = ("batch", "nano", "r.jsonl", "-o", "a", *options, *others, "--published-pixels")
    assert run(capsys, *words, "--device", "cpu") == (0, "", "")
    ((settings, rank),) = called
    assert settings.options == {"temperature": 0.5, "top_k": 3, "num_beams": 2}
    facts = (settings.seed, settings.batch, settings.rope, settings.max_tiles, settings.system)
    assert facts == (7, 3, "original", 2, "s")
    assert (settings.published, settings.force, settings.model[-7:]) == (True, False, "float32")
    assert (rank.index, rank.count) == (1, 2)


def test_lines_without_an_answer_are_a_failure(capsys, folder, monkeypatch):
    monkeypatch.setattr(batch, "answer_file", lambda *_, **__: batch.Summary(9, 4, 2))
    status, out, err = run(capsys, "batch", "nano", "r.jsonl", "-o", "a.jsonl", "--device", "cpu")
    assert (status, out) == (1, "")
    assert err == (
        "comemo: error: 3 of 9 lines have no answer yet: the same command answers them\n"
    )


def test_ctrl_c_says_how_to_go_on(capsys, folder, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(batch, "answer_file", stop)
    words = ("batch", "nano", "r.jsonl", "-o", "a.jsonl", "--device", "cpu")
    assert run(capsys, *words) == (130, "", "\nstopped: the same command resumes a.jsonl\n")
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert run(capsys, *words) == (130, "", "")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["batch"], "MODEL, REQUESTS, -o/--output"),
        (["batch", "nano", "r.jsonl"], "-o/--output"),
        (["batch", "/no/such", "r.jsonl", "-o", "a"], "no directory '/no/such'"),
        (["batch", "nano", "none.jsonl", "-o", "a"], "No such file or directory: 'none.jsonl'"),
        (["batch", "nano", ".", "-o", "a"], "requests must be a file"),
        (["batch", "nano", "requests.jsonl", "-o", "none/a"], "no directory 'none'"),
        (["batch", "nano", "requests.jsonl", "-o", "requests.jsonl"], "must be two files"),
        (["batch", "nano", "requests.jsonl", "-o", "a", "--root", "x"], "no directory 'x'"),
        (["batch", "nano", "requests.jsonl", "-o", "a", "--batch", "0"], "got '0'"),
        (["batch", "nano", "requests.jsonl", "-o", "a", "--top-p", "2"], "at most 1, got '2'"),
        (["batch", "nano", "requests.jsonl", "-o", "a", "--device", "x"], "no device 'x'"),
        (["batch", "nano", "requests.jsonl", "-o", "a", "--store-budget", "1"], "needs --store"),
    ],
)
def test_mistakes(capsys, argv, said, folder):
    write_requests(folder, [{"question": "Hello."}])
    before = sorted(folder.iterdir())
    assert said in fails(capsys, *argv)
    assert sorted(folder.iterdir()) == before


def test_a_model_whose_memories_cannot_be_stored(capsys, folder, monkeypatch):
    """It is answered without a store, and refused with one."""
    copy = folder / "model"
    shutil.copytree(nano.checkpoint(), copy)
    config = json.loads((copy / "config.json").read_text()) | {"memory_positions": "absolute"}
    (copy / "config.json").write_text(json.dumps(config))
    assert info.read_config(copy).memory_positions == "absolute"
    write_requests(folder, [{"question": "What?", "image": "0.png"}] * 2)
    words = ("batch", copy, "requests.jsonl", "-o", "a.jsonl", *QUICK)
    assert run(capsys, *words)[:2] == (0, "a.jsonl: 2 answers\n")
    assert "memory_positions must be 'relative'" in fails(
        capsys, *words, "--force", "--store", "known"
    )
    assert [path.name for path in folder.glob("a.jsonl*")] == ["a.jsonl"]


def test_auto_of_a_cpu_is_the_same_on_all_ranks(capsys, folder, called, monkeypatch):
    monkeypatch.setattr(comemo.device, "default_dtype", lambda device: torch.bfloat16)
    for dtype in ("auto", "float32", "bfloat16"):
        words = ("batch", "nano", "r.jsonl", "-o", "a", "--device", "cpu", "--dtype", dtype)
        assert run(capsys, *words)[0] == 0
    models = [settings.model for settings, _ in called]
    assert models[0] == models[1] != models[2]
