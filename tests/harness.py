"""How results are held against recorded ones and against exact arithmetic: all tolerances."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

LOGITS = 3e-4  # absolute, for logits of magnitude 10: three times the published code's own noise
RELATIVE = 1e-4  # to the largest element: components and gradients
CLEAR_MARGIN = 1e-3  # between the two best logits: above it the greedy token must be equal


def recorded(golden: Path, file: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a golden file whose names start with `prefix`, which is cut off."""
    tensors = load_file(golden / file)
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def assert_relative(
    actual: Tensor, wanted: Tensor, name: str = "", bound: float = RELATIVE
) -> None:
    """Largest error at most `bound` of the largest element."""
    assert actual.shape == wanted.shape, f"{name}: {tuple(actual.shape)} != {tuple(wanted.shape)}"
    scale = wanted.abs().max().clamp(min=1e-30)
    error = ((actual - wanted).abs().max() / scale).item()
    assert error <= RELATIVE, f"{name}: relative error {error:.2e} above {RELATIVE:.0e}"


def assert_no_worse(op: Callable, reference: Callable, inputs: dict, slack: float = 2.0) -> None:
    """`op` errs at most `slack` times as much as `reference` does in the same dtype.

    Errors are measured from `reference` in float64 on the same rounded inputs; one rounding of
    the largest value is the floor, for a reference that happens to be exact.
    """

    def convert(value: object) -> object:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floats else value

    actual, rounded = op(**inputs), reference(**inputs)
    exact = reference(**{name: convert(value) for name, value in inputs.items()})
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all(), "not finite"
    floor = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    for measure in (Tensor.amax, Tensor.mean):
        error = measure((actual.double() - exact).abs()).item()
        yardstick = measure((rounded.double() - exact).abs()).item()
        assert error <= slack * yardstick + floor, f"error {error:.2e}, PyTorch {yardstick:.2e}"
