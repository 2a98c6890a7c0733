"""Files of known pictures: whole or refused, whoever is killed or writes beside."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from known import assert_same, batch_of, counts, files_of, memory_of, tiles, work_on
from safetensors.torch import load_file, save_file

import comemo
from comemo.cli import main as cli
from comemo.store import directory as store_directory
from comemo.store import files as store_files
from comemo.store.directory import BadFileError
from comemo_kernels import ImageMemory

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error::comemo.MemoryStoreWarning"),
]


@pytest.fixture
def stored(core, tmp_path):
    """A store that has written a picture: batch, what it is, the file."""
    batch = batch_of(core, [2, "square", 3])
    memory_of(core, batch, comemo.MemoryStore(directory=tmp_path))
    (path,) = files_of(tmp_path)
    return batch, memory_of(core, batch), path


def test_a_picture_is_read_back_bit_by_bit(core, stored, loaded):
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
    header = store_files.read_header(path)
    assert header.tokens == 256
    assert header.facts["key"] == path.stem
    assert header.facts["dtype"] == "float32"
    assert header.size == path.stat().st_size


def test_a_file_is_read_on_the_cpu_whatever_the_default(stored):
    """Elsewhere the bytes would be read into a copy."""
    path = stored[2]
    header = store_files.read_header(path)
    with torch.device("meta"):
        memory = store_files.read_image(path, {}, header.tensors)
    assert torch.equal(memory.keys[3], load_file(path)["keys.3"])
    assert memory.starts.device == memory.biases.device == memory.media.device


def rewrite(path, **changes):
    """The same tensors under a header that tells other facts, its checksum right."""
    header, tensors = store_files.read_header(path), load_file(path)
    memory = ImageMemory(media=tensors["media"], ids=tensors["ids"], sizes=(256,))
    for name, tensor in tensors.items():
        kind, _, layer = name.partition(".")
        if layer:
            getattr(memory, kind)[int(layer)] = tensor
    facts = {name: header.facts[name] for name in ("key", "model", "dtype")}
    assert store_files.write_image(path, memory, facts | changes)


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


def text_header(path, text):
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def without_values(path):
    tensors = {name: t for name, t in load_file(path).items() if not name.startswith("values")}
    facts = store_files.read_header(path).facts
    save_file(tensors, path, facts)


BAD = {
    "empty": (lambda p: cut(p, 0), "it is empty"),
    "cut in the length": (lambda p: cut(p, 5), "ends within its header"),
    "cut in the header": (lambda p: cut(p, 100), "ends within its header"),
    "cut behind the header": (lambda p: cut(p, 2000), r"it has 2000 bytes of \d+"),
    "cut at the end": (lambda p: cut(p, -1), r"it has \d+ bytes of \d+"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), r"it has \d+ bytes of \d+"),
    "flipped first byte": (lambda p: flip(p, -1), "checksum is wrong"),
    "flipped data": (lambda p: flip(p, 500_000), "checksum is wrong"),
    "flipped length": (lambda p: flip(p, 0), "refused"),
    "flipped high length": (lambda p: flip(p, 7), "it is no safetensors file"),
    "flipped header": (lambda p: flip(p, 48), "refused"),
    "version": (other_version, "it is of version '7', wanted 1"),
    "model": (lambda p: rewrite(p, model="a" * 64), "its model is aaaaaaaaaaaa, wanted"),
    "key": (lambda p: rewrite(p, key="b" * 64), "its key is bbbbbbbbbbbb, wanted"),
    "dtype": (lambda p: rewrite(p, dtype="float64"), "its dtype is float64, wanted float32"),
    "foreign": (foreign, "safetensors file of something else"),
    "a list": (lambda p: text_header(p, b"[1, 2]"), "header cannot be understood"),
    "no JSON": (lambda p: text_header(p, b"{{{{"), "header cannot be understood"),
    "words": (lambda p: p.write_bytes(b"hello, this is a text file"), "no safetensors file"),
    "a tensor less": (without_values, "not those of a memory of this model and picture"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(core, stored, name):
    batch, wanted, path = stored
    good = path.read_bytes()
    spoil, said = BAD[name]
    spoil(path)
    store = comemo.MemoryStore(directory=path.parent)
    with pytest.warns(comemo.MemoryStoreWarning) as told:
        assert_same(memory_of(core, batch, store), wanted)
    assert len(told) == 1
    text = str(told[0].message)
    assert text.startswith(f"MemoryStore: {path} is refused and its picture computed again: ")
    assert re.search(said, text), text
    assert counts(store, "refused", "misses", "disk_hits") == (1, 1, 0)
    assert path.read_bytes() == good, "the file was replaced"
    again = comemo.MemoryStore(directory=path.parent)
    assert_same(memory_of(core, batch, again), wanted)
    assert counts(again, "refused", "disk_hits") == (0, 1)


def test_every_byte_of_the_header_is_covered(stored):
    """Whichever is flipped: refused, and never a crash."""
    _, _, path = stored
    header = store_files.read_header(path)
    wanted = {name: header.facts[name] for name in ("key", "model", "dtype")}
    content = path.read_bytes()
    for place in range(0, len(header.raw), 5):
        for bit in (1, 32):
            spoiled = bytearray(content)
            spoiled[place] ^= bit
            path.write_bytes(spoiled)
            with pytest.raises(BadFileError):
                store_files.read_image(path, wanted, header.tensors)
    path.write_bytes(content)
    assert store_files.read_image(path, wanted, header.tensors).sizes == (256,)


def set_header(path, change):
    """Another header before the same bytes; returns what the old one said."""
    told = store_files.read_header(path)
    data, header = path.read_bytes()[len(told.raw) :], json.loads(told.raw[8:])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return told


def rename(header, old, new):
    named = {new if name == old else name: told for name, told in header.items()}
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
    "behind the end": (lambda h: h["media"].update(data_offsets=[2**62, 2**63]), "contradicts"),
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
def test_headers_that_lie(stored, name):
    path = stored[2]
    change, said = LIES[name]
    told = set_header(path, change)
    wanted = {name: told.facts[name] for name in ("key", "dtype")}
    started = time.monotonic()
    with pytest.raises(BadFileError, match=said):
        store_files.read_image(path, wanted, told.tensors)
    assert time.monotonic() - started < 2


def test_a_giant_is_not_made_room_for(stored):
    """A sparse file of 1 TiB, as long as its header says."""
    path = stored[2]

    def grow(header):
        size = 2**40
        header["media"].update(shape=[256, size // 1024], data_offsets=[0, size])
        for name in header.keys() - {"__metadata__", "media"}:
            del header[name]

    told = set_header(path, grow)
    os.truncate(path, 8 + int.from_bytes(path.read_bytes()[:8], "little") + 2**40)
    assert store_files.read_header(path).size > 2**40
    with pytest.raises(BadFileError, match="not those of a memory of this model and picture"):
        store_files.read_image(path, {"key": path.stem}, told.tensors)


def test_a_header_as_deep_as_it_is_long(stored):
    text_header(stored[2], b"[" * 2**20)
    with pytest.raises(BadFileError, match="cannot be understood"):
        store_files.read_header(stored[2])


def test_forged_tensors_do_not_fit(core, stored):
    """Right checksums over what is no memory of this model and picture."""
    batch, wanted, path = stored
    facts = {name: store_files.read_header(path).facts[name] for name in ("key", "model", "dtype")}

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
        assert store_files.write_image(path, wrong, facts)
        store = comemo.MemoryStore(directory=path.parent)
        with pytest.warns(comemo.MemoryStoreWarning, match="not those of a memory|another grid"):
            assert_same(memory_of(core, batch, store), wanted)
        assert counts(store, "refused", "disk_hits") == (1, 0)


def test_a_file_that_vanishes_is_a_plain_miss(core, stored):
    batch, wanted, path = stored
    store = comemo.MemoryStore(directory=path.parent)
    assert path.stem in store
    path.unlink()
    assert_same(memory_of(core, batch, store), wanted)
    assert counts(store, "misses", "refused", "disk_entries") == (1, 0, 1)


def test_a_file_that_shrinks_while_it_is_read(core, stored, monkeypatch):
    batch, wanted, path = stored
    read, store = store_files._read_header, comemo.MemoryStore(directory=path.parent)

    def then_cut(file):
        header = read(file)
        cut(path, 5000)
        return header

    monkeypatch.setattr(store_files, "_read_header", then_cut)
    with pytest.warns(comemo.MemoryStoreWarning, match="became shorter while it was read"):
        assert_same(memory_of(core, batch, store), wanted)


def test_a_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link"):
        with pytest.raises(NotADirectoryError, match="MemoryStore: directory must be a directory"):
            comemo.MemoryStore(directory=path)


def test_directory_and_files_are_private(core, tmp_path):
    """Whatever the umask says; what was there before stays as it is."""
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


def test_a_full_disk_costs_no_answer(core, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store, batch = comemo.MemoryStore(directory=tmp_path), batch_of(core, [2, "square", 3])
    with pytest.warns(comemo.MemoryStoreWarning, match="cannot be written: No space left") as told:
        assert_same(memory_of(core, batch, store), memory_of(core, batch))
    assert len(told) == 1
    assert str(files_of(tmp_path)) == "[]"
    assert os.listdir(tmp_path) == [], "what was written is gone"
    memory_of(core, batch, store)
    assert counts(store, "misses", "hits", "disk_entries") == (1, 1, 0)


def test_a_directory_that_cannot_be_written(core, tmp_path):
    directory = tmp_path / "store"
    store, batch = comemo.MemoryStore(directory=directory), batch_of(core, [2, "square", 3])
    directory.rmdir()
    directory.write_text("somebody else's")
    with pytest.warns(comemo.MemoryStoreWarning) as told:
        assert_same(memory_of(core, batch, store), memory_of(core, batch))
    assert any("cannot be written" in str(warning.message) for warning in told)
    assert counts(store, "misses", "entries", "disk_entries") == (1, 1, 0)
    directory.unlink()
    store.clear()
    memory_of(core, batch, store)  # made anew
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
        with pytest.warns(comemo.MemoryStoreWarning, match="cannot be made: Permission denied"):
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
        "more behind it": (f"{key}.part-{here}-{gone.pid}-aaaaaaaa.rar", 2 * hour),
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
path = Path(sys.argv[1])
header, old = store_files.read_header(path), store_files.chunks_of
image = store_files.read_image(path, {}, header.tensors)
def slowly(tensor):
    for chunk in old(tensor):
        for start in range(0, len(chunk), 1000):
            yield chunk[start:start + 1000]
            time.sleep(0.01)
store_files.chunks_of = slowly
print("writing", flush=True)
store_files.write_image(path, image, {n: header.facts[n] for n in ("key", "model", "dtype")})
"""


def test_a_writer_that_is_killed_harms_nothing(core, stored):
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
    """Both write, read and remove the same file; neither ever sees half of it."""
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


def test_nothing_is_said_when_all_is_well(core, stored):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_of(core, stored[0], comemo.MemoryStore(directory=stored[2].parent))
