"""`comemo chat --store` and `comemo store`, as users see them."""

import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from commands import QUICK, expected, fails, run

import comemo
from comemo.cli import main as cli
from comemo.store import directory as store_directory
from comemo.store import files as store_files
from comemo_kernels import ImageMemory

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, DAY = "e" * 64, 86400


@pytest.fixture
def store(tmp_path):
    """A directory with three small images, the first least recently used, and a broken file."""
    for number, tokens in enumerate((4, 8, 6)):
        memory = ImageMemory(
            media=torch.randn(tokens, 4),
            ids=torch.arange(tokens).int(),
            sizes=(tokens,),
            keys={1: torch.randn(tokens, 2, 4)},
            values={1: torch.randn(tokens, 2, 4)},
        )
        key = f"ab{number}".ljust(64, "c")
        facts = {"key": key, "model": MODEL if number else "d" * 64, "dtype": "float32"}
        path = tmp_path / f"{key}.safetensors"
        store_files.write_memory(path, memory, facts)
        used = time.time() - (10 - number) * DAY
        os.utime(path, (used, used))
    (tmp_path / f"{'f' * 64}.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"none of ours")
    (tmp_path / "ab.txt").write_text("nor this")
    return tmp_path


def keys_of(store):
    return sorted(path.stem[:3] for path, _ in store_directory.list_files(store))


def test_chat_stores_images_and_finds_them(
    capsys, demo_checkpoint, loaded, picture_file, tmp_path, monkeypatch
):
    argv = ["chat", demo_checkpoint, "What?", "--image", picture_file, *QUICK]
    argv += ["--store", tmp_path / "store"]
    wanted = expected(loaded, picture_file, "What?") + "\n"
    assert run(capsys, *argv) == (0, wanted, "")
    assert len(os.listdir(tmp_path / "store")) == 1

    def never(*_):
        raise AssertionError("the tower ran")

    monkeypatch.setattr(comemo.CoMemoModel, "project_images", never)
    assert run(capsys, *argv, "--store-budget", "1") == (0, wanted, "")


def test_chat_reports_a_bad_file_in_one_line(
    capsys, demo_checkpoint, loaded, picture_file, tmp_path
):
    argv = ["chat", demo_checkpoint, "What?", "--image", picture_file, *QUICK, "--store", tmp_path]
    wanted = expected(loaded, picture_file, "What?") + "\n"
    run(capsys, *argv)
    (name,) = os.listdir(tmp_path)
    os.truncate(tmp_path / name, 100)
    status, out, err = run(capsys, *argv)
    assert (status, out) == (0, wanted)
    assert err.startswith(f"comemo: warning: {tmp_path / name} is refused")
    assert err.count("\n") == 1
    assert run(capsys, *argv) == (0, wanted, "")


def test_chat_keeps_the_disk_budget(capsys, demo_checkpoint, picture_file, tmp_path):
    argv = ["chat", demo_checkpoint, "What?", "--image", picture_file, *QUICK, "--store", tmp_path]
    assert run(capsys, *argv, "--store-budget", "0.001")[0] == 0
    assert os.listdir(tmp_path) == [], "a picture of 1.3 MB"
    assert run(capsys, *argv, "--store-budget", "0.002")[0] == 0
    assert len(os.listdir(tmp_path)) == 1


def test_later_turns_reuse_the_image(capsys, demo_checkpoint, picture_file, tmp_path, monkeypatch):
    seen, features = [], comemo.CoMemoModel.project_images

    def counted(self, pixel_values):
        seen.append(len(pixel_values))
        return features(self, pixel_values)

    monkeypatch.setattr(comemo.CoMemoModel, "project_images", counted)
    argv = ["chat", demo_checkpoint, "--image", picture_file, *QUICK, "--store", tmp_path]
    asked = run(capsys, *argv, stdin="What?\nAnd now?\n", monkeypatch=monkeypatch)
    assert asked[0] == 0
    assert len(seen) == 1


def test_mistakes_with_a_store(capsys, demo_checkpoint, picture_file):
    argv = ["chat", demo_checkpoint, "What?", *QUICK]
    assert "--store-budget needs --store" in fails(capsys, *argv, "--store-budget", "1")
    assert "above 0, got '0'" in fails(capsys, *argv, "--store-budget", "0")
    assert "above 0, got 'nan'" in fails(capsys, *argv, "--store-budget", "nan")
    assert "path and not empty" in fails(capsys, *argv, "--store", "")
    for huge in ("inf", "1e308"):
        said = fails(capsys, *argv, "--store", picture_file, "--store-budget", huge)
        assert f"--store-budget must be finite, got {float(huge):g}" in said
    assert "irectory" in fails(capsys, *argv, "--store", picture_file)


def test_ls(capsys, store):
    status, out, err = run(capsys, "store", "ls", store)
    head, *lines = out.splitlines()
    assert (status, err) == (0, "")
    assert head.split() == ["key", "tokens", "bytes", "dtype", "model", "last", "use"]
    size = (store / f"{'ab1'.ljust(64, 'c')}.safetensors").stat().st_size
    keys = ["ab0ccccccccc", "ab1ccccccccc", "ab2ccccccccc", "ffffffffffff"]
    assert [line.split()[0] for line in lines] == keys
    assert lines[1].split()[1:5] == ["8", f"{size:,}", "float32", "e" * 12]
    assert lines[3].endswith("0  broken: it is empty")
    rows = json.loads(run(capsys, "store", "ls", store, "--json")[1])
    assert [row["key"][:3] for row in rows] == ["ab0", "ab1", "ab2", "fff"]
    assert rows[1]["tokens"] == 8
    assert rows[1]["bytes"] == (store / f"{rows[1]['key']}.safetensors").stat().st_size
    assert (rows[1]["model"], rows[1]["dtype"]) == (MODEL, "float32")
    assert rows[0]["used"].startswith(time.strftime("%Y-", time.gmtime(time.time() - 10 * DAY)))
    assert rows[3]["broken"] == "it is empty"


def test_ls_reads_no_tensor_and_names_every_fault(capsys, store, monkeypatch):
    """A renamed file is useless under its new name; a file that is gone is not a fault.

    What is no regular file is none of ours, whatever its name.
    """
    (path,) = store.glob("ab1*")
    path.rename(store / f"{'0' * 64}.safetensors")
    (store / f"{'1' * 64}.safetensors").write_bytes(b"hello, this is a text file")
    (store / f"{'2' * 64}.safetensors").mkdir()
    found = store_directory.list_files(store)
    gone = (store / f"{'3' * 64}.safetensors", found[0][1])
    monkeypatch.setattr(store_directory, "list_files", lambda directory: [*found, gone])
    monkeypatch.delattr(store_files, "read_memory")
    rows = json.loads(run(capsys, "store", "ls", store, "--json")[1])
    faults = {row["key"][0]: row["broken"] for row in rows if "broken" in row}
    assert faults == {
        "f": "it is empty",
        "0": "its key is ab1ccccccccc",
        "1": "it is not a safetensors file",
    }


def test_stats(capsys, store):
    facts = json.loads(run(capsys, "store", "stats", store, "--json")[1])
    sizes = [path.stat().st_size for path in sorted(store.glob("ab*.safetensors"))]
    assert (facts["images"], facts["broken"], facts["bytes"]) == (3, 1, sum(sizes))
    assert facts["models"] == {
        "d" * 64: {"images": 1, "bytes": sizes[0]},
        MODEL: {"images": 2, "bytes": sizes[1] + sizes[2]},
    }
    assert facts["first_use"] < facts["last_use"]
    status, out, err = run(capsys, "store", "stats", store)
    assert (status, err) == (0, "")
    assert f"3 images, 1 broken file, {sum(sizes):,} bytes" in out
    assert "model eeeeeeeeeeee: 2 images" in out


def test_an_empty_directory(capsys, tmp_path):
    assert run(capsys, "store", "ls", tmp_path) == (0, "", "")
    assert json.loads(run(capsys, "store", "ls", tmp_path, "--json")[1]) == []
    assert "0 images, 0 broken files, 0 bytes" in run(capsys, "store", "stats", tmp_path)[1]
    assert run(capsys, "store", "rm", tmp_path, "--all")[1] == "removed 0 images, 0 bytes\n"


def test_rm_by_keys(capsys, store):
    size = next(store.glob("ab1*")).stat().st_size
    out = run(capsys, "store", "rm", store, "AB1", "ab1cc", "--json")[1]
    assert json.loads(out) == {"removed": ["ab1" + "c" * 61], "bytes": size}
    assert keys_of(store) == ["ab0", "ab2", "fff"]
    status, out, _ = run(capsys, "store", "rm", store, "f", "ab0")
    assert (status, out.split(",")[0]) == (0, "removed 2 images")
    assert keys_of(store) == ["ab2"]
    assert (store / "model.safetensors").exists()


def test_rm_by_age_and_all(capsys, store):
    run(capsys, "store", "rm", store, "--older-than", "20")
    assert keys_of(store) == ["ab0", "ab1", "ab2", "fff"]
    run(capsys, "store", "rm", store, "--older-than", "8.5")
    assert keys_of(store) == ["ab2", "fff"]
    part = store / f"{'0' * 64}.part-00000000-1-00000000"
    part.write_bytes(b"")
    os.utime(part, (0, 0))
    run(capsys, "store", "rm", store, "--older-than", "0")
    assert keys_of(store) == []
    assert sorted(os.listdir(store)) == ["ab.txt", "model.safetensors"], "none of ours"


@pytest.mark.parametrize("time", [-(2**40), 2**40])
def test_times_that_no_calendar_has(capsys, store, monkeypatch, time):
    """Some file systems accept any time, and anyone who may write can set it."""
    path, status = store_directory.list_files(store)[0]
    odd = SimpleNamespace(st_size=status.st_size, st_mtime=time)
    monkeypatch.setattr(store_directory, "list_files", lambda directory: [(path, odd)])
    for action in (["ls"], ["ls", "--json"], ["stats"], ["stats", "--json"]):
        status, out, err = run(capsys, "store", *action, store)
        assert (status, err) == (0, "")
        assert f"{time} s since 1970" in out


def test_rm_all_leaves_foreign_files(capsys, store):
    assert run(capsys, "store", "rm", store, "--all")[1].startswith("removed 4 images, ")
    assert sorted(os.listdir(store)) == ["ab.txt", "model.safetensors"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ab"], "several keys begin with 'ab'; nothing was removed"),
        (["ab1", "model"], "no key begins with 'model'; nothing was removed"),
        ([""], "several keys begin with ''"),
        ([], "wanted either KEYs, --all or --older-than DAYS"),
        (["ab1", "--all"], "wanted either"),
        (["--all", "--older-than", "0"], "wanted either"),
        (["--older-than", "-1"], "at least 0, got '-1'"),
        (["--older-than", "nan"], "at least 0, got 'nan'"),
    ],
)
def test_rm_with_wrong_arguments(capsys, store, words, said):
    assert said in fails(capsys, "store", "rm", store, *words)
    assert keys_of(store) == ["ab0", "ab1", "ab2", "fff"]


def test_mistakes_on_the_command_line(capsys, tmp_path):
    for none in (tmp_path / "none", ""):
        for action in (["ls"], ["stats"], ["rm", "--all"]):
            assert "there is no directory" in fails(capsys, "store", *action, none)
    assert "ACTION" in fails(capsys, "store")
    assert "invalid choice: 'mv'" in fails(capsys, "store", "mv", tmp_path)
    for debug in (["store", "--debug", "ls"], ["store", "ls", "--debug"]):
        status, _, err = run(capsys, *debug, tmp_path / "none")
        assert status == 2
        assert "Traceback" in err
    with pytest.raises(SystemExit):
        cli.main(["store", "rm", "--help"])
