"""comemo-nano: a small trained checkpoint, and the drawn pictures that it was taught with.

`scenes` thinks of a picture, `drawing` draws it, `questions` asks about it, `dataset` writes data
for training. The checkpoint is in the published layout.
"""

from pathlib import Path

__all__ = ["checkpoint"]


def checkpoint() -> Path:
    """The directory of the checkpoint that comes with the package."""
    return Path(__file__).parent / "checkpoint"
