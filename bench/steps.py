"""Forward and backward of one computation by several ways, and the errors of their gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.ways import Ways

Outputs = tuple[Tensor, ...]


class Step(NamedTuple):
    """A way to compute something that is differentiated."""

    forward: Callable[..., Tensor | Sequence[Tensor]]
    leaves: list[Tensor]  # its arguments, which need gradients
    cotangents: list[Tensor]  # of its outputs

    def outputs(self) -> Outputs:
        """With a graph."""
        with torch.enable_grad():
            found = self.forward(*self.leaves)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def gradients(self, outputs: Outputs, keep: bool = False) -> Outputs:
        """Of all leaves; a leaf that is not used gets zeros. `keep` allows another call."""
        used = [(y, dy) for y, dy in zip(outputs, self.cotangents, strict=True) if y.requires_grad]
        if not used:
            return tuple(torch.zeros_like(leaf) for leaf in self.leaves)
        return torch.autograd.grad(
            [y for y, _ in used],
            self.leaves,
            [dy for _, dy in used],
            retain_graph=keep,
            materialize_grads=True,
        )

    def run(self) -> Outputs:
        """Outputs and gradients."""
        outputs = self.outputs()
        return (*(y.detach() for y in outputs), *self.gradients(outputs))


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    """The same tensors as leaves of new graphs."""
    return [t.detach().requires_grad_() for t in tensors]


def both_ways(steps: dict[str, Step]) -> Ways:
    """Ways that compute forward and backward."""

    def call(_: int, step: Step) -> Outputs:
        return step.run()

    return {name: _bind(call, step) for name, step in steps.items()}


def backward_ways(steps: dict[str, Step]) -> Ways:
    """Ways that compute the backward of a graph that the first call makes; the same results."""

    def of(step: Step) -> Callable[[int], Any]:
        held: list[Outputs] = []

        def call(_: int) -> Outputs:
            if not held:
                held.append(step.outputs())
            gradients = step.gradients(held[0], keep=True)
            return (*(y.detach() for y in held[0]), *gradients)

        return call

    return {name: of(step) for name, step in steps.items()}


def _bind(call: Callable[[int, Step], Outputs], step: Step) -> Callable[[int], Any]:
    return lambda i: call(i, step)


def largest_error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference of any output or gradient, relative to its own largest element.

    Where zeros are wanted, anything else is an infinite error.
    """
    errors = [0.0]
    for x, y in zip(found, wanted, strict=True):
        if not y.numel():
            continue
        difference, most = (t.abs().amax().item() for t in (x.double() - y.double(), y.double()))
        errors.append(difference / most if most else float("inf") if difference else 0.0)
    return max(errors, key=lambda error: (error != error, error))
