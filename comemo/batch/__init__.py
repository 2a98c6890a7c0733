"""Batch inference: questions from a file of JSON lines, answered by any number of processes.

`answer_file` does it; `comemo batch` is its command line.
"""

from comemo.batch.run import Summary, answer_file
from comemo.batch.settings import BatchSettings

__all__ = ["BatchSettings", "Summary", "answer_file"]
