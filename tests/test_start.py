"""What a start imports: nothing that takes seconds before it is needed, and the same answers."""

import ast
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SLOW
from transformers.models.auto import modeling_auto

import comemo
from comemo import nano
from comemo.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "comemo_kernels")
CHILD = f"""
import sys
from comemo.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(status, *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
"""
NANO = str(nano.checkpoint())


def child(code, *words, cwd=None):
    """Run Python; returns stdout and the last line of stderr."""
    command = [sys.executable, "-c", code, *words]
    here = str(Path(comemo.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": here}
    ended = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout, (ended.stderr.splitlines() or [""])[-1]


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], [], *([name, "--help"] for name in COMMANDS)],
    ids=" ".join,
)
def test_help_imports_no_library(words):
    out, last = child(CHILD, *words)
    assert last == "0"
    assert out


@pytest.mark.parametrize(
    "words",
    [["nothing"], ["--nothing"], ["chat"], ["chat", "nano", "a", "--max-tiles", "0"], ["store"]],
    ids=" ".join,
)
def test_wrong_words_import_no_library(words):
    assert child(CHILD, *words) == ("", "2")


def test_commands_without_a_model_import_no_library(tmp_path):
    for words in (
        ["draw", "a.png", "--seed", "1"],
        ["map", "a.png", "-o", "map.png"],
        ["store", "stats", "."],
        ["info", NANO],
        ["info", NANO, "--json"],
    ):
        out, last = child(CHILD, *words, cwd=tmp_path)
        assert last == "0", words
        assert out


def test_import_comemo_imports_no_library():
    code = f"import sys, comemo\nprint(*({set(HEAVY)} | {{'numpy', 'PIL'}}) & set(sys.modules))"
    assert child(code)[0] == "\n"


def test_names_are_those_of_type_checkers():
    tree = ast.parse(inspect.getsource(comemo))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == comemo._PLACES
    assert sorted([*typed, "__version__"]) == sorted(comemo.__all__)
    assert {*comemo.__all__, "__getattr__"} <= set(dir(comemo))
    for name in comemo.__all__[:-1]:
        value = getattr(comemo, name)
        if inspect.isclass(value):
            assert pickle.loads(pickle.dumps(value)) is value


def test_modules_are_names_of_the_package():
    assert child("import comemo; print(comemo.nano.checkpoint())")[0] == f"{NANO}\n"
    with pytest.raises(AttributeError, match="'comemo' has no attribute 'no_such_name'"):
        _ = comemo.no_such_name
    with pytest.raises(ImportError):
        exec("from comemo import no_such_name")


def test_the_awaited_modules_keep_their_own_loader():
    assert inspect.getsource(modeling_auto)
    assert type(modeling_auto.__spec__.loader).__module__ != "comemo.auto_hook"
    method = modeling_auto.AutoModel.from_pretrained
    assert (method.__self__, method.__name__) == (modeling_auto.AutoModel, "from_pretrained")


ORDERS = {
    "before": "import transformers\nfrom transformers import AutoConfig, AutoTokenizer, AutoModel\n"
    "import comemo\n",
    "after": "import comemo\nfrom transformers import AutoConfig, AutoTokenizer, AutoModel\n",
}
LOAD = """
import sys
assert "comemo.auto" not in sys.modules
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers import AutoModelForImageTextToText, AutoProcessor
for auto in FIRST, AutoConfig, AutoTokenizer, AutoProcessor, AutoImageProcessor, AutoModel, \\
        AutoModelForImageTextToText:
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""
LOADED = ("Config", "Tokenizer", "Processor", "ImageProcessor", *2 * ["ForConditionalGeneration"])


@SLOW
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("first", "index"), [("AutoTokenizer", 1), ("AutoModel", 4)])
def test_auto_classes_load_the_model(order, first, index):
    out, _ = child(ORDERS[order] + LOAD.replace("FIRST", first), NANO)
    loaded = [f"InternLM2{name}" if name == "Tokenizer" else f"CoMemo{name}" for name in LOADED]
    assert out.split() == [loaded[index], *loaded]


@SLOW
def test_tables_know_a_model_whose_class_was_imported():
    code = """
import comemo
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as table
from comemo.conditional_generation import CoMemoForConditionalGeneration as model
print(table[model.config_class] is model)
"""
    assert child(code)[0] == "True\n"


SECONDS = """
import os, subprocess, sys
subprocess.run([sys.executable, "-m", "comemo", *sys.argv[1:]], check=True, capture_output=True)
times = os.times()
print(times.children_user + times.children_system)
"""


@SLOW
@pytest.mark.parametrize(
    ("words", "most"), [(["--help"], 0.3), (["chat", "--help"], 0.3), (["info", NANO], 1.0)]
)
def test_a_start_takes_little_time(words, most):
    """Processor time, the least of five runs, with the bytecode of the first."""
    assert min(float(child(SECONDS, *words)[0]) for _ in range(5)) <= most


@pytest.mark.parametrize("before", [None, "0"])
def test_commands_ask_for_huge_pages_unless_told_otherwise(monkeypatch, before):
    name = "THP_MEM_ALLOC_ENABLE"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    code = "import os, sys; from comemo.cli.main import main; main(sys.argv[1:])"
    code += f"; print(os.environ[{name!r}])"
    assert child(code, "info", NANO)[0].splitlines()[-1] == (before or "1")
