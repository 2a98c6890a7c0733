"""Files with wrong headers, or with headers that do not fit the wanted memory."""

import json
import os
import time

import pytest
import torch
from known import assert_same, counts, memory_of, text_header

import comemo
from comemo.store import files as store_files
from comemo.store.directory import BadFileError
from comemo.store.headers import read_header
from comemo_kernels import ImageMemory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


def test_every_byte_of_the_header_is_covered(stored):
    """Whichever byte is flipped: the file is refused, without a crash."""
    _, _, path = stored
    header = read_header(path)
    wanted = {name: header.facts[name] for name in ("key", "model", "dtype")}
    content = path.read_bytes()
    for place in range(0, len(header.raw), 5):
        for bit in (1, 32):
            spoiled = bytearray(content)
            spoiled[place] ^= bit
            path.write_bytes(spoiled)
            with pytest.raises(BadFileError):
                store_files.read_memory(path, wanted, store_files.tensors_of(header))
    path.write_bytes(content)
    assert store_files.read_memory(path, wanted, store_files.tensors_of(header)).sizes == (256,)


def set_header(path, change):
    """Write another header before the same bytes; returns the old one."""
    old = read_header(path)
    data, header = path.read_bytes()[len(old.raw) :], json.loads(old.raw[8:])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return old


def rename(header, before, after):
    named = {after if name == before else name: entry for name, entry in header.items()}
    header.clear()
    header.update(named)


LIES = {
    "no shape": (lambda h: h["media"].update(shape=[]), "contradicts itself"),
    "nothing in it": (lambda h: h["media"].update(shape=[0, 4]), "contradicts itself"),
    "negative": (lambda h: h["media"].update(shape=[-256, -256]), "contradicts itself"),
    "words for sizes": (lambda h: h["media"].update(shape=["256", "256"]), "contradicts itself"),
    "one word for sizes": (lambda h: h["media"].update(shape="256"), "contradicts itself"),
    "fractions": (lambda h: h["media"].update(shape=[256.0, 256.5]), "contradicts itself"),
    "many directions": (lambda h: h["media"].update(shape=[1] * 9), "contradicts itself"),
    "no end of directions": (lambda h: h["media"].update(shape=[9] * 3 * 10**5), "contradicts"),
    "beyond all numbers": (lambda h: h["media"].update(shape=[10**1000, 4]), "contradicts itself"),
    "other bytes": (lambda h: h["media"].update(data_offsets=[4, 8]), "contradicts itself"),
    "after the end": (lambda h: h["media"].update(data_offsets=[2**62, 2**63]), "contradicts"),
    "overlapping": (lambda h: h["ids"].update(data_offsets=[0, 1024]), "contradicts itself"),
    "no such dtype": (lambda h: h["media"].update(dtype="F4"), "cannot be understood"),
    "a list for a dtype": (lambda h: h["media"].update(dtype=[]), "cannot be understood"),
    "shapeless": (lambda h: h["media"].pop("shape"), "cannot be understood"),
    "a number": (lambda h: h.update(media=3), "cannot be understood"),
    "no model": (lambda h: h["__metadata__"].pop("model"), "cannot be understood"),
    "a model that clears screens": (
        lambda h: h["__metadata__"].update(model="\x1b[2J"),
        "contradicts itself",
    ),
    "a long dtype": (lambda h: h["__metadata__"].update(dtype="f" * 99), "contradicts itself"),
    "no tokens": (lambda h: h["__metadata__"].update(sizes="[0]"), "contradicts itself"),
    "a number for sizes": (lambda h: h["__metadata__"].update(sizes="5"), "contradicts itself"),
    "minus a picture": (lambda h: h["__metadata__"].update(sizes="[257, -1]"), "contradicts"),
    "a token less": (lambda h: h["__metadata__"].update(sizes="[255]"), "not those of a memory"),
    "a list": (lambda h: h.update(__metadata__=[]), "cannot be understood"),
    "another name": (lambda h: rename(h, "values.3", "extra"), "not those of a memory"),
    "no layer": (lambda h: rename(h, "values.3", "values.x"), "not those of a memory"),
    "other digits": (lambda h: rename(h, "values.3", "values.03"), "not those of a memory"),
    "no end of digits": (lambda h: rename(h, "keys.3", f"keys.{'9' * 5000}"), "not those of a"),
}


@pytest.mark.parametrize("name", LIES)
def test_wrong_headers(stored, name):
    path = stored[2]
    change, said = LIES[name]
    old = set_header(path, change)
    wanted = {name: old.facts[name] for name in ("key", "dtype")}
    started = time.monotonic()
    with pytest.raises(BadFileError, match=said):
        store_files.read_memory(path, wanted, store_files.tensors_of(old))
    assert time.monotonic() - started < 2


def test_nothing_is_allocated_for_a_huge_file(stored):
    """A sparse file of 1 TiB, as long as its header says."""
    path = stored[2]

    def grow(header):
        size = 2**40
        header["media"].update(shape=[256, size // 1024], data_offsets=[0, size])
        for name in header.keys() - {"__metadata__", "media"}:
            del header[name]

    old = set_header(path, grow)
    os.truncate(path, 8 + int.from_bytes(path.read_bytes()[:8], "little") + 2**40)
    assert read_header(path).size > 2**40
    with pytest.raises(BadFileError, match="not those of a memory of this model and image"):
        store_files.read_memory(path, {"key": path.stem}, store_files.tensors_of(old))


def test_a_deeply_nested_header(stored):
    text_header(stored[2], b"[" * 2**20)
    with pytest.raises(BadFileError, match="cannot be understood"):
        read_header(stored[2])


def test_forged_tensors_do_not_fit(core, stored):
    """Files with right checksums that hold no memory of this model and image."""
    batch, wanted, path = stored
    facts = {name: read_header(path).facts[name] for name in ("key", "model", "dtype")}

    def memory(**changes):
        fields = {"media": wanted.media, "ids": wanted.ids, "sizes": (256,)}
        fields |= {"keys": wanted.keys, "values": wanted.values}
        return ImageMemory(**fields | changes)

    def each(change, tensors):
        return {layer: change(tensor) for layer, tensor in tensors.items()}

    wide = {"keys": each(lambda t: t[:, :1], wanted.keys)}
    wide |= {"values": each(lambda t: t[:, :1], wanted.values)}
    double = {"keys": each(torch.Tensor.double, wanted.keys)}
    double |= {"values": each(torch.Tensor.double, wanted.values)}
    for wrong in (
        memory(sizes=(255,)),
        memory(media=wanted.media[:5]),
        memory(media=wanted.media[:, :8]),
        memory(media=wanted.media.double()),
        memory(ids=wanted.ids.float()),
        memory(values={1: wanted.values[1]}),
        memory(keys={1: wanted.keys[1], 3: wanted.keys[3][:, :1]}),
        memory(keys={"x": wanted.keys[1]}),
        memory(keys={}, values={}),
        memory(**wide),
        memory(**double),
        memory(ids=wanted.ids.flip(0)),
    ):
        assert store_files.write_memory(path, wrong, facts)
        store = comemo.MemoryStore(directory=path.parent)
        with pytest.warns(comemo.MemoryStoreWarning, match="not those of a memory|another grid"):
            assert_same(memory_of(core, batch, store), wanted)
        assert counts(store, "refused", "disk_hits") == (1, 0)
