"""Who imports whom: folders that do not mix, wings of `comemo` in one direction, no cycles.

The rules are those of docs/structure.md. Imports inside functions count.
"""

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A file imports from its own row or from earlier rows. What no row names is in the first.
ROWS = [
    ("memory", "weights", "safety", "processing"),
    ("decode", "store"),
    ("generation", "generation_inputs"),
    ("chat",),
    ("look",),
    ("conditional_generation",),
    ("auto", "auto_hook"),
    ("batch",),
    ("train",),
    ("nano",),
    ("serve",),
    ("cli", "__init__", "__main__"),
]


def module_files(package):
    """Name of each module of a package -> its file; a package itself is NAME.__init__."""
    folder = ROOT / package
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): file
        for file in sorted(folder.rglob("*.py"))
    }


@functools.cache
def imported_names(file):
    """Dotted names that a file imports, wherever in it."""
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports must be absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def find_module(name, modules):
    """The module that importing `name` runs: a file, a package, or the one that defines it."""
    for candidate in (name, f"{name}.__init__"):
        if candidate in modules:
            return candidate
    parent = name.rpartition(".")[0]
    return find_module(parent, modules) if parent else None


def import_graph(package):
    """Module -> the modules of the same package that it imports."""
    modules = module_files(package)
    return {
        module: {find_module(name, modules) for name in imported_names(file)} - {None, module}
        for module, file in modules.items()
    }


def row_of(module):
    wing = module.split(".")[1]
    return next((index for index, row in enumerate(ROWS) if wing in row), 0)


@pytest.mark.parametrize(
    ("package", "never"),
    [
        ("comemo_kernels", {"comemo", "transformers", "bench", "tests"}),
        ("comemo", {"bench", "tests", "triton", "torchvision"}),
    ],
)
def test_folders_do_not_mix(package, never):
    for module, file in module_files(package).items():
        tops = {name.split(".")[0] for name in imported_names(file)}
        assert never.isdisjoint(tops), f"{module} imports {sorted(never & tops)}"


def test_the_model_imports_public_operations_alone():
    public = {"comemo_kernels", "comemo_kernels.reference"}
    for module, file in module_files("comemo").items():
        for name in imported_names(file):
            if name.split(".")[0] == "comemo_kernels":
                assert name in public or name.rpartition(".")[0] in public, f"{module}: {name}"


def test_wings_import_in_one_direction():
    wrong = [
        f"{module} imports {other}"
        for module, others in import_graph("comemo").items()
        for other in sorted(others)
        if row_of(other) > row_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_rows_name_what_exists():
    wings = {module.split(".")[1] for module in module_files("comemo")}
    assert {name for row in ROWS for name in row} <= wings


@pytest.mark.parametrize("package", ["comemo", "comemo_kernels"])
def test_no_file_imports_itself_through_others(package):
    try:
        TopologicalSorter(import_graph(package)).prepare()
    except CycleError as error:
        pytest.fail(f"cycle: {' <- '.join(error.args[1])}")
