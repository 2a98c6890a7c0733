"""Answers of earlier runs: which ones are kept, and when the output is not ours to replace."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comemo.batch.parts import PartReader, RunFolder
from comemo.batch.requests import RequestLines, digest_of

Place = tuple[Path, int]  # file and offset of a line


def check_earlier(folder: RunFolder, lines: RequestLines, settings: str) -> None:
    """Refuse to replace an output of other settings, of other requests, or of somebody else.

    Every rank of a run may call it: all come to the same end.

    Args:
        folder: of the run.
        lines: the requests.
        settings: digest of the settings.

    Raises:
        ValueError: says what is there.
    """
    output, advice = folder.output, "choose another output, or --force to answer all lines anew"
    entries = 0
    for path in (output, *folder.parts()):
        first = next(PartReader(path).read(), None)
        if first is None:
            if path == output and output.exists() and output.stat().st_size:
                raise ValueError(
                    f"answer_file: {str(output)!r} exists and holds no answers of this command:"
                    f" {advice}"
                )
            continue
        entries += 1
        if first[1]["digest"].rpartition("-")[2] != settings:
            raise ValueError(
                f"answer_file: {str(path)!r} holds answers of another model, or with other options,"
                f" seed or dtype: {advice}"
            )
    if entries and next(find_kept(folder, lines, settings), None) is None:
        raise ValueError(
            f"answer_file: {str(output)!r} holds answers to other requests than"
            f" {str(lines.path)!r}: {advice}"
        )


def find_kept(
    folder: RunFolder, lines: RequestLines, settings: str
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Answers of earlier runs that still fit their lines, errors included.

    Args:
        folder, lines, settings: see `check_earlier`.

    Yields:
        Place and content of each. A line may have several.
    """
    with lines.opened() as read:
        for path in (folder.output, *folder.parts()):
            for offset, item in PartReader(path).read():
                number = item["line"]
                if number in lines and item["digest"] == full_digest(read(number), settings):
                    yield (path, offset), item


def full_digest(line: bytes, settings: str) -> str:
    """What an answer carries: the digest of its line and that of the settings."""
    return f"{digest_of(line)}-{settings}"


def check_output(output: Path, requests: Path) -> None:
    """Refuse an output that cannot be written, or is the requests.

    Raises:
        ValueError: no such folder, or not a file.
    """
    if not output.parent.is_dir():
        raise ValueError(f"answer_file: there is no directory {str(output.parent)!r}")
    if output.exists() and not output.is_file():
        raise ValueError(f"answer_file: output must be a file, got {str(output)!r}")
    if output.exists() and os.path.samefile(output, requests):
        raise ValueError("answer_file: output and requests must be two files")
