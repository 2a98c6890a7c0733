"""Losses that are not finite or jump: which step, which data, which layer."""

import functools
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from comemo.train.monitor.norms import largest_gradient
from comemo.train.monitor.progress import beside_bar
from comemo.train.monitor.window import Trains
from comemo.train.parallel.gradients import is_divided
from comemo.train.steps import Sample, StepReport

REMEMBERED = 64  # losses of steps
FEWEST = 8  # losses before a jump can be told
SHOWN = 4  # samples of a message


class LossFault(ValueError):
    """A loss or a gradient that is not finite; weights are those of the step before."""

    on_all_ranks = True  # see `ranks.on_all`


def first_nonfinite(
    model: nn.Module, run: Callable[[], Tensor], gather: Callable[[Any], list[Any]] | None = None
) -> str:
    """Name what is not finite first: a weight, the output of a module, the gradient of a weight.

    The gradients of the model are removed. Modules run unfused, because they are watched.

    Args:
        model: whose modules are watched.
        run: computes a loss with it, the same as before.
        gather: of `Sharing`, if weights are divided: all ranks then compute to the end together.

    Returns:
        Such as "the output of model.language_model.layers.3.mlp", or "nothing: ..." if this time
        all is finite.
    """
    weight = _first_in({name: p.detach() for name, p in model.named_parameters()})
    weights = [weight] if gather is None else gather(weight)
    for name in filter(None, weights):
        return f"the weight {name}"
    model.zero_grad(set_to_none=True)
    found: list[str] = []
    with _watched(model, found):
        loss = run()
        if not found and not loss.isfinite().all():
            found.append("the loss, from finite outputs of all modules")
        if (gather or not found) and loss.requires_grad:
            loss.backward()
    if not found:  # gradients of divided weights are not watched
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        name = _first_in(gradients)
        found += [] if name is None else [f"the gradient of {name}"]
    model.zero_grad(set_to_none=True)
    return found[0] if found else "nothing: computed again, all is finite"


def _first_in(tensors: dict[str, Any]) -> str | None:
    """The name of the first tensor of which something is not finite in the part of this rank."""
    for name, tensor in tensors.items():
        if not (tensor.to_local() if is_divided(tensor) else tensor).isfinite().all():
            return name
    return None


@contextmanager
def _watched(model: nn.Module, found: list[str]) -> Iterator[None]:
    """Add the first output or gradient that is not finite to `found`."""

    def watch_output(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(f"the output of {name or 'the model'}")

        return hook

    def watch_gradient(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not found and not gradient.isfinite().all():
                found.append(f"the gradient of {name}")

        return hook

    hooks = []
    try:
        for name, module in model.named_modules():
            hooks.append(module.register_forward_hook(watch_output(name)))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_hook(watch_gradient(name)))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _is_finite(output: Any) -> bool:
    """Whether all floating-point tensors in an output are."""
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(output.detach().isfinite().all())
    if isinstance(output, dict):
        return all(map(_is_finite, output.values()))
    return all(map(_is_finite, output)) if isinstance(output, (list, tuple)) else True


class SpikeWatch:
    """Compares each loss with the median of those before.

    Args:
        limit: how many times the median is a jump; 0 for never.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.losses: deque[float] = deque(maxlen=REMEMBERED)

    def __call__(self, loss: float) -> float | None:
        """The median of the losses before if this one is a jump; it is remembered either way."""
        median = statistics.median(self.losses) if len(self.losses) >= FEWEST else None
        self.losses.append(loss)
        jumps = median is not None and self.limit > 0 and loss > self.limit * median > 0
        return median if jumps else None


class Watch:
    """Asked before the optimizer changes weights, on all ranks: stops at a loss that is not finite.

    Args:
        limit: see `SpikeWatch`.
    """

    def __init__(self, limit: float) -> None:
        self.spikes = SpikeWatch(limit)

    def __call__(self, trainer: Trains, report: StepReport) -> None:
        """Check a step.

        Args:
            trainer: whose model has the gradients of the step.
            report: of the step.

        Raises:
            LossFault: the loss or the norm of the gradients is not finite. Names step, data and
                layer.
        """
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            raise LossFault(_describe_fault(trainer, report))
        count = len(self.spikes.losses)
        median = self.spikes(report.loss)
        if median is not None:
            samples = [sample for part in trainer.sharing.gather(report.samples) for sample in part]
            layer, share = largest_gradient(trainer.model)
            beside_bar(trainer.tell)(
                f"step {report.step:,}: the loss {report.loss:.4g} is {report.loss / median:.1f} x"
                f" the median {median:.4g} of the last {count} steps;"
                f" data: {describe_samples(samples)}; largest gradient: {layer}"
                f" ({share:.0%} of the squared norm {report.grad_norm:.3g}^2)"
            )


def _describe_fault(trainer: Trains, report: StepReport) -> str:
    """What failed in which pack. Packs of all ranks are computed again; all ranks must call."""
    own: tuple[list[Sample], str] | None = None
    for batch in trainer.batches:
        together = trainer.sharing.gather if trainer.sharing.is_sharded else None
        run = functools.partial(trainer.again, batch)
        place = first_nonfinite(trainer.model, run, together)
        if own is None and not place.startswith("nothing"):
            own = (batch["samples"], place)
            if together is None:
                break
    parts = [part for part in trainer.sharing.gather(own) if part is not None]
    what = f"the loss is {report.loss:g}"
    if math.isfinite(report.loss):
        what = f"the loss is {report.loss:.4g}, but the norm of its gradient {report.grad_norm:g}"
    where = "computed again, each pack is finite"
    if parts:
        samples, place = parts[0]
        where = f"first not finite: {place}; data: {describe_samples(samples)}"
    else:
        samples = [sample for part in trainer.sharing.gather(report.samples) for sample in part]
        where += f"; data: {describe_samples(samples)}"
    return (
        f"train: step {report.step:,}: {what}; {where}. No weight was changed in this step. A lower"
        " learning_rate or max_grad_norm, or precision: float32, may help"
    )


def describe_samples(samples: Iterable[Sample]) -> str:
    """The first few samples, as "dataset file:line"."""
    held = [f"{dataset} {file}:{line}" for dataset, file, line in samples]
    more = f" and {len(held) - SHOWN:,} more" if len(held) > SHOWN else ""
    return ", ".join(held[:SHOWN]) + more or "none"
