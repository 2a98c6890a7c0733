"""The documentation: every code block runs, every link leads somewhere, every name is there."""

import argparse
import importlib
import io
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from harbour import draw_harbour
from PIL import Image

import comemo
import comemo_kernels
from comemo.cli import main as cli

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("the pages put tensors where their reader has them"),
]
ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
}
QUICK = {  # command -> options that make it so
    "chat": ["--max-new-tokens", "3", "--dtype", "float32", "--device", "cpu"],
    "eval": ["--questions", "7"],
}
MAP = ROOT / "docs" / "images" / "position_map.png"
EXAMPLES = {  # and their arguments
    "chat_with_store.py": ["CoMemo-2B", "street.jpg", "known"],
    "memory_in_another_model.py": [],
}

PRINTED = runpy.run_path(str(ROOT / "docs" / "write_printed.py"))

# Shell commands that are not run here, with the reason.
NOT_RUN = {
    "pip install .": "test_wheel.py builds and installs",
    "python examples/position_map.py map.png": "slow: test_the_map_is_what_its_example_draws",
    "python -m pytest bench --benchmark-enable": "minutes; make test runs them once, untimed",
}


NEEDS = {"docs/quantisation.md": "torchao"}  # what its blocks import


def blocks_of(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGES[page], re.DOTALL | re.MULTILINE)


def pages_with(language):
    return [page for page in PAGES if blocks_of(page, language)]


@pytest.fixture
def reader(demo_checkpoint, tmp_path, monkeypatch):
    """The folder of somebody who follows a page: a checkpoint and a few images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "CoMemo-2B").symlink_to(demo_checkpoint)
    image = draw_harbour(300, 300)  # one tile
    for name in ("street.jpg", "other.jpg", "a.jpg", "b.jpg", "harbour.png"):
        image.save(name)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


@pytest.mark.parametrize("page", pages_with("python"))
def test_python_blocks_run(page, reader):
    """In order, in one scope: on comemo-nano as they are, on a tiny model with short answers."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    text, scope = PAGES[page], {}
    on_nano = PRINTED["USES_NANO"] in text
    for words in PRINTED["drawn_by"](text):
        assert cli.main(words) == 0
    if not on_nano:
        text = text.replace("max_new_tokens=256", "max_new_tokens=3")
    written = PRINTED["write_page"](text, scope)
    WHAT_THEY_GIVE.get(page, bool)(scope)
    if on_nano:
        assert written == text, "run python docs/write_printed.py"


def check_readme(scope):
    assert isinstance(scope["answer"], str)
    assert len(scope["history"]) == 1
    assert isinstance(scope["memory"], comemo.ImageMemory)
    assert scope["model"].dtype == scope["torch"].float32
    assert scope["k"].shape == (1, 3424, 8, 128)


def check_kernels(scope):
    assert scope["k"].shape == (1, 3424, 8, 128)
    assert scope["read"].shape == (1, 5, 4, 128)
    assert (scope["read"][:, 0] == 0).all()
    assert scope["read"].isfinite().all()


def check_memory(scope):
    assert isinstance(scope["memory"], comemo.ImageMemory)
    assert (scope["store"].stats.misses, scope["store"].stats.hits) == (1, 1)


def check_conversation(scope):
    assert [len(session.history) for session in (scope["session"], scope["other"])] == [3, 3]


def check_training(scope):
    assert (scope["plan"].samples, scope["plan"].faults.total) == (4, 0)


WHAT_THEY_GIVE = {
    "README.md": check_readme,
    "docs/kernels.md": check_kernels,
    "docs/image-memory.md": check_memory,
    "docs/conversations.md": check_conversation,
    "docs/training.md": check_training,
}


class Parsed(Exception):
    """The arguments of a command are right; what it does is tested elsewhere."""


def commands_of(page):
    lines = "".join(blocks_of(page, "sh")).splitlines()
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines if line.strip()]


@pytest.mark.parametrize("page", pages_with("sh"))
def test_shell_commands_run(page, reader, monkeypatch):
    """In order; what an earlier page has is run there, but for pictures that this one needs."""
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    earlier = [line for other in PAGES if other < page for line in commands_of(other)]
    for line in commands_of(page):
        if line not in NOT_RUN and (line not in earlier or line.startswith("comemo draw ")):
            run_command(line, monkeypatch)


