"""A directory with anything in it: foreign entries are neither changed nor read."""

import contextlib
import copy
import io
import os
import re
import shutil
import stat
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from known import assert_same, batch_of, counts, files_of, memory_of

import comemo
from comemo.cli import main as cli
from comemo.store import directory as store_directory
from comemo_kernels import ImageMemory

pytestmark = pytest.mark.usefixtures("one_thread")
DEAD = 2**22 + 1  # no process of Linux has such an id
TIMES = (0, 10**9, 2**32)  # long ago, and a century ahead
OURS = re.compile(r"[0-9a-f]{64}(\.safetensors|\.part-[0-9a-f]{8}-[0-9]{1,10}-[0-9a-f]{8})")


# --- entries ---


def snapshot(root):
    """The state of everything below a directory, except times of directories."""
    found = {}
    for folder, folders, names in os.walk(root):
        for name in (*folders, *names):
            path = Path(folder) / name
            status = path.lstat()
            state = stat.filemode(status.st_mode), status.st_ino
            if stat.S_ISREG(status.st_mode):
                state += status.st_size, status.st_mtime_ns, begin(path)
            elif stat.S_ISLNK(status.st_mode):
                state += status.st_mtime_ns, os.readlink(path)
            found[os.path.relpath(path, root)] = state
    return found


def begin(path, size=4096):
    with open(path, "rb") as file:
        return file.read(size)


def ours(name, state):
    """Regular files of exactly the store's form: it may read, replace and remove them."""
    return state[0][0] == "-" and OURS.fullmatch(name) is not None


def put(path, kind, precious, content):
    """Make an entry of a kind; links lead to precious files."""
    if kind == "file":
        path.write_bytes(content)
    elif kind == "giant":
        path.write_bytes(content)
        os.truncate(path, 2**40)
    elif kind == "directory":
        path.mkdir()
        (path / "inside").write_bytes(content)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        path.symlink_to(precious / kind.removeprefix("link to "))


KINDS = ("file", "giant", "directory", "pipe", "socket", "link to photo", "link to good")
KINDS += ("link to album", "link to nothing")
ODD = KINDS[2:]


class Known(NamedTuple):
    """An image: its prompt, its key, its memory as computed, and its file."""

    core: Any
    batch: dict[str, Any]
    key: str
    memory: ImageMemory
    content: bytes

    def is_at(self, path):
        """Whether a regular file holds it."""
        regular = path.is_file() and not path.is_symlink()
        return regular and begin(path, len(self.content) + 1) == self.content


@pytest.fixture(scope="module")
def picture(loaded, tmp_path_factory):
    """Built once, because this is the slowest part of a lookup."""
    core, directory = loaded[0].model, tmp_path_factory.mktemp("good")
    batch, built = batch_of(core, [2, "square", 3]), []
    model, name = comemo.CoMemoModel, "build_image_memories"
    build = model.build_image_memories
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, name, lambda *inputs: built.extend(build(*inputs)) or built)
        memory_of(core, batch, comemo.MemoryStore(directory=directory))
        patch.setattr(model, name, lambda *inputs: copy.deepcopy(built))
        (path,) = files_of(directory)
        yield Known(core, batch, path.stem, memory_of(core, batch), path.read_bytes())


@contextlib.contextmanager
def two_directories(content):
    """The directory of a store, and one with precious files."""
    root = Path(tempfile.mkdtemp())
    directory, precious = root / "store", root / "precious"
    try:
        directory.mkdir()
        (precious / "album").mkdir(parents=True)
        (precious / "album" / "page").write_bytes(b"memories")
        (precious / "photo").write_bytes(b"a picture of somebody")
        (precious / "good").write_bytes(content)
        for path in (precious / "photo", precious / "good"):
            os.utime(path, (10**9, 10**9))
        yield directory, precious
    finally:
        shutil.rmtree(root)


# --- one of each ---


@pytest.mark.parametrize("kind", ODD)
def test_odd_entries_under_an_images_name(picture, kind):
    """Refused by name, never followed, opened or replaced; the image is computed."""
    core, batch, key, wanted, content = picture
    with two_directories(content) as (directory, precious):
        path = directory / f"{key}{store_directory.ENDING}"
        put(path, kind, precious, content)
        part = f"{key}.part-{store_directory.host()}-{DEAD}-00000000"
        put(directory / part, kind, precious, content)
        before = snapshot(directory.parent)
        known = comemo.MemoryStore(directory=directory, disk_budget=10**9)
        with pytest.warns(comemo.MemoryStoreWarning) as warned:
            assert_same(memory_of(core, batch, known), wanted)
        said = f"it is a {kind.split()[0]}"
        assert [str(warning.message) for warning in warned] == [
            f"MemoryStore: {path} is refused and its image computed again: {said}",
            f"MemoryStore: {path} cannot be written: {said}",
        ]
        assert_same(memory_of(core, batch, known), wanted)
        assert counts(known, "refused", "misses", "hits", "disk_bytes") == (1, 1, 1, 0)
        assert list(known) == [key]
        known.clear(disk=True)
        assert len(known) == 0
        for action, *words in (["ls"], ["stats"], ["rm", "--all"], ["rm", "--older-than", "0"]):
            status, _, err = command(action, directory, *words)
            assert (status, err) == (0, "")
        assert "no key begins" in command("rm", directory, key)[2]
        assert snapshot(directory.parent) == before


