"""Budgets of a store, in memory and on disk, and what it says about itself."""

import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
from known import (
    GRIDS,
    assert_same,
    batch_of,
    counts,
    files_of,
    key_of,
    memory_bytes,
    memory_of,
    tensors,
)

import comemo

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


# --- budgets ---


def known(store, core, *names):
    """Which of these images are in memory; asking the store itself would count as a use."""
    return [name for name in names if key_of(core, batch_of(core, [1, name])) in set(store)]


def test_the_least_recently_used_are_removed(core):
    one = memory_bytes(core, "square")
    store = comemo.MemoryStore(budget=2 * one)

    def see(*names):
        for name in names:
            memory_of(core, batch_of(core, [1, name]), store)

    shifted = batch_of(core, [1, "square"])
    shifted["pixel_values"] = shifted["pixel_values"] + 1
    see("square", "other")
    assert counts(store, "entries", "bytes", "evictions") == (2, 2 * one, 0)
    see("square")  # in use again
    memory_of(core, shifted, store)
    assert counts(store, "entries", "bytes", "evictions") == (2, 2 * one, 1)
    assert known(store, core, "square", "other") == ["square"]
    see("other")
    assert known(store, core, "square", "other") == ["other"]
    assert counts(store, "hits", "misses", "evictions") == (1, 4, 2)
    assert list(store)[-1] == key_of(core, batch_of(core, [1, "other"]))
    store.clear()
    assert counts(store, "entries", "bytes") == (0, 0)
    assert len(store) == 0


def test_bytes_are_those_of_the_storages(core):
    """Also for images that were built together: no view keeps a larger storage alive."""
    store = comemo.MemoryStore()
    memory_of(core, batch_of(core, ["square", 3, "other"], ["wide"]), store)
    for image, name in zip(store._held.values(), GRIDS, strict=True):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors(image)}
        assert sum(s.nbytes() for s in storages.values()) == memory_bytes(core, name)
        assert image.table is None
    assert store.stats.bytes == sum(memory_bytes(core, name) for name in GRIDS)


def test_an_image_larger_than_the_budget(core, tmp_path):
    one = memory_bytes(core, "square")
    batch = batch_of(core, [2, "square", 3, "wide"])
    wanted = memory_of(core, batch)
    store = comemo.MemoryStore(budget=one)
    assert_same(memory_of(core, batch, store), wanted)
    assert counts(store, "too_large", "entries", "bytes", "evictions") == (1, 1, one, 0)
    nothing = comemo.MemoryStore(budget=0, directory=tmp_path)
    for _ in range(2):
        assert_same(memory_of(core, batch, nothing), wanted)
    assert counts(nothing, "entries", "misses", "disk_hits", "too_large") == (0, 2, 2, 4)
    bounded = comemo.MemoryStore(directory=tmp_path / "bounded", disk_budget=one + 4096)
    memory_of(core, batch, bounded)
    assert counts(bounded, "entries", "disk_entries", "too_large") == (2, 1, 1)
    assert not list((tmp_path / "bounded").glob("*.part*"))


def test_the_disk_budget_is_kept(core, tmp_path):
    one = memory_bytes(core, "square")
    store = comemo.MemoryStore(directory=tmp_path, disk_budget=2 * one + 8192)
    batches = [batch_of(core, [1, "square"]) for _ in range(3)]
    keys = []
    for shift, batch in enumerate(batches):
        batch["pixel_values"] = batch["pixel_values"] + shift
        keys.append(key_of(core, batch))
    long_ago = time.time() - 1000
    for batch in batches[:2]:
        memory_of(core, batch, store)
    for age, key in enumerate(keys[:2]):
        os.utime(tmp_path / f"{key}.safetensors", (long_ago + age, long_ago + age))
    memory_of(core, batches[0], store)  # found in memory, but the file counts as used too
    memory_of(core, batches[2], store)
    assert {path.stem for path in files_of(tmp_path)} == {keys[0], keys[2]}
    assert counts(store, "disk_entries", "entries") == (2, 3)
    os.utime(tmp_path / f"{keys[0]}.safetensors", (long_ago, long_ago))
    again = comemo.MemoryStore(directory=tmp_path, disk_budget=2 * one + 8192)
    memory_of(core, batches[0], again)  # read, and so used
    memory_of(core, batches[1], again)
    assert {path.stem for path in files_of(tmp_path)} == {keys[0], keys[1]}
    assert counts(again, "disk_hits", "misses") == (1, 1)