def run_command(line, monkeypatch):
    words = [os.path.expanduser(word) for word in shlex.split(line)]
    if words[0] == "make":
        assert words[1] in make_targets(), line
    elif words[0] == "comemo":
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        assert cli.main(words[1:] + QUICK.get(words[1], [])) == 0, line
    elif words[:2] == ["python", "-m"]:
        module = "bench.__main__" if words[2] == "bench" else words[2]
        monkeypatch.setattr(sys, "argv", words[2:])
        main = importlib.import_module(module).main
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
            with pytest.raises(Parsed):
                main()
    else:
        assert words[0] == "python", f"no way to run {line!r}"
        monkeypatch.setattr(sys, "argv", words[1:])
        runpy.run_path(words[1], run_name="__main__")


def only_parse(parser):
    _, rest = parser.parse_known_args()
    assert not rest, rest
    raise Parsed


def make_targets():
    return re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()


def test_every_block_is_of_a_known_language():
    """So that none is left out above."""
    for page, text in PAGES.items():
        opened = re.findall(r"^ *```(.*)$", text, re.MULTILINE)[::2]
        # Those of clients are run by test_serve_docs.py.
        clients = {"bash", "js", "py"} if page == "docs/serving.md" else set()
        assert set(opened) <= {"python", "sh", "text"} | clients, page


def test_a_command_that_is_not_run_is_there():
    assert NOT_RUN.keys() <= {line for page in PAGES for line in commands_of(page)}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            linked = PAGES[str(file.resolve().relative_to(ROOT))]
            titles = re.findall(r"^#+ (.*)$", linked, re.MULTILINE)
            assert anchor in [anchor_of(title) for title in titles], target


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page):
    folders = "bench|comemo|comemo_kernels|docs|examples|tests"
    for path in re.findall(rf"`((?:{folders})/[\w/.]+\.\w+)`", PAGES[page]):
        assert (ROOT / path).is_file(), path


def anchor_of(title):
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def test_the_index_has_every_page():
    pages = [Path(page).name for page in PAGES if page.startswith("docs/")]
    assert all(f"]({page})" in PAGES["docs/README.md"] for page in pages if page != "README.md")


@pytest.mark.parametrize("package", [comemo, comemo_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_documented(package):
    _, *sections = re.split(r"^## ", PAGES["docs/api.md"], flags=re.MULTILINE)
    (section,) = [text for text in sections if text.startswith(f"`{package.__name__}`\n")]
    documented = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", section, re.MULTILINE))
    )
    assert sorted(documented) == sorted(package.__all__)


def test_the_structure_is_that_of_the_files():
    page = "docs/structure.md"
    written = runpy.run_path(str(ROOT / "docs" / "write_structure.py"))["write_page"](PAGES[page])
    assert PAGES[page] == written, "run python docs/write_structure.py"


def run_example(name, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, reader, monkeypatch, capsys):
    run_example(name, EXAMPLES[name], monkeypatch)
    assert capsys.readouterr().out


@pytest.mark.slow
def test_the_map_is_what_its_example_draws(reader, monkeypatch):
    run_example("position_map.py", ["map.png"], monkeypatch)
    drawn, kept = (Image.open(path).convert("RGB") for path in ("map.png", MAP))
    assert drawn.size == kept.size
    distance = np.abs(np.asarray(drawn, int) - np.asarray(kept, int)).mean()
    assert distance < 1  # other releases of Pillow may draw letters otherwise


def test_every_example_is_run():
    examples = {path.name for path in (ROOT / "examples").glob("*.py")}
    assert examples == {*EXAMPLES, "position_map.py"}


def test_tables_are_those_of_the_recorded_runs():
    """The times of a decode step and of a chat in README and docs/benchmarks.md."""
    for dtype in ("float32", "bfloat16"):
        folder = ROOT / "bench" / "results" / f"epyc-2core-{dtype}"
        kept, rebuilt = json.loads((folder / "decode.json").read_text())["rows"]
        for page in ("README.md", "docs/benchmarks.md"):
            rows = [line for line in PAGES[page].splitlines() if line.startswith(f"| {dtype}, ")]
            assert f"**{kept['token_s']:.2f} s**" in rows[0]
            assert f"**{kept['mixin_s']:.3f} s**" in rows[0]
            assert f"{kept['peak_gib']:.1f} GiB" in rows[0]
            assert f"{rebuilt['token_s']:.2f} s" in rows[1]
            assert f"{rebuilt['mixin_s']:.2f} s" in rows[1]
        chats = json.loads((folder / "chat.json").read_text())["rows"]
        row = re.search(rf"^\| {dtype} \| \d.*$", PAGES["docs/benchmarks.md"], re.MULTILINE)[0]
        assert all(f"{chat['token_s']:.2f}" in row for chat in chats)
