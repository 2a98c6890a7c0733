"""The public surface: operations with documentation and references, one version, all modules."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import yaml

import comemo
import comemo_kernels
from comemo_kernels import reference

ROOT = Path(__file__).parents[1]
OPERATIONS = [
    name
    for name in comemo_kernels.__all__
    if inspect.isfunction(getattr(comemo_kernels, name)) and hasattr(reference, name)
]


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_its_reference_and_documents_its_arguments(name):
    ours, theirs = getattr(comemo_kernels, name), getattr(reference, name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in ours.__doc__, section
    for argument in inspect.signature(ours).parameters:
        assert re.search(rf"^ +[\w, ]*\b{argument}\b[\w, ]*:", ours.__doc__, re.MULTILINE), argument


@pytest.mark.parametrize("package", [comemo, comemo_kernels], ids=lambda package: package.__name__)
def test_every_module_imports_and_says_what_it_holds(package):
    folder = Path(package.__file__).parent
    found = {module.name for module in pkgutil.walk_packages([folder], f"{package.__name__}.")}
    files = [file.relative_to(folder).with_suffix("") for file in folder.rglob("*.py")]
    wanted = {".".join((package.__name__, *file.parts)) for file in files}
    wanted = {name.removesuffix(".__init__") for name in wanted} - {package.__name__}
    assert found == wanted, "every folder with modules is a package"
    ray = () if importlib.util.find_spec("ray") else ("comemo.serve.ray_app",)  # of an extra
    for name in sorted(found - {"comemo.__main__", *ray}):  # the first runs the command
        module = importlib.import_module(name)
        if not hasattr(module, "__path__"):
            assert module.__doc__, name


@pytest.mark.parametrize("package", [comemo, comemo_kernels], ids=lambda package: package.__name__)
def test_public_names_exist_once(package):
    assert all(hasattr(package, name) for name in package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)


def test_version_is_told_once():
    assert comemo.__version__ == comemo_kernels.__version__
    assert f"## {comemo.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == comemo.__version__


def test_citation_is_complete():
    """What the Citation File Format 1.2.0 requires, of the file and of its reference."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert all(author.keys() <= {"name"} for author in citation["authors"])
    (paper,) = citation["references"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
    assert paper["url"].endswith("2506.06279")
