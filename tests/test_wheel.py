"""The package as users install it: what the wheel holds, and that it works in an empty folder."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import comemo

ROOT = Path(__file__).parents[1]
FILES = ("*.md", "*.in", "*.cff", "*.txt", "*.toml", "setup.py", "Makefile", "LICENSE")
SOURCES = sorted(file.name for pattern in FILES for file in ROOT.glob(pattern))
PACKAGES = ("comemo", "comemo_kernels")
FOLDERS = (*PACKAGES, "docs", "examples")
DATA = ("comemo/nano/checkpoint", "comemo/nano/photographs", "comemo/serve/page")  # no code
OFFLINE = ("--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")

USE = """
import importlib.util, pkgutil, sys
from pathlib import Path

import comemo, comemo_kernels
from comemo import nano
from comemo.nano.drawing import draw
from comemo.nano.showing import shown_scene

target = sys.argv[1]
checkpoint = nano.checkpoint()
for package in (comemo, comemo_kernels):
    assert package.__file__.startswith(target), package.__file__
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        needs_ray = module.name == "comemo.serve.ray_app" and not importlib.util.find_spec("ray")
        if module.name != "comemo.__main__" and not needs_ray:
            assert importlib.import_module(module.name).__file__.startswith(target), module.name
model = comemo.CoMemoForConditionalGeneration.from_pretrained(checkpoint)
processor = comemo.CoMemoProcessor.from_pretrained(checkpoint)
session = comemo.ChatSession(model, processor, max_new_tokens=3)
session.ask("What is in this picture?", draw(shown_scene(0)))
assert 1 <= session.report.new_tokens <= 3
"""


def files_of_data():
    found = {file.relative_to(ROOT).as_posix() for name in DATA for file in (ROOT / name).iterdir()}
    assert {
        "comemo/nano/checkpoint/model.safetensors",
        "comemo/nano/photographs/rocket.jpg",
        "comemo/serve/page/index.html",
    } <= found
    return found


def run(*command, **options):
    ended = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the sources, so that no earlier build gets into a new one."""
    folder = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", *OFFLINE, "--no-build-isolation")
    run(*pip, "--wheel-dir", folder, source)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_both_packages_and_the_licences(wheel):
    assert wheel.name == f"comemo_kernels-{comemo.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        entry_points = next(name for name in held if name.endswith("entry_points.txt"))
        assert "comemo = comemo.cli.main:main" in archive.read(entry_points).decode()
    wanted = {
        file.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for file in (ROOT / name).rglob("*.py")
    } | {f"{name}/py.typed" for name in PACKAGES}
    wanted |= files_of_data()
    assert {name for name in held if ".dist-info/" not in name} == wanted
    for name in ("LICENSE", "THIRD_PARTY_NOTICES.md"):
        assert any(".dist-info/" in path and path.endswith(f"/{name}") for path in held), name


@pytest.mark.slow
def test_the_source_archive_holds_what_builds_and_documents(source, tmp_path):
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=source)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        names = {name.partition("/")[2] for name in held.getnames()}
    assert {*SOURCES, "docs/README.md", "docs/images/position_map.png"} <= names
    code = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in code} <= names
    assert files_of_data() <= names


@pytest.mark.slow
def test_the_installed_wheel_works_in_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    run(sys.executable, "-m", "pip", "install", *OFFLINE, "--target", target, wheel)
    # PYTHONPATH goes before the installed packages of the environment, an editable one included.
    ours = {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = {"cwd": empty, "env": {**os.environ, **ours}}
    run(sys.executable, "-c", USE, target, **options)
    version = run(sys.executable, target / "bin" / "comemo", "--version", **options)
    assert version == f"comemo {comemo.__version__}\n"
