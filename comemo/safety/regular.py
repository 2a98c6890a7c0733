"""Files that others made: what would be waited for, or would never end, is refused unread."""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 * 2**20  # bytes; a tokenizer of a million words takes half of it
SETTINGS = (  # that are read to load a checkpoint
    *("generation_config.json", "model.safetensors.index.json", "tokenizer_config.json"),
    *("added_tokens.json", "special_tokens_map.json", "adapter_config.json"),
)

_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def check_path(function: str, path: str | os.PathLike[str]) -> None:
    """Refuse the path of a checkpoint that the libraries for weights and tokenizers cannot take.

    Args:
        function: whose name the error begins with.
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
        function: whose name the error begins with.
        path: of a file or a folder.

    Raises:
        ValueError: it is one of these.
        OSError: there is nothing, or nothing that may be looked at.
    """
    kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    if kind:
        raise ValueError(f"{function}: wanted a file, got {kind}: {os.fspath(path)!r}")


def check_checkpoint(directory: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint with files that loading would wait for or would never end to read.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError: pipes, devices, sockets, or JSON of more than `LARGEST_JSON` bytes.
        OSError: a directory that may not be read.
    """
    for path in (*Path(directory).iterdir(), *Path(directory).glob("*/*.jinja")):
        if not path.exists():  # a link to nowhere
            continue
        check_regular("check_checkpoint", path)
        if path.suffix == ".json":
            _check_length(path)


def check_settings_files(directory: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint one of whose small files holds no settings, by its name.

    Args:
        directory: of the checkpoint.

    Raises:
        ValueError: a file without a JSON object.
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
    """Read a file of JSON.

    Args:
        path: of the file.

    Returns:
        What it holds.

    Raises:
        ValueError: no file, too long, no JSON, or nested so deeply that nothing of use is.
        OSError: a file that cannot be read.
    """
    check_regular("read_json", path)
    _check_length(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"read_json: {os.fspath(path)!r} is no JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(f"read_json: {os.fspath(path)!r} is nested too deeply") from error


def _check_length(path: str | os.PathLike[str]) -> None:
    length = os.stat(path).st_size
    if length > LARGEST_JSON:
        raise ValueError(
            f"read_json: {os.fspath(path)!r} must have at most {LARGEST_JSON:,} bytes, got"
            f" {length:,}"
        )
