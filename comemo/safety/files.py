"""The small files of a checkpoint, read as data: no class that they name is looked up."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from comemo.config import CoMemoConfig
from comemo.safety import regular

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
_QUIET = (
    "_raise_exceptions_for_connection_errors",
    "_raise_exceptions_for_gated_repo",
    "_raise_exceptions_for_missing_entries",
)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a `from_pretrained` that say where to find files.

    Args:
        options: by name.
    """
    return {name: options[name] for name in HUB_OPTIONS if name in options}


def find_file(path: Any, name: str, **hub: Any) -> Path | None:
    """The path of a file of a checkpoint, or None if there is no such file.

    Args:
        path: directory or repository.
        name: of the file.
        hub: where to look, see `from_pretrained`.

    Raises:
        OSError: there is no such repository.
    """
    if os.path.isfile(path):  # transformers accepts some files instead of their directory
        return None
    # Without a connection only cached files are found; callers that need more raise an error.
    found = cached_file(path, name, **dict.fromkeys(_QUIET, False), **hub)
    return None if found is None else Path(found)


def read_json(path: Any, name: str, **hub: Any) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; empty if there is no such file.

    Args:
        path, name, hub: see `find_file`.

    Raises:
        OSError: as `find_file`.
        ValueError: the file does not hold a JSON object, or is not a regular file.
    """
    file = find_file(path, name, **hub)
    if file is None:
        return {}
    content = regular.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} must hold a JSON object, got {type(content).__name__}")
    return content


def is_published(path: Any, **hub: Any) -> bool:
    """Whether a directory or repository has a config of CoMemo.

    Args:
        path, hub: see `find_file`.
    """
    if not isinstance(path, (str, os.PathLike)):
        return False
    try:
        return read_json(path, "config.json", **hub).get("model_type") == CoMemoConfig.model_type
    except (OSError, ValueError):
        return False


def check_class(function: str, path: Any, name: Any, known: Sequence[str]) -> None:
    """Refuse a file that names another class than the one that will read it.

    Args:
        function: the name that the error begins with.
        path: of the checkpoint.
        name: of the class in the file; None if it names none.
        known: the names that are accepted; the last is for the message.

    Raises:
        ValueError: another name.
    """
    if name is not None and name not in known:
        raise ValueError(
            f"{function}: {str(path)!r} must name {known[-1]} or no class, got {name!r}: classes"
            " that a checkpoint names are not looked up, and its code is not run"
        )


def check_weights(directory: Path, has_config: bool) -> None:
    """Refuse a directory whose weights are not complete safetensors files.

    Args:
        directory: of a checkpoint.
        has_config: whether the caller has a config, so that the directory needs none.

    Raises:
        ValueError: no config, no safetensors, damaged ones, or pickles in place of them.
    """
    if not has_config and not (directory / "config.json").is_file():
        raise ValueError(f"from_pretrained({directory}): the directory has no config.json")
    weights = sorted(directory.glob("*.safetensors"))
    pickles = sorted(p.name for end in ("bin", "pt", "pth") for p in directory.glob(f"*.{end}"))
    if not weights and not pickles:
        raise ValueError(f"from_pretrained({directory}): the directory has no model.safetensors")
    named = {
        str(name)
        for index in directory.glob("*.safetensors.index.json")
        for name in (read_json(directory, index.name).get("weight_map") or {}).values()
    }
    refused = sorted(name for name in named if not name.endswith(".safetensors"))
    if refused or not weights:
        raise ValueError(
            f"from_pretrained({directory}): weights must be safetensors, got {refused or pickles}:"
            " a pickle can execute code and is refused"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
