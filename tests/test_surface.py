"""What the library promises: documented verbs, rooms that do not mix, a README that runs."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import comemo
import comemo_kernels
from comemo_kernels import reference

ROOT = Path(__file__).parents[1]
VERBS = [
    name
    for name in comemo_kernels.__all__
    if inspect.isfunction(getattr(comemo_kernels, name)) and hasattr(reference, name)
]


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_its_reference_and_says_what_it_takes(name):
    ours, theirs = getattr(comemo_kernels, name), getattr(reference, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in ours.__doc__, section
    for argument in inspect.signature(ours).parameters:
        assert re.search(rf"^ +[\w, ]*\b{argument}\b[\w, ]*:", ours.__doc__, re.MULTILINE), argument


def imports(file):
    """Packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("comemo_kernels", {"comemo", "transformers", "bench", "tests"}),
        ("comemo", {"bench", "tests", "triton", "torchvision"}),
    ],
)
def test_rooms_do_not_mix(room, never):
    for file in (ROOT / room).glob("*.py"):
        assert never.isdisjoint(imports(file)), file.name


def test_version_is_told_once():
    assert comemo.__version__ == comemo_kernels.__version__
    assert f"## {comemo.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_runs(checkpoint, photograph, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photograph.save("street.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    scope = {}
    for block in blocks:
        assert "./CoMemo-2B" in block or "path" in scope
        block = block.replace('"./CoMemo-2B"', repr(str(checkpoint)))
        exec(block.replace("max_new_tokens=256", "max_new_tokens=3"), scope)
    assert isinstance(scope["answer"], str)
    assert len(scope["history"]) == 1
    assert isinstance(scope["memory"], comemo.ImageMemory)
    assert scope["k"].shape == (1, 3424, 8, 128)
    assert scope["model"].dtype == torch.bfloat16
    assert scope["read"].shape == (1, 5, 4, 128)
    assert (scope["read"][:, 0] == 0).all()
    assert scope["read"].isfinite().all()
