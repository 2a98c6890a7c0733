"""Files of a store: read back bit by bit, or refused."""

import copy
import os
import re
import warnings

import pytest
import torch
from known import assert_same, counts, memory_of, text_header, work_on
from safetensors.torch import load_file, save_file

import comemo
from comemo.store import files as store_files
from comemo.store.headers import read_header
from comemo_kernels import ImageMemory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


def test_an_image_is_read_back_bit_by_bit(core, stored, loaded):
    batch, wanted, path = stored
    store = comemo.MemoryStore(directory=path.parent)
    with work_on(core) as work:
        for _ in range(2):
            assert_same(memory_of(core, batch, store), wanted)
        assert work() == ([], 0)
    assert counts(store, "disk_hits", "hits", "misses", "refused") == (1, 1, 0, 0)
    half = copy.deepcopy(core).bfloat16()
    wanted = memory_of(half, batch)
    for _ in range(2):
        store = comemo.MemoryStore(directory=path.parent)
        assert_same(memory_of(half, batch, store), wanted)
    assert store.stats.disk_hits == 1


def test_a_file_is_a_safetensors_file(stored):
    _, wanted, path = stored
    tensors = load_file(path)
    assert set(tensors) == {"media", "ids", "keys.1", "keys.3", "values.1", "values.3"}
    assert torch.equal(tensors["keys.3"], wanted.keys[3].cpu())
    header = read_header(path)
    assert header.tokens == 256
    assert header.facts["key"] == path.stem
    assert header.facts["dtype"] == "float32"
    assert header.size == path.stat().st_size


def test_a_file_is_read_on_the_cpu_whatever_the_default(stored):
    """On another device the bytes would be read into a copy."""
    path = stored[2]
    header = read_header(path)
    with torch.device("meta"):
        memory = store_files.read_memory(path, {}, store_files.tensors_of(header))
    assert torch.equal(memory.keys[3], load_file(path)["keys.3"])
    assert memory.starts.device == memory.biases.device == memory.media.device


def rewrite(path, **changes):
    """The same tensors under a header with other facts and a right checksum."""
    header, tensors = read_header(path), load_file(path)
    memory = ImageMemory(media=tensors["media"], ids=tensors["ids"], sizes=(256,))
    for name, tensor in tensors.items():
        kind, _, layer = name.partition(".")
        if layer:
            getattr(memory, kind)[int(layer)] = tensor
    facts = {name: header.facts[name] for name in ("key", "model", "dtype")}
    assert store_files.write_memory(path, memory, facts | changes)


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path, size):
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def other_version(path):
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"version": "1"', b'"version": "7"', 1))


def foreign(path):
    save_file({"media": torch.ones(3)}, path)


def without_values(path):
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith("values")}
    facts = read_header(path).facts
    save_file(tensors, path, facts)


BAD = {
    "empty": (lambda p: cut(p, 0), "it is empty"),
    "cut in the length": (lambda p: cut(p, 5), "ends within its header"),
    "cut in the header": (lambda p: cut(p, 100), "ends within its header"),
    "cut after the header": (lambda p: cut(p, 2000), r"it has 2000 bytes, wanted \d+"),
    "cut at the end": (lambda p: cut(p, -1), r"it has \d+ bytes, wanted \d+"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"it has \d+ bytes, wanted \d+"),
    "flipped first byte": (lambda p: flip(p, -1), "checksum is wrong"),
    "flipped data": (lambda p: flip(p, 500_000), "checksum is wrong"),
    "flipped length": (lambda p: flip(p, 0), "refused"),
    "flipped high length": (lambda p: flip(p, 7), "it is not a safetensors file"),
    "flipped header": (lambda p: flip(p, 48), "refused"),
    "version": (other_version, "it has version '7', wanted 1"),
    "model": (lambda p: rewrite(p, model="a" * 64), "its model is aaaaaaaaaaaa, wanted"),
    "key": (lambda p: rewrite(p, key="b" * 64), "its key is bbbbbbbbbbbb, wanted"),
    "dtype": (lambda p: rewrite(p, dtype="float64"), "its dtype is float64, wanted float32"),
    "foreign": (foreign, "safetensors file of something else"),
    "a list": (lambda p: text_header(p, b"[1, 2]"), "header cannot be understood"),
    "no JSON": (lambda p: text_header(p, b"{{{{"), "header cannot be understood"),
    "words": (lambda p: p.write_bytes(b"hello, this is a text file"), "not a safetensors file"),
    "a tensor less": (without_values, "not those of a memory of this model and image"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(core, stored, name):
    batch, wanted, path = stored
    good = path.read_bytes()
    spoil, said = BAD[name]
    spoil(path)
    store = comemo.MemoryStore(directory=path.parent)
    with pytest.warns(comemo.MemoryStoreWarning) as warned:
        assert_same(memory_of(core, batch, store), wanted)
    assert len(warned) == 1
    text = str(warned[0].message)
    assert text.startswith(f"MemoryStore: {path} is refused and its image computed again: ")
    assert re.search(said, text), text
    assert counts(store, "refused", "misses", "disk_hits") == (1, 1, 0)
    assert path.read_bytes() == good, "the file was replaced"
    again = comemo.MemoryStore(directory=path.parent)
    assert_same(memory_of(core, batch, again), wanted)
    assert counts(again, "refused", "disk_hits") == (0, 1)


def test_a_file_that_is_gone_is_a_miss(core, stored):
    batch, wanted, path = stored
    store = comemo.MemoryStore(directory=path.parent)
    assert path.stem in store
    path.unlink()
    assert_same(memory_of(core, batch, store), wanted)
    assert counts(store, "misses", "refused", "disk_entries") == (1, 0, 1)


def test_a_file_that_shrinks_while_it_is_read(core, stored, monkeypatch):
    batch, wanted, path = stored
    read, store = store_files.parse_header, comemo.MemoryStore(directory=path.parent)

    def then_cut(file):
        header = read(file)
        cut(path, 5000)
        return header

    monkeypatch.setattr(store_files, "parse_header", then_cut)
    with pytest.warns(comemo.MemoryStoreWarning, match="became shorter while it was read"):
        assert_same(memory_of(core, batch, store), wanted)


def test_good_files_give_no_warning(core, stored):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_of(core, stored[0], comemo.MemoryStore(directory=stored[2].parent))
