"""What an optimizer step read and what it lost: the numbers that are logged.

Letters: N tokens of a pack, S its samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from comemo.loss import IGNORED
from comemo.train import ranks

Sample = tuple[str, str, int]  # dataset, file, line from 1


@dataclass
class StepReport:
    """One optimizer step, over all ranks.

    Attributes:
        step: optimizer steps so far, this one included.
        loss: sum(w * l) / sum(w) over all labels of the step.
        losses: dataset -> (sum(w * l), sum(w)).
        tokens, label_tokens, tiles: numbers.
        padding_tokens: tokens of packs that stand in for streams without data.
        samples: of this rank.
        grad_norm: before clipping.
        seconds: since the step before.
        data_seconds: waiting for data, of the slowest rank.
    """

    step: int = 0
    loss: float = 0.0
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    label_tokens: int = 0
    tiles: int = 0
    padding_tokens: int = 0
    samples: list[Sample] = field(default_factory=list)
    grad_norm: float = 0.0
    seconds: float = 0.0
    data_seconds: float = 0.0


def weight_of(batch: dict[str, Any]) -> float:
    """The sum of the weights of a pack's labels: [1, N], of which the first token has none."""
    return float(batch["loss_weights"][:, 1:].double().sum())


def read_of(batches: list[dict[str, Any]]) -> StepReport:
    """What this rank reads in a step; losses follow after the forward passes."""
    report = StepReport()
    for batch in batches:
        report.tokens += batch["input_ids"].numel()
        report.label_tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        report.tiles += len(batch.get("pixel_values", ()))
        report.samples += batch["samples"]
        if not batch["samples"]:
            report.padding_tokens += batch["input_ids"].numel()
    return report


def sample_sums(values: Tensor, cu_seqlens: list[int]) -> Tensor:
    """The sum over each sample, float64 [S], of values [1, N], without a sync.

    Args:
        values: of any floating dtype.
        cu_seqlens: [S + 1].
    """
    before = F.pad(values.flatten().double().cumsum(0), (1, 0))
    return before[torch.tensor(cu_seqlens, device=values.device)].diff()


def sum_by_dataset(
    report: StepReport, losses: list[Tensor], weights: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Losses and weights of this rank's samples, added up for each dataset.

    Args:
        report: of the step.
        losses, weights: of each pack's samples [S]; packs without samples have no tensors.
    """
    summed: dict[str, tuple[float, float]] = {}
    if not losses:
        return summed
    found = torch.stack([torch.cat(losses), torch.cat(weights)]).tolist()
    for (name, *_), loss, weight in zip(report.samples, *found, strict=True):
        before = summed.get(name, (0.0, 0.0))
        summed[name] = (before[0] + loss, before[1] + weight)
    return summed


def over_ranks(report: StepReport, gather: Callable[[Any], list[Any]] = ranks.gather) -> StepReport:
    """The same report with the numbers of all ranks. All ranks must call.

    Args:
        report: of this rank; is changed.
        gather: gives the values of all ranks that read different packs.
    """
    names = ("tokens", "label_tokens", "tiles", "padding_tokens")
    own = ({name: getattr(report, name) for name in names}, report.losses, report.data_seconds)
    found = gather(own)
    losses: dict[str, tuple[float, float]] = {}
    for _, parts, _ in found:
        for name, (loss, weight) in parts.items():
            before = losses.get(name, (0.0, 0.0))
            losses[name] = (before[0] + loss, before[1] + weight)
    for name in names:
        setattr(report, name, sum(numbers[name] for numbers, _, _ in found))
    report.losses = dict(sorted(losses.items()))
    report.data_seconds = max(seconds for *_, seconds in found)
    weight = sum(weight for _, weight in losses.values())
    report.loss = sum(loss for loss, _ in losses.values()) / weight if weight else 0.0
    return report
