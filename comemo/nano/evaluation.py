"""How often comemo-nano answers right, in each kind of question, and how often chance would."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from comemo import images, prompts
from comemo.chat.streamers import answer_text
from comemo.nano.held_out import Example, best_guesses, form_of, held_out
from comemo.nano.questions import KINDS

LONGEST = 64  # tokens of an answer; the longest right one has fewer
Z = 1.959964  # of a normal distribution, 95 % of which is within so many deviations


@dataclass(frozen=True)
class Score:
    """How many answers of some questions are right.

    Attributes:
        n: questions.
        right: right answers.
        accuracy: their share.
        low, high: the share's Wilson interval of 95 %.
        chance: the share of right answers without looking: the commonest answer in training to
            each form of question.
    """

    n: int
    right: int
    accuracy: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Evaluation:
    """Questions, answers and scores.

    Attributes:
        examples: what was asked.
        answers: of the model, one each.
        tiles: the most tiles of a picture.
        kinds: kind -> its score.
        overall: the score of all questions.
    """

    examples: list[Example]
    answers: list[str]
    tiles: int
    kinds: dict[str, Score]
    overall: Score

    def wrong(self) -> list[tuple[Example, str]]:
        """Examples with a wrong answer, and the answer."""
        both = zip(self.examples, self.answers, strict=True)
        return [(one, answer) for one, answer in both if not is_right(one, answer)]

    def facts(self) -> dict[str, Any]:
        """Everything as data that JSON can hold."""
        return {
            "questions": len(self.examples),
            "tiles": self.tiles,
            "overall": asdict(self.overall),
            "kinds": {kind: asdict(score) for kind, score in self.kinds.items()},
            "answers": [
                {
                    "kind": one.kind,
                    "seed": one.seed,
                    "layout": one.layout,
                    "question": one.question,
                    "truth": one.answer,
                    "answer": answer,
                    "right": is_right(one, answer),
                }
                for one, answer in zip(self.examples, self.answers, strict=True)
            ],
        }


def evaluate(
    model: Any,
    processor: Any,
    count: int = 1000,
    kinds: Sequence[str] | None = None,
    tiles: int | None = None,
    batch: int = 8,
    done: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask held-out questions, each alone about its picture, and count the right answers.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        processor: a `CoMemoProcessor` of its checkpoint.
        count, kinds: see `held_out`.
        tiles: most tiles of a picture; None for those of the checkpoint. 1: the thumbnail alone.
        batch: questions that are answered together; the answers are those of each alone.
        done: called with the number of answers so far, after every batch.

    Returns:
        Questions, answers and scores.

    Raises:
        ValueError: see `held_out`; tiles or batch out of range.
    """
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"evaluate: batch must be at least 1, got {batch!r}")
    tiles = model.config.max_dynamic_patch if tiles is None else tiles
    if not isinstance(tiles, int) or not 1 <= tiles <= images.MAX_TILES:
        raise ValueError(f"evaluate: tiles must be from 1 to {images.MAX_TILES}, got {tiles!r}")
    examples, answers = held_out(count, kinds), list[str]()
    for start in range(0, count, batch):
        answers += _answer(model, processor, examples[start : start + batch], tiles)
        if done is not None:
            done(len(answers))
    named = dict.fromkeys(one.kind for one in examples)
    scores = {kind: _score(examples, answers, kind) for kind in KINDS if kind in named}
    return Evaluation(examples, answers, tiles, scores, _score(examples, answers))


@torch.no_grad()
def _answer(model: Any, processor: Any, examples: list[Example], tiles: int) -> list[str]:
    """Greedy answers to some questions in one batch."""
    tokenizer, template = processor.tokenizer, model.config.template
    pictures = [one.pictures() for one in examples]
    texts = []
    for one in examples:
        marks = f"{prompts.IMAGE_MARK}\n" * len(one.scenes)
        texts.append(prompts.build_prompt([(marks + one.question, None)], template))
    inputs = processor(images=pictures, text=texts, max_num=tiles, padding_side="left")
    stop = tokenizer.convert_tokens_to_ids(prompts.stop_text(template))
    tokens = model.generate(
        **inputs.to(model.device),
        max_new_tokens=LONGEST,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    own = tokens[:, inputs["input_ids"].shape[1] :]
    return [answer_text(tokenizer, row, prompts.stop_text(template)).strip() for row in own]


def is_right(example: Example, answer: str) -> bool:
    """Whether an answer is the right one, but for spaces around it."""
    return answer.strip() == example.answer


def _score(examples: list[Example], answers: list[str], kind: str | None = None) -> Score:
    chosen = [
        (one, answer)
        for one, answer in zip(examples, answers, strict=True)
        if kind in (None, one.kind)
    ]
    n, guesses = len(chosen), best_guesses()
    right = sum(is_right(one, answer) for one, answer in chosen)
    guessed = sum(is_right(one, guesses.get(form_of(one.question), "")) for one, _ in chosen)
    return Score(n, right, right / n, *wilson(right, n), guessed / n)


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's interval of 95 % of a share.

    Args:
        right: how many of `n`.
        n: at least 1.

    Returns:
        (low, high), from 0 to 1. Also shares of 0 and 1 have an interval of some width.

    Raises:
        ValueError: not 0 <= right <= n, or n < 1.
    """
    if n < 1 or not 0 <= right <= n:
        raise ValueError(f"wilson: wanted 0 <= right <= n and n >= 1, got {right} of {n}")
    share, squared = right / n, Z * Z
    middle = (share + squared / (2 * n)) / (1 + squared / n)
    half = Z / (1 + squared / n) * math.sqrt(share * (1 - share) / n + squared / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)
