"""Writing to a directory: private and whole files, even if the disk is full or a writer killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from known import assert_same, batch_of, counts, files_of, memory_of, tiles

import comemo
from comemo.cli import main as cli
from comemo.store import directory as store_directory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        with pytest.raises(NotADirectoryError, match="MemoryStore: directory must be a directory"):
            comemo.MemoryStore(directory=path)


def test_directory_and_files_are_private(core, tmp_path):
    """Whatever the umask; an existing directory keeps its mode."""
    batch, before = batch_of(core, [2, "square", 3]), os.umask(0)
    try:
        tmp_path.chmod(0o755)
        for directory in (tmp_path / "new", tmp_path):
            memory_of(core, batch, comemo.MemoryStore(directory=directory))
    finally:
        os.umask(before)
    for path in (tmp_path, tmp_path / "new"):
        (file,) = files_of(path)
        assert file.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_full_disk_changes_no_answer(core, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store, batch = comemo.MemoryStore(directory=tmp_path), batch_of(core, [2, "square", 3])
    with pytest.warns(
        comemo.MemoryStoreWarning, match="cannot be written: No space left"
    ) as warned:
        assert_same(memory_of(core, batch, store), memory_of(core, batch))
    assert len(warned) == 1
    assert str(files_of(tmp_path)) == "[]"
    assert os.listdir(tmp_path) == [], "what was written is gone"
    memory_of(core, batch, store)
    assert counts(store, "misses", "hits", "disk_entries") == (1, 1, 0)


def test_a_directory_that_cannot_be_written(core, tmp_path):
    directory = tmp_path / "store"
    store, batch = comemo.MemoryStore(directory=directory), batch_of(core, [2, "square", 3])
    directory.rmdir()
    directory.write_text("somebody else's")
    with pytest.warns(comemo.MemoryStoreWarning) as warned:
        assert_same(memory_of(core, batch, store), memory_of(core, batch))
    assert any("cannot be written" in str(warning.message) for warning in warned)
    assert counts(store, "misses", "entries", "disk_entries") == (1, 1, 0)
    directory.unlink()
    store.clear()
    memory_of(core, batch, store)  # created again
    assert store.stats.disk_entries == 1


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere"
)
def test_a_directory_without_permission(core, tmp_path):
    tmp_path.chmod(0o500)
    try:
        store, batch = comemo.MemoryStore(directory=tmp_path), batch_of(core, [2, "square", 3])
        with pytest.warns(comemo.MemoryStoreWarning, match="Permission denied"):
            memory_of(core, batch, store)
        with pytest.warns(comemo.MemoryStoreWarning, match="cannot be created: Permission denied"):
            comemo.MemoryStore(directory=tmp_path / "below")
    finally:
        tmp_path.chmod(0o700)


def test_leftovers_of_dead_writers_are_swept(tmp_path):
    here, gone, key = store_directory.host(), subprocess.Popen(["true"]), "0" * 64
    gone.wait()
    hour = store_directory.LEFTOVER
    kept = {
        "alive": (f"{key}.part-{here}-{os.getpid()}-aaaaaaaa", 0),
        "somewhere else": (f"{key}.part-0123abcd-{gone.pid}-aaaaaaaa", hour - 60),
        "a film": ("movie.part-1.rar", 2 * hour),
        "a film of another host": (f"movie.part-0123abcd-{gone.pid}-aaaaaaaa", 2 * hour),
        "no key": (f"k.part-{here}-{gone.pid}-aaaaaaaa", 2 * hour),
        "no number": (f"{key}.part-{here}-x-aaaaaaaa", 2 * hour),
        "a number of thousands of digits would do": (f"{key}.part-{here}-{'9' * 99}-a", 2 * hour),
        "more after it": (f"{key}.part-{here}-{gone.pid}-aaaaaaaa.rar", 2 * hour),
        "other names": (f"{key}.part", 2 * hour),
    }
    swept = {
        "dead": (f"{key}.part-{here}-{gone.pid}-aaaaaaaa", 0),
        "old": (f"{key}.part-{here}-{os.getpid()}-bbbbbbbb", hour + 60),
        "old, somewhere else": (f"{key}.part-0123abcd-{os.getpid()}-aaaaaaaa", hour + 60),
        "old, a number that is no process": (f"{key}.part-{here}-9999999999-cccccccc", hour + 60),
    }
    for name, age in (*kept.values(), *swept.values()):
        (tmp_path / name).write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / name, (then, then))
    comemo.MemoryStore(directory=tmp_path)
    assert set(os.listdir(tmp_path)) == {name for name, _ in kept.values()}
    cli.main(["store", "rm", str(tmp_path), "--all"])
    assert set(os.listdir(tmp_path)) == {name for name, _ in kept.values()}


CHILD = """
import sys, time, torch
from pathlib import Path
from comemo.store import files as store_files
from comemo.store.headers import read_header
path = Path(sys.argv[1])
header, old = read_header(path), store_files.chunks_of
image = store_files.read_memory(path, {}, store_files.tensors_of(header))
def slowly(tensor):
    for chunk in old(tensor):
        for start in range(0, len(chunk), 1000):
            yield chunk[start:start + 1000]
            time.sleep(0.01)
