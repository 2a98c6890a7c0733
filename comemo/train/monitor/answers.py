"""Answers of the model while it is trained, so that people can see what it learns."""

import codecs
import contextlib
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback

from comemo.chat.session import ChatSession
from comemo.train import ranks
from comemo.train.monitor.progress import beside_bar
from comemo.train.monitor.scalars import JsonLines, TensorBoard
from comemo.train.monitor.window import Trains
from comemo.train.parallel.shard import whole_outside_layers
from comemo.train.settings import AnswerSettings, DataSettings

FIRST = 3  # lines of the data that are asked if the settings name no questions


class Answers(TrainerCallback):
    """Asks every `settings.every` steps and at the end, on the first rank, greedily.

    Where weights are divided, all ranks ask the same, and the first tells.

    Args:
        stage: its name.
        settings: what to ask and when.
        data: whose first lines are asked if `settings.ask` is empty.
        processor: of the model.
        trainer: that trains.
        folder: of the stage; gets `answers.jsonl`.
        board: folder for TensorBoard, or None.
    """

    def __init__(
        self,
        stage: str,
        settings: AnswerSettings,
        data: DataSettings,
        processor: Any,
        trainer: Trains,
        folder: Path,
        board: Path | None,
    ) -> None:
        self.stage, self.settings, self.data = stage, settings, data
        self.processor, self.trainer = processor, trainer
        self.folder, self.board_folder = folder, board
        self.questions: list[dict[str, Any]] = []
        self.autocast = False
        self.log: JsonLines | None = None
        self.board: TensorBoard | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.settings.every:
            return
        if not (ranks.is_first() or self.trainer.sharing.is_sharded):
            return
        self.questions = self.settings.ask or first_questions(self.data)
        self.autocast = args.bf16
        step = state.global_step
        if not ranks.is_first():
            return
        try:
            self.log = JsonLines(self.folder / "answers.jsonl", step)
            if self.board_folder is not None:
                self.board = TensorBoard(self.board_folder / "answers", step)
        except OSError as error:
            self.trainer.tell(f"{self.stage}: answers are not kept: {error}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.questions and (step % self.settings.every == 0 or step == state.max_steps):
            self.answer(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        board, self.board = self.board, None
        if board is not None:
            board.close()

    def answer(self, step: int) -> list[str | None]:
        """Answer all questions, print and keep the answers; None for one that failed.

        Args:
            step: optimizer steps so far.
        """
        say, answers = beside_bar(self.trainer.tell), []
        say = say if ranks.is_first() else _quiet
        for number, item in enumerate(self.questions, 1):
            text: str | None = None
            try:
                text = answer_once(
                    self.trainer.model,
                    self.processor,
                    item,
                    self.settings.max_new_tokens,
                    self.autocast,
                )
                say(f"{self.stage} {step:,}: {item['question']!r} -> {text!r}")
                self._keep(step, number, item, text)
            except Exception as error:  # a question is not worth a run
                reason = " ".join(str(error).split())
                kind = type(error).__name__
                say(f"{self.stage} {step:,}: no answer to {item['question']!r}: {kind}: {reason}")
            answers.append(text)
        return answers

    def _keep(self, step: int, number: int, item: dict[str, Any], text: str) -> None:
        if self.log is not None:
            self.log.add({"step": step, **item, "answer": text})
        if self.board is not None:
            self.board.write_text(step, f"answer/{number}", f"{item['question']}\n-> {text}")


def answer_once(
    model: Any, processor: Any, item: dict[str, Any], max_new_tokens: int, autocast: bool
) -> str:
    """Answer a question with a model that is being trained, and leave it as it was.

    Args:
        model: weights, gradients, modes and random numbers stay as they are.
        processor: of the model.
        item: `question`, and `image` with a path or several.
        max_new_tokens: of the answer.
        autocast: whether the model is trained in bfloat16. The forward of such a model computes in
            it anyway; what is computed outside of it, as the image memory, must fit.
    """
    shown = item.get("image") or []
    computing = torch.autocast(model.device.type, torch.bfloat16, enabled=autocast)
    with undisturbed(model), whole_outside_layers(model), computing:
        session = ChatSession(
            model,
            processor,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            use_cache=True,
        )
        return session.ask(item["question"], [shown] if isinstance(shown, str) else list(shown))


def _quiet(line: str) -> None:
    """What other ranks than the first tell."""


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; mode and random numbers are put back at the end."""
    modes = {module: module.training for module in model.modules()}
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])


def first_questions(data: DataSettings) -> list[dict[str, Any]]:
    """The first different questions of the evaluation or training data, videos left out.

    Args:
        data: of the run.

    Returns:
        For each `question`, `image` (paths) and `expected`, the answer in the data.

    Raises:
        ValueError, OSError: no such data.
    """
    from comemo.train.data.faults import BadSample
    from comemo.train.data.meta import read_collections
    from comemo.train.data.turns import read_talk

    path = data.eval or data.train
    found: list[dict[str, Any]] = []
    for collection in read_collections(path, data.root if path.endswith(".jsonl") else None):
        # Not by their index: a file may be long, and only its beginning is needed.
        with open(collection.annotation, "rb") as file:
            lines = list(itertools.islice(file, 10 * FIRST))
        for line in lines:
            if len(found) == FIRST:
                return found
            with contextlib.suppress(BadSample):
                talk = read_talk(line.removeprefix(codecs.BOM_UTF8))
                if not talk.video:
                    (question, expected), images = talk.turns[0], talk.images or []
                    paths = [os.path.join(collection.root, image) for image in images]
                    item = {"question": question, "image": paths, "expected": expected}
                    found += [item] if item not in found else []
    return found
