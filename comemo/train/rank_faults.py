"""What a rank that failed says of itself: rank, host, stage, step, files, place and message."""

import json
import os
import re
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from comemo.train import ranks
from comemo.train.monitor.faults import describe_samples

LONGEST = 600  # characters of a message
_TRACE = "Traceback (most recent call last):"
# What gloo and NCCL raise when another rank is gone is no DistError.
_OF_CONNECTION = re.compile("gloo|NCCL|ncclRemoteError|ProcessGroup|Connection (closed|reset)")
_OURS = f"{Path(__file__).parents[1]}{os.sep}"


class OtherRankFailed(RuntimeError):
    """This rank could not go on because another one failed; the message is that of the other."""


@dataclass
class Work:
    """What a rank is doing, for messages; whoever trains keeps it up to date.

    Attributes:
        stage: name; empty before the first.
        trainer: of the stage, once it is made: its `state.global_step` are the steps so far,
            `in_work` the samples (dataset, file, line) that are being computed.
    """

    stage: str = ""
    trainer: Any = None

    def begin(self, stage: str) -> None:
        """A stage begins; its trainer is not made yet."""
        self.stage, self.trainer = stage, None

    @property
    def step(self) -> int:
        """The step in work, from 1; 0 if there is none."""
        state = getattr(self.trainer, "state", None)
        return 0 if state is None else min(state.global_step + 1, state.max_steps)

    def describe(self) -> str:
        """Such as "rank 1 of 4 (node7), stage finetune, step 7"."""
        who = f"rank {ranks.rank()} of {ranks.world_size()} ({socket.gethostname()})"
        return who + place_of_work(self.stage, self.step)


def place_of_work(stage: str, step: int) -> str:
    """Stage and step as a part of a message; empty before the first stage."""
    named = f", stage {stage}" if stage else ""
    return f"{named}, step {step:,}" if step else named


def describe_fault(work: Work, error: BaseException) -> str:
    """One line that says which rank failed, where, with which data and why."""
    samples = getattr(work.trainer, "in_work", [])
    files = f"{describe_samples(samples)}: " if samples else ""
    return f"{work.describe()}: {files}{describe_error(error)}"


def describe_error(error: BaseException) -> str:
    """Type, place and message of an exception in one line."""
    return f"{type(error).__name__} at {_place_of(error)}: {_message_of(error)}"


def is_of_connection(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank does not answer."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_OF_CONNECTION.search(str(error)))


def record_for_torchrun(text: str) -> None:
    """Let the summary that torchrun prints at the end show why this process ended."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not file:
        return
    more = {"py_callstack": text, "timestamp": str(int(time.time()))}
    try:
        Path(file).write_text(json.dumps({"message": {"message": text, "extraInfo": more}}))
    except OSError:
        return  # the line on stderr has the same text


def _place_of(error: BaseException) -> str:
    """The innermost line of our own code, as "loader.py:88"; else the innermost of all."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    ours = [frame for frame in frames if frame.filename.startswith(_OURS)]
    chosen = (ours or frames)[-1]
    return f"{Path(chosen.filename).name}:{chosen.lineno}"


def _message_of(error: BaseException) -> str:
    """The message in one line; of one with a trace in it the first line and the last."""
    lines = [line for line in str(error).splitlines() if line.strip()] or ["no message"]
    if _TRACE in str(error):
        lines = [lines[0].replace(_TRACE, ""), lines[-1]]
    return " ".join(" ".join(lines).split())[:LONGEST]
