"""Write the tables of docs/structure.md from the docstrings: `python docs/write_structure.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "structure.md"
PACKAGES = ("comemo", "comemo_kernels")
START = "## Files\n"  # everything after it is written here


def first_line(file: Path) -> str:
    """The first line of a module's docstring; empty where there is none."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return text.split("\n")[0].removesuffix(".").replace("|", "\\|")


def describe_folder(folder: Path) -> Iterator[str]:
    """Heading and table of one folder."""
    yield f"\n### `{folder.relative_to(ROOT).as_posix()}/`\n"
    yield "| file | holds |\n|---|---|"
    for file in sorted(folder.glob("*.py")):
        if line := first_line(file):
            yield f"| `{file.name}` | {line} |"


def write_page(page: str) -> str:
    """The page with its tables as the files are now."""
    lines = [page[: page.index(START)] + START]
    lines.append("From the docstrings, by `python docs/write_structure.py`.")
    for package in PACKAGES:
        for folder in sorted({file.parent for file in (ROOT / package).rglob("*.py")}):
            lines += describe_folder(folder)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
