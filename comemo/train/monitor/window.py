"""The steps since the last log line, as numbers."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from comemo.train.parallel.plan import Sharing
from comemo.train.steps import StepReport

_SUMMED = ("seconds", "data_seconds", "tokens", "label_tokens", "tiles", "padding_tokens")


class Trains(Protocol):
    """What a monitor asks of a trainer.

    Attributes:
        step_report: of the last step.
        batches: packs of this rank in the current step.
        loader: `faults.total` is the number of bad samples of this rank.
        tell: prints a line for the user.
        model: without the wrappers of several ranks.
        sharing: how ranks share the model and the data.
    """

    step_report: Any
    batches: list[dict[str, Any]]
    loader: Any
    tell: Any
    model: Any
    sharing: Sharing

    def again(self, batch: dict[str, Any]) -> Any:
        """The loss of one of `batches`, with the same random numbers."""


@dataclass
class Window:
    """Sums over steps."""

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    tokens: int = 0
    label_tokens: int = 0
    tiles: int = 0
    padding_tokens: int = 0
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, report: StepReport) -> None:
        """Count a step."""
        self.steps += 1
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(report, name))
        for name, (loss, weight) in report.losses.items():
            before = self.losses.get(name, (0.0, 0.0))
            self.losses[name] = (before[0] + loss, before[1] + weight)

    def scalars(self) -> dict[str, float]:
        """Value by name.

        `loss` and `loss/DATASET` are means over labels, weighted as in training, per second are
        `tokens_per_second` and `tiles_per_second`; `padding_share` is that of all tokens,
        `data_wait_share` that of the time.
        """
        seconds, weight = max(self.seconds, 1e-9), sum(w for _, w in self.losses.values())
        values = {
            "loss": sum(loss for loss, _ in self.losses.values()) / weight if weight else 0.0,
            "tokens_per_second": self.tokens / seconds,
            "label_tokens_per_second": self.label_tokens / seconds,
            "tiles_per_second": self.tiles / seconds,
            "padding_share": self.padding_tokens / max(self.tokens, 1),
            "data_wait_share": min(self.data_seconds / seconds, 1.0),
            "seconds_per_step": self.seconds / max(self.steps, 1),
        }
        means = {name: loss / weight for name, (loss, weight) in self.losses.items() if weight}
        return values | {f"loss/{name}": mean for name, mean in sorted(means.items())}
