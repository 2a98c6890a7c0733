"""Kernel files import what kernels share and the references, but no other kernel file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "comemo_kernels"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(name):
    """Files of the package that a file imports, in functions too."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
            if node.module == "comemo_kernels":
                assert {alias.name for alias in node.names} <= {*FILES}, f"{name}: not a file"
    return {inner for inner in (n.removeprefix("comemo_kernels.") for n in found) if inner in FILES}


def all_imports(name):
    """Files that a file imports, directly or through others."""
    found, new = set(), imports(name)
    while new:
        found |= new
        new = set().union(*map(imports, new)) - found
    return found


def has_kernels(name):
    """Whether a file creates a `Kernel`, a jitted function that can be launched."""
    calls = (node.func for node in ast.walk(TREES[name]) if isinstance(node, ast.Call))
    return any(isinstance(func, ast.Name) and func.id == "Kernel" for func in calls)


KERNEL_FILES = sorted(name for name in FILES if has_kernels(name))


def test_kernel_files_are_found():
    assert {"_attend_kernel", "_rotary_kernel", "_gemm", "positions"} <= {*KERNEL_FILES}
    assert {"_op", "_blocks", "aot_cases", "attention", "memory"}.isdisjoint(KERNEL_FILES)


@pytest.mark.parametrize("name", KERNEL_FILES)
def test_kernel_files_do_not_import_each_other(name):
    assert sorted(all_imports(name) & {*KERNEL_FILES}) == []
