"""Batch inference: questions from a file of JSON lines, answered by any number of processes.

`answer_file` does it; `comemo batch` is its command line, whose options need no torch: `run` is
imported when it is used.
"""

from typing import TYPE_CHECKING, Any

from comemo.batch.settings import BatchSettings

if TYPE_CHECKING:
    from comemo.batch.run import Summary, answer_file

__all__ = ["BatchSettings", "Summary", "answer_file"]


def __getattr__(name: str) -> Any:
    if name in ("Summary", "answer_file"):
        from comemo.batch import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
