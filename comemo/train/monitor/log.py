"""The log of a stage: numbers of the steps, gates and gradients, for people and for files."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from comemo.train import ranks
from comemo.train.monitor.norms import gates, gradient_norms
from comemo.train.monitor.progress import Progress, beside_bar
from comemo.train.monitor.scalars import JsonLines, TensorBoard, Writer
from comemo.train.monitor.window import Trains, Window


class StepLog(TrainerCallback):
    """Logs every `every` steps, the first and the last; on the first rank.

    Args:
        stage: its name.
        trainer: that trains.
        every: steps between entries.
        folder: of the stage; gets `log.jsonl`.
        board: folder for TensorBoard, or None.
    """

    def __init__(
        self, stage: str, trainer: Trains, every: int, folder: Path, board: Path | None
    ) -> None:
        self.stage, self.trainer, self.every = stage, trainer, every
        self.folder, self.board = folder, board
        self.window, self.norms = Window(), dict[str, float]()
        self.learning_rate = 0.0
        self.progress: Progress | None = None
        self.writers: list[Writer] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not ranks.is_first():
            return
        step, tell = state.global_step, self.trainer.tell
        self.progress = Progress(self.stage, state.max_steps, step, tell)
        self._write(lambda: self.writers.append(JsonLines(self.folder / "log.jsonl", step)))
        if self.board is not None:
            board = self.board
            self._write(lambda: self.writers.append(TensorBoard(board, step)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        if self._is_due(state.global_step + 1, state.max_steps):
            total = self.trainer.step_report.grad_norm
            self.norms = gradient_norms(self.trainer.model, total)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        self.window.add(self.trainer.step_report)
        if self.progress is not None:
            self.progress.advance(step)
        if not self._is_due(step, state.max_steps):
            return
        window, self.window = self.window, Window()
        bad = sum(self.trainer.sharing.gather(self.trainer.loader.faults.total))
        opened = gates(self.trainer.model)
        if self.progress is None:
            return
        scalars = window.scalars() | {"learning_rate": self.learning_rate, "bad_samples": bad}
        self.progress.show(step, scalars)
        self._write_all(step, scalars | self.norms | opened)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        if not ranks.is_first() or not metrics:
            return
        scalars = {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith("eval_") and isinstance(value, (int, float))
        }
        self._write_all(state.global_step, scalars)
        if "eval_loss" in scalars:
            say = beside_bar(self.trainer.tell)
            say(f"{self.stage} {state.global_step:,}: evaluation loss {scalars['eval_loss']:.4f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close bar and files; also for a run that ended by an exception."""
        if self.progress is not None:
            self.progress.close()
        writers, self.writers = self.writers, []
        for writer in writers:
            self._write(writer.close)

    def _is_due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step in (1, last)

    def _write_all(self, step: int, scalars: dict[str, float]) -> None:
        for writer in list(self.writers):
            if not self._write(functools.partial(writer.write, step, scalars)):
                self.writers.remove(writer)

    def _write(self, action: Callable[[], Any]) -> bool:
        """A log that cannot be written does not end training."""
        try:
            action()
        except OSError as error:
            say = beside_bar(self.trainer.tell)
            say(f"{self.stage}: this log is not written any more: {error}")
            return False
        return True
