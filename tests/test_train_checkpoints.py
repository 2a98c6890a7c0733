"""Checkpoints are whole or not there: full disks, kills at any moment, files that changed."""

import errno
import os
import re
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from comemo.train import checkpoints
from comemo.train.checkpoints import NotWritten, clean_up, find_checkpoint, write_checkpoint


def fill(folder):
    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    torch.save({"state": torch.ones(3)}, folder / "optimizer.pt")
    (folder / "parts").mkdir()
    (folder / "parts" / "tokenizer.json").write_text("{}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_found_and_older_ones_go(tmp_path):
    assert find_checkpoint(tmp_path / "nothing") == (None, [])
    for step in (2, 9, 10, 100):
        assert write_checkpoint(tmp_path, step, fill, keep=2) == tmp_path / f"checkpoint-{step}"
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    found, faults = find_checkpoint(tmp_path)
    assert (found, faults) == (tmp_path / "checkpoint-100", [])
    assert names(found) == ["model.safetensors", "optimizer.pt", "parts", "whole.json"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    write_checkpoint(tmp_path, 3, fill)
    write_checkpoint(tmp_path, 3, lambda folder: (folder / "new").write_text("x"))
    assert names(tmp_path / "checkpoint-3") == ["new", "whole.json"]
    assert names(tmp_path) == ["checkpoint-3"]


def truncated(file):
    file.write_bytes(file.read_bytes()[:-1])


def changed(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "spoil", "said"),
    [
        ("model.safetensors", truncated, r"model.safetensors has \d+ bytes instead of \d+"),
        ("optimizer.pt", changed, "optimizer.pt has changed"),
        ("parts/tokenizer.json", lambda file: file.unlink(), "parts/tokenizer.json is missing"),
        ("whole.json", lambda file: file.unlink(), "it has no whole.json"),
        ("whole.json", truncated, "its whole.json cannot be read"),
        ("whole.json", lambda file: file.write_text("[]"), "its whole.json cannot be read"),
    ],
)
def test_a_spoiled_checkpoint_is_passed_over(tmp_path, file, spoil, said):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, fill)
    spoil(tmp_path / "checkpoint-2" / file)
    found, faults = find_checkpoint(tmp_path)
    assert found == tmp_path / "checkpoint-1"
    assert len(faults) == 1
    assert re.search(said, faults[0]), faults[0]
    spoil(tmp_path / "checkpoint-1" / file)
    assert find_checkpoint(tmp_path)[0] is None


def full(folder):
    fill(folder)
    raise OSError(errno.ENOSPC, "No space left on device")


def full_safetensors(folder):
    raise SafetensorError("IoError(No space left on device)")


@pytest.mark.parametrize("fails", [full, full_safetensors])
def test_a_full_disk_leaves_the_older_ones(tmp_path, fails):
    write_checkpoint(tmp_path, 1, fill, keep=1)
    with pytest.raises(NotWritten, match=r"checkpoint-2 cannot be written: .*No space left"):
        write_checkpoint(tmp_path, 2, fails, keep=1)
    assert names(tmp_path) == ["checkpoint-1"]
    assert find_checkpoint(tmp_path)[0] == tmp_path / "checkpoint-1"
    write_checkpoint(tmp_path, 2, fill, keep=1)
    assert names(tmp_path) == ["checkpoint-2"]


@contextmanager
def largest_file(nbytes):
    """The system refuses to write beyond, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["torch", "safetensors", "text"])
def test_what_libraries_raise_when_a_write_fails(tmp_path, kind):
    big = torch.zeros(2**19)

    def write(folder):
        if kind == "torch":
            torch.save(big, folder / "optimizer.pt")
        elif kind == "safetensors":
            save_file({"w": big}, folder / "model.safetensors")
        else:
            (folder / "text").write_text("x" * 2**21)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with largest_file(2**20), pytest.raises(NotWritten, match="cannot be written"):
            write_checkpoint(tmp_path, 1, write)
    finally:
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_other_exceptions_pass_and_leave_nothing(tmp_path, kind):
    def stops(folder):
        fill(folder)
        raise kind

    with pytest.raises(kind):
        write_checkpoint(tmp_path, 1, stops)
    assert names(tmp_path) == []


# The moments of a write: each call of these is one.
MOMENTS = ("_flush", "_checksum", "_remove")


@pytest.mark.parametrize("moment", range(15))
def test_a_kill_at_any_moment_leaves_a_whole_one(tmp_path, moment):
    """kill -9 in a child process, before the n-th call of a function of the writing."""
    for step in (1, 2):
        write_checkpoint(tmp_path, step, fill)
    child = os.fork()
    if not child:
        calls = 0

        def counted(function):
            def call(*args):
                nonlocal calls
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return function(*args)

            return call

        for name in MOMENTS:
            setattr(checkpoints, name, counted(getattr(checkpoints, name)))
        try:
            write_checkpoint(tmp_path, 3, fill, keep=1)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed == (moment < 14)  # the last one is after the end
    found, faults = find_checkpoint(tmp_path)
    assert found is not None
    assert faults == []
    clean_up(tmp_path)
    left = names(tmp_path)
    assert all(name.startswith("checkpoint-") for name in left)
    if not killed:
        assert left == ["checkpoint-3"]
    write_checkpoint(tmp_path, 3, fill, keep=1)
    assert names(tmp_path) == ["checkpoint-3"]