store_files.chunks_of = slowly
print("writing", flush=True)
store_files.write_memory(path, image, {n: header.facts[n] for n in ("key", "model", "dtype")})
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file(core, stored):
    batch, wanted, path = stored
    good = path.read_bytes()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, path], stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    )
    try:
        assert child.stdout.readline() == b"writing\n"
        until = time.monotonic() + 20
        while not any(part.stat().st_size > 8000 for part in path.parent.glob("*.part-*")):
            assert time.monotonic() < until
            assert child.poll() is None
            time.sleep(0.01)
        comemo.MemoryStore(directory=path.parent)
        assert list(path.parent.glob("*.part-*")), "of a writer at work"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    (part,) = path.parent.glob("*.part-*")
    assert 8000 < part.stat().st_size < len(good)
    assert path.read_bytes() == good
    store = comemo.MemoryStore(directory=path.parent)
    assert os.listdir(path.parent) == [path.name]
    assert_same(memory_of(core, batch, store), wanted)
    assert store.stats.disk_hits == 1


BESIDE = """
import sys, torch, warnings
import comemo
warnings.simplefilter("error", comemo.MemoryStoreWarning)
torch.set_num_threads(1)
checkpoint, directory, pixels, turns = sys.argv[1:]
model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).model
pixels, ids = torch.load(pixels), torch.arange(256)[None]
mask = torch.ones_like(ids, dtype=torch.bool)
store = comemo.MemoryStore(budget=0, directory=directory)
first = model.build_image_memory(pixels, mask, ids, [(1, 1)], store)
assert (store.stats.disk_hits, store.stats.misses) == (1, 0), store.stats
print("ready", flush=True)
for turn in range(int(turns)):
    if turn % 3 == 0:
        store.clear(disk=True)
    memory = model.build_image_memory(pixels, mask, ids, [(1, 1)], store)
    assert torch.allclose(memory.keys[3], first.keys[3], atol=1e-5)
assert store.stats.refused == 0
print("done", store.stats.misses)
"""


@pytest.mark.slow
def test_two_processes_share_a_directory(core, demo_checkpoint, stored, tmp_path_factory):
    """Both write, read and remove the same file; neither ever reads half of it."""
    _, _, path = stored
    pixels = tmp_path_factory.mktemp("pixels") / "pixels.pt"
    torch.save(tiles()["square"], pixels)
    child = subprocess.Popen(
        [sys.executable, "-c", BESIDE, demo_checkpoint, path.parent, pixels, "12"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    ids = torch.arange(256)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    assert child.stdout.readline() == b"ready\n", child.stderr.read()
    store, wanted = comemo.MemoryStore(budget=0, directory=path.parent), None
    while child.poll() is None:
        memory = core.build_image_memory(tiles()["square"], mask, ids, [(1, 1)], store)
        wanted = memory if wanted is None else wanted
        assert torch.allclose(memory.keys[3], wanted.keys[3], atol=1e-5)
    out, err = child.communicate()
    assert child.returncode == 0, err
    assert out.startswith(b"done")
    assert store.stats.refused == 0
    assert store.stats.disk_hits > 0
    assert not list(path.parent.glob("*.part-*"))
