"""Where the numbers of a run are kept: JSON lines, and TensorBoard if it is wanted."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol


class Writer(Protocol):
    """A file of scalars."""

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Add the numbers of a step."""

    def close(self) -> None:
        """No more follows."""


class JsonLines:
    """One JSON object per entry: `step` and the scalars; null for what is not finite.

    Args:
        file: continued if it exists.
        step: steps done; entries after it, of a run that was stopped, are removed.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, file: Path, step: int) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        if file.exists():
            _keep_until(file, step)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self.add({"step": step, **scalars})

    def add(self, entry: dict[str, Any]) -> None:
        """Add an entry with a `step`; texts too."""
        entry = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in entry.items()
        }
        # Opened for each entry: a log that somebody moved away or removed begins again.
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def close(self) -> None:
        pass


def _keep_until(file: Path, step: int) -> None:
    """Remove entries after a step, and what a killed process left of a last line."""
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("step", step + 1) <= step:
            kept.append(line)
    new = file.with_suffix(".new")
    try:
        new.write_text("".join(kept), encoding="utf-8")
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


class TensorBoard:
    """Event files, by tensorboardX or PyTorch's own writer.

    Args:
        folder: of the stage.
        step: steps done; entries after it, of a run that was stopped, are declared void.

    Raises:
        ValueError: neither package is installed.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        purge = step + 1 if any(folder.iterdir()) else None
        # Of one second there is one name: the step tells a run from the one before.
        suffix = f".{step}"
        self.writer = summary_writer()(str(folder), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            if math.isfinite(value):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def write_text(self, step: int, name: str, text: str) -> None:
        """Add a text, shown as it is."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        self.writer.add_text(name, indented, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def summary_writer() -> Any:
    """The class that writes event files.

    Raises:
        ValueError: neither tensorboardX nor TensorBoard is installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                'train: tensorboard: true needs tensorboardX: pip install "comemo-kernels[train]",'
                " or set tensorboard: false"
            ) from error
    return SummaryWriter
