"""What a training run would read, as a table: the output of `comemo train --check`."""

import math
from collections.abc import Iterator
from typing import Any

from comemo.cli.terminal import plain
from comemo.train.settings import StageSettings, TrainSettings

COLUMNS = ("lines", "samples", "tokens", "labels", "tiles", "bad")


def describe_plan(settings: TrainSettings, plan: Any) -> str:
    """Datasets, stages and bad lines of a run.

    Args:
        settings: of the run.
        plan: a `comemo.train.data.plan.Plan` of its first stage: of that stage's epochs, or of one
            epoch if it has steps.

    Returns:
        Lines of text.
    """
    rows = {plain(name): _numbers(part) for name, part in plan.datasets.items()}
    rows["all"] = [sum(numbers) for numbers in zip(*rows.values(), strict=True)]
    width = max(len(name) for name in [*rows, "dataset"])
    lines = [f"{'dataset':{width}}" + "".join(f"{name:>16}" for name in COLUMNS)]
    for name, numbers in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{number:>16,}" for number in numbers))
    epochs = settings.stages[settings.run[0]].epochs or 1
    given = sum(map(sum, plan.packs))
    lines.append(
        f"\n{epochs:g} {'epoch' if epochs == 1 else 'epochs'}: {given:,} packs, {plan.filled:.0%}"
        f" of {settings.data.max_tokens:,} tokens, padding {plan.padding:.0%}"
    )
    lines += [
        _describe_stage(name, settings.stages[name], plan, epochs, exact=name == settings.run[0])
        for name in settings.run
    ]
    return "\n".join([*lines, *_describe_faults(plan)])


def _numbers(part: Any) -> list[int]:
    bad = sum(part.bad.values())
    return [part.lines, part.samples, part.tokens, part.labels, part.tiles, bad]


def _describe_stage(name: str, stage: StageSettings, plan: Any, epochs: float, exact: bool) -> str:
    """Steps of a stage, and how often it reads the data."""
    per_epoch = sum(map(sum, plan.packs)) / epochs
    count = f"{stage.packs_per_step:,} {'pack' if stage.packs_per_step == 1 else 'packs'}"
    if stage.steps is not None:
        times = stage.steps * stage.packs_per_step / per_epoch if per_epoch else math.nan
        return f"stage {name}: {stage.steps:,} steps of {count} read the data {times:.2f} times"
    wanted = stage.epochs or 0.0
    steps = plan.steps if exact else math.ceil(per_epoch * wanted / stage.packs_per_step)
    about = "" if exact else "about "
    unit = "epoch" if wanted == 1 else "epochs"
    return f"stage {name}: {wanted:g} {unit} are {about}{steps:,} steps of {count}"


def _describe_faults(plan: Any) -> Iterator[str]:
    """Number of bad lines of each kind; which ones is told as they are found."""
    for name, kinds in plan.faults.counts.items():
        for kind, number in kinds.items():
            yield f"bad: {plain(name)}: {number:,} x {kind}"