def test_a_file_larger_than_the_budget_is_removed_first(core, tmp_path):
    """Even if it was used last: it exceeds the budget by itself."""
    giant, late = tmp_path / f"{'f' * 64}.safetensors", time.time() + 10**6
    giant.touch()
    os.truncate(giant, 2**40)
    os.utime(giant, (late, late))
    store = comemo.MemoryStore(directory=tmp_path, disk_budget=10**8)
    memory_of(core, batch_of(core, [1, "square", 2, "other"]), store)
    assert store.stats.disk_entries == 2
    assert not giant.exists()


def test_a_file_that_cannot_be_removed_is_reported(core, tmp_path, monkeypatch):
    """As files of other users in /tmp: no image is removed in their place."""
    theirs, old, broken = (tmp_path / f"{digit * 64}.safetensors" for digit in "abc")
    size = memory_bytes(core, "square")
    for age, (path, length) in enumerate([(theirs, size), (old, size), (broken, 10)]):
        path.write_bytes(b"x" * length)
        os.utime(path, (age, age))
    unlink = Path.unlink

    def refuse(path, missing_ok=False):
        if path == theirs:
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    store = comemo.MemoryStore(directory=tmp_path, disk_budget=size + 4096)
    with pytest.warns(comemo.MemoryStoreWarning) as warned:
        memory_of(core, batch_of(core, [1, "square"]), store)
    wanted = f"MemoryStore: {tmp_path} exceeds its budget: {theirs}: Operation not permitted"
    assert [str(warning.message) for warning in warned] == [wanted]
    assert not old.exists()
    assert len(files_of(tmp_path)) == 3
    with pytest.raises(PermissionError):
        store.clear(disk=True)
    assert files_of(tmp_path) == [theirs]


def test_a_store_lists_its_keys(core, tmp_path):
    store = comemo.MemoryStore(directory=tmp_path)
    memory_of(core, batch_of(core, ["square", 2, "wide"]), store)
    (tmp_path / "notes.safetensors").write_bytes(b"none of ours")
    keys = list(store)
    assert len(store) == len(keys) == 2
    store.clear()
    assert set(store) == set(keys)
    assert keys[0] in store
    assert "0" * 64 not in store
    assert 3 not in store
    assert counts(store, "entries", "disk_entries") == (0, 2)
    store.clear(disk=True)
    assert len(store) == 0
    assert keys[0] not in store
    assert os.listdir(tmp_path) == ["notes.safetensors"]


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, -math.inf, True, "5", 1j, [5]])
@pytest.mark.parametrize("name", ["budget", "disk_budget"])
def test_invalid_budgets(name, value, tmp_path):
    with pytest.raises(ValueError, match=r"^MemoryStore: budget and disk_budget must be finite"):
        comemo.MemoryStore(**{"directory": tmp_path / "x", name: value})
    assert os.listdir(tmp_path) == []


def test_unusual_numbers_as_budgets(tmp_path):
    for value in (0, 1e9, 10**400, np.int64(5), np.float32(5)):
        assert comemo.MemoryStore(value, tmp_path, value).stats.disk_entries == 0
    with pytest.raises(
        ValueError, match="disk_budget needs a directory, got 2147483648, 5 and None"
    ):
        comemo.MemoryStore(disk_budget=5)


@pytest.mark.parametrize("directory", ["", Path(), Path("."), b"known", 3, "a\0b", Path("a\0b")])
def test_invalid_directories(directory, tmp_path, monkeypatch):
    """An unset variable must not mean the current directory, as `Path("")` does."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^MemoryStore: directory must be a path and not empty"):
        comemo.MemoryStore(directory=directory)
    assert os.listdir(tmp_path) == []
    assert comemo.MemoryStore(directory=".").directory == Path()
