"""Train one configuration: first short conversations, then ones with much between."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

from comemo import CoMemoForConditionalGeneration
from examples.long_context.conversations import Sample, Writer
from examples.long_context.paths import arguments, collate

LONGEST = 1024  # tokens between a picture and questions about it, at most
TOKENS = 1600  # of a step, about
MOST = 3  # shapes that are asked for after other pictures
NEAR = 0.4  # share of the steps that have nothing between


@dataclass(frozen=True)
class Recipe:
    """How all configurations are trained.

    Attributes:
        steps: of the optimizer.
        lr: highest learning rate.
        warmup: share of the steps until it is reached; it then falls to 0 by a cosine.
    """

    steps: int = 600
    lr: float = 1e-3
    warmup: float = 0.05

    def share(self, step: int) -> float:
        """Of the highest learning rate, at a step counted from 0."""
        done = (step + 1) / (self.steps + 1)
        if done < self.warmup:
            return done / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (done - self.warmup) / (1 - self.warmup))


def train(
    model: CoMemoForConditionalGeneration,
    path: str,
    writer: Writer,
    chosen: range,
    seed: int,
    recipe: Recipe,
    say: Callable[[str], None] = lambda text: None,
) -> list[tuple[int, float]]:
    """Train a model in place.

    Args:
        model: of `make_model`.
        path: of `PATHS`.
        writer: of conversations.
        chosen: the indices of the pictures to learn from.
        seed: of the conversations. The same seed gives every path the same ones.
        recipe: how.
        say: told of the progress.

    Returns:
        (step, mean loss since the last one).
    """
    groups: list[dict] = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.share)
    random = Random(f"conversations {seed}")
    curve, losses, begin = [], [], time.perf_counter()
    every = max(1, recipe.steps // 40)
    model.train()
    for step in range(1, recipe.steps + 1):
        samples = make_batch(writer, chosen, random, near=step <= NEAR * recipe.steps)
        given, labels = arguments(model, collate(samples, writer.pictures), path)
        loss = model(**given, labels=labels, skip_logits=True).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % every == 0 or step == recipe.steps:
            curve.append((step, float(torch.stack(losses).mean())))
            losses, rate = [], step / (time.perf_counter() - begin)
            say(f"step {step}/{recipe.steps}  loss {curve[-1][1]:.3f}  {rate:.2f} steps/s")
    return curve


def make_batch(writer: Writer, chosen: range, random: Random, near: bool) -> list[Sample]:
    """Conversations of one kind and about one length, so that rows need little padding.

    Args:
        writer: of conversations.
        chosen: the indices of the pictures to learn from.
        random: chooses.
        near: only conversations about one picture, with nothing between.
    """
    kind = "near" if near else random.choice(("near", "text", "pictures"))
    between = 0 if kind == "near" else round(2 ** random.uniform(5, math.log2(LONGEST)))
    scenes, count = writer.pictures.scenes, writer.pictures.count
    # Pictures of more shapes have all of those that could be asked for.
    side = 2 if kind == "pictures" else 3
    fitting = [index for index in chosen if scenes[index].side <= side]
    like = count(random.choice(fitting))  # image tokens of all pictures of a step

    def other() -> int:
        while count(index := random.choice(fitting)) != like:
            pass
        return index

    samples: list[Sample] = []
    while not samples or (len(samples) + 1) * max(len(s.ids) for s in samples) < TOKENS * 1.05:
        sample, index = Sample(), other()
        writer.show(sample, index)
        if kind == "near":
            if random.random() < 0.5:
                writer.describe(sample, index)
            else:
                writer.ask(sample, writer.choose(index, random))
        elif kind == "text":
            writer.fill(sample, random, between)
            writer.ask(sample, writer.choose(index, random))
        else:
            asked = writer.choose(index, random, MOST)
            writer.chat(sample, between, other, asked)
            writer.ask(sample, asked)
        samples.append(sample)
    return samples
