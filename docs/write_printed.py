"""Run the Python examples of pages on comemo-nano, and write below each what it prints.

    python docs/write_printed.py

A page takes part if it uses `comemo.nano`. What a block prints is the block of text right after it.
tests/test_docs.py compares. Pictures are drawn first, by the page's own `comemo draw` commands.
"""

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
USES_NANO = "comemo.nano"
BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n\n```text\n.*?^```$)?", re.DOTALL | re.MULTILINE)


def write_page(page: str, scope: dict[str, Any]) -> str:
    """Run the Python blocks of a page, in order.

    Args:
        page: its text.
        scope: of the names of all blocks; is filled.

    Returns:
        The page with what each block prints.
    """

    def run(found: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(found[1], scope)
        shown = f"\n\n```text\n{printed.getvalue()}```" if printed.getvalue() else ""
        return f"```python\n{found[1]}```{shown}"

    return BLOCK.sub(run, page)


def drawn_by(page: str) -> list[list[str]]:
    """The words of the page's `comemo draw` commands."""
    lines = re.findall(r"^comemo (draw .*?)(?:\s+#.*)?$", page, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def main() -> None:
    """Rewrite the pages that use comemo-nano, each in an empty folder with its pictures."""
    from comemo.cli.main import main as command

    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))):
        page = path.read_text(encoding="utf-8")
        if USES_NANO not in page:
            continue
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for words in drawn_by(page):
                if command(words) != 0:
                    raise SystemExit(f"{path.name}: comemo {shlex.join(words)} failed")
            written = write_page(page, {})
        if written != page:
            path.write_text(written, encoding="utf-8")
            print(f"{path.name}: written")


if __name__ == "__main__":
    main()
