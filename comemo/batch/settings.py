"""Settings of batch inference."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comemo.batch.options import NAMES, check_options

ROPES = ("dhr", "original")
_BLOCK = 2**16  # bytes
_SAMPLES = 16  # blocks of each file of weights


@dataclass(frozen=True)
class BatchSettings:
    """What determines the answers besides the requests, and how they are computed.

    Attributes:
        model: names model and dtype; answers of another one are never mixed in. See
            `identify_checkpoint`.
        options: of `generate`, for requests that do not give them.
        seed: of drawn answers, at least 0.
        system: the system message of requests without one; None for that of the template.
        rope: "dhr" or "original".
        max_tiles: of an image; None for those of the checkpoint.
        published: whether images are read as the published code does.
        root: folder that relative paths of images begin at; None for that of the requests.
        batch: requests that are answered together.
        force: replace what is in the output, whatever it is.
        patience: seconds that ranks wait for others to begin.

    Raises:
        ValueError: an option or another value out of range.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    system: str | None = None
    rope: str = "dhr"
    max_tiles: int | None = None
    published: bool = False
    root: Path | None = None
    batch: int = 8
    force: bool = False
    patience: float = 300.0

    def __post_init__(self) -> None:
        if unknown := sorted(self.options.keys() - set(NAMES)):
            raise ValueError(f"BatchSettings: options must be of {NAMES}, got {unknown[0]!r}")
        try:
            check_options(self.options)
        except ValueError as error:
            raise ValueError(f"BatchSettings: {error}") from None
        for name, low in (("batch", 1), ("max_tiles", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < low):
                raise ValueError(f"BatchSettings: {name} must be at least {low}, got {value!r}")
        if self.rope not in ROPES:
            raise ValueError(f"BatchSettings: rope must be one of {ROPES}, got {self.rope!r}")

    def digest(self) -> str:
        """A short digest of what determines answers; not of how they are computed."""
        names = ("model", "seed", "system", "rope", "max_tiles", "published")
        facts = {name: getattr(self, name) for name in names}
        facts["options"] = {k: v for k, v in sorted(self.options.items()) if v is not None}
        facts["root"] = None if self.root is None else os.path.realpath(self.root)
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]


def identify_checkpoint(directory: str | os.PathLike[str]) -> str:
    """A digest of a checkpoint: of its small files, and of samples of its weights.

    Training changes all weights, so samples show it, and a checkpoint of many gigabytes is not read
    twice. The same files have the same digest in any folder, on any machine.

    Args:
        directory: of the checkpoint.

    Raises:
        OSError: a file that cannot be read.
    """
    whole = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.suffix not in (".json", ".model", ".jinja", ".safetensors"):
            continue
        size = path.stat().st_size
        whole.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if path.suffix != ".safetensors" or size <= _BLOCK * _SAMPLES:
                whole.update(file.read())
                continue
            for index in range(_SAMPLES):
                file.seek((size - _BLOCK) * index // (_SAMPLES - 1))
                whole.update(file.read(_BLOCK))
    return whole.hexdigest()
