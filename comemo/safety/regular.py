"""Untrusted files: pipes, devices and endless files are refused before they are read."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 * 2**20  # bytes; a tokenizer of a million words takes half of it
SETTINGS = (  # files that are read to load a checkpoint
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "adapter_config.json",
)

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_path(function: str, path: str | os.PathLike[str]) -> None:
    """Refuse the path of a checkpoint that safetensors and sentencepiece cannot open.

    Args:
        function: the name that the error begins with.
        path: of a directory.

    Raises:
        ValueError: it is not UTF-8.
    """
    if re.search("[\ud800-\udfff]", os.fspath(path)):
        raise ValueError(
            f"{function}: the path of a checkpoint must be UTF-8, got {os.fspath(path)!r}"
        )


def check_regular(function: str, path: str | os.PathLike[str]) -> None:
    """Refuse pipes, devices and sockets.

    Args:
        function: the name that the error begins with.
        path: of a file or a directory.

    Raises:
        ValueError: it is one of these.
        OSError: it does not exist, or may not be accessed.
    """
    kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    if kind:
        raise ValueError(f"{function}: wanted a file, got {kind}: {os.fspath(path)!r}")


def check_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint with files on which loading would block or never end.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError: pipes, devices, sockets, or JSON of more than `LARGEST_JSON` bytes.
        OSError: a directory that cannot be read.
    """
    for path in (*Path(directory).iterdir(), *Path(directory).glob("*/*.jinja")):
        if not path.exists():  # a broken link
            continue
        check_regular("check_checkpoint", path)
        if path.suffix == ".json":
            _check_length(path)


def check_settings_files(directory: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint with a settings file that does not hold a JSON object.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError: names the file.
        OSError: a file that cannot be read.
    """
    for name in SETTINGS:
        path = Path(directory) / name
        if path.exists() and not isinstance(content := read_json(path), dict):
            got = type(content).__name__
            raise ValueError(
                f"check_settings_files: {str(path)!r} must hold a JSON object, got {got}"
            )


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Args:
        path: of the file.

    Returns:
        Its content.

    Raises:
        ValueError: not a regular file, too long, not JSON, or nested too deeply.
        OSError: a file that cannot be read.
    """
    check_regular("read_json", path)
    _check_length(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_json: {os.fspath(path)!r} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"read_json: {os.fspath(path)!r} is nested too deeply") from error


def _check_length(path: str | os.PathLike[str]) -> None:
    length = os.stat(path).st_size
    if length > LARGEST_JSON:
        raise ValueError(
            f"read_json: {os.fspath(path)!r} must have at most {LARGEST_JSON:,} bytes, got"
            f" {length:,}"
        )
