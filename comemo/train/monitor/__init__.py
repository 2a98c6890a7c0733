"""What people see of a run: progress, logs, answers, and faults with their place."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from comemo.train.monitor.answers import Answers
from comemo.train.monitor.faults import LossFault, SpikeWatch, Watch, first_nonfinite
from comemo.train.monitor.log import StepLog
from comemo.train.monitor.scalars import summary_writer
from comemo.train.monitor.window import Trains
from comemo.train.settings import StageSettings, TrainSettings

__all__ = [
    "LossFault",
    "SpikeWatch",
    "Watch",
    "first_nonfinite",
    "make_callbacks",
    "make_watch",
]


def make_callbacks(
    settings: TrainSettings, stage: str, processor: Any, trainer: Trains
) -> list[TrainerCallback]:
    """Callbacks that log a stage and answer questions.

    They belong to all ranks, after the trainer is made; `close` of each ends it after an exception.

    Args:
        settings: of the run. Files are in `output`/`stage` and `output`/tensorboard/`stage`.
        stage: its name.
        processor: of the model.
        trainer: that trains.

    Raises:
        ValueError: TensorBoard is wanted and not installed.
    """
    output = Path(settings.output)
    board = None
    if settings.tensorboard:
        summary_writer()
        board = output / "tensorboard" / stage
    every = settings.stages[stage].log_every
    folder = output / stage
    log = StepLog(stage, trainer, every, folder, board)
    answers = Answers(stage, settings.answers, settings.data, processor, trainer, folder, board)
    return [log, answers]


def make_watch(settings: StageSettings) -> Watch:
    """What is asked about each step before the optimizer changes weights.

    Args:
        settings: of the stage.
    """
    return Watch(settings.spike)