@pytest.mark.parametrize("kind", ODD)
def test_a_file_that_is_replaced_while_it_is_opened(picture, monkeypatch, kind):
    """It was a regular file when it was checked; opening neither blocks nor follows a link."""
    with two_directories(picture.content) as (directory, precious):
        put(directory / "x", kind, precious, b"")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "lstat", lambda path: os.stat(__file__))
            with pytest.raises((store_directory.BadFileError, OSError)):
                store_directory.open_file(directory / "x")


def test_a_device_is_not_opened():
    with pytest.raises(store_directory.BadFileError, match="it is a device"):
        store_directory.open_file(Path("/dev/zero"))


def command(*words):
    """Status and output of `comemo store`."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["store", *map(str, words)])
    return status, out.getvalue(), err.getvalue()


# --- all of it at once ---


def names(key):
    """Names of the store's form, names that are almost of it, and any others."""
    other, host, ending = "0" * 64, store_directory.host(), store_directory.ENDING
    own = [f"{key}{ending}", f"{other}{ending}", f"{'f' * 64}{ending}"]
    own += [f"{key}.part-{host}-{DEAD}-0123abcd", f"{other}.part-0123abcd-1-0123abcd"]
    near = ["movie.part-1.rar", "k.part-odd", f"{key}.part-1", f"{key}.part-{host}-{DEAD}-0123abc"]
    near += [f"{key}.part-{host}-{'9' * 80}-0123abcd", f"{key[1:]}{ending}", f"{'A' * 64}{ending}"]
    near += [f"{key}{ending}\n", f"{key}{ending}.bak", f"{chr(0xFF19) * 64}{ending}", key, ending]
    near += [os.fsdecode(b"\xff\xfe"), f"movie.part-{host}-{DEAD}-0123abcd"]
    near += [f"{key}.part-{host}-{DEAD}-0123abcd.rar"]
    rest = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1)
    rest = rest.filter(lambda name: len(name.encode()) < 250 and name not in (".", ".."))
    return st.sampled_from([key + ending]) | st.sampled_from(own) | st.sampled_from(near) | rest


@given(data=st.data())
def test_foreign_entries_are_neither_changed_nor_read(picture, data):
    content = picture.content
    contents = st.sampled_from([content, content[:-1] + b"?", content[:5000], b"notes"])
    entry = st.tuples(st.sampled_from(KINDS), contents, st.sampled_from(TIMES))
    entries = data.draw(st.dictionaries(names(picture.key), entry, min_size=3, max_size=7))
    budget = data.draw(st.none() | st.sampled_from([0, len(content), 2 * len(content)]))
    lookup = ["lookup"]
    act = st.sampled_from([lookup, ["ls"], ["stats"], ["rm", "--all"], ["rm", "--older-than", "1"]])
    with two_directories(content) as (directory, precious):
        for name, (kind, inside, time) in entries.items():
            put(directory / name, kind, precious, inside)
            os.utime(directory / name, (time, time), follow_symlinks=False)

        def is_ours(name, state):
            return name.startswith("store/") and ours(name.removeprefix("store/"), state)

        before = snapshot(directory.parent)
        foreign = {name: state for name, state in before.items() if not is_ours(name, state)}
        for action, *words in [*data.draw(st.lists(act, max_size=3)), lookup]:
            if action == "lookup":
                look_up(picture, directory, budget)
            else:
                status, _, err = command(action, directory, *words)
                assert (status, err) == (0, "")
            after = snapshot(directory.parent)
            assert {
                name: state for name, state in after.items() if not is_ours(name, state)
            } == foreign


def look_up(picture, directory, budget):
    """Look the image up twice: the result is right, and a warning names its file."""
    path = directory / f"{picture.key}{store_directory.ENDING}"
    odd = os.path.lexists(path) and (path.is_symlink() or not path.is_file())
    for _ in range(2):
        good, there = picture.is_at(path), os.path.lexists(path)
        known = comemo.MemoryStore(directory=directory, disk_budget=budget)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", comemo.MemoryStoreWarning)
            assert_same(memory_of(picture.core, picture.batch, known), picture.memory)
        stats = known.stats
        assert (stats.disk_hits, stats.misses, stats.refused) == (
            good,
            not good,
            there and not good,
        )
        assert len(warned) == stats.refused + (odd and budget != 0)
        assert all(str(warning.message).startswith(f"MemoryStore: {path} ") for warning in warned)
        assert picture.key in known
        if not good and not odd and budget:
            assert stats.disk_bytes <= budget
        if not odd and budget is None:
            assert picture.is_at(path)
