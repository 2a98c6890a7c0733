"""Comparison with recorded results and with exact arithmetic; all tolerances are here."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

LOGITS = 3e-4  # absolute, for logits of magnitude 10: three times the published code's own noise
RELATIVE = 1e-4  # to the largest element: components and gradients
CLEAR_MARGIN = 1e-3  # between the two best logits: above it the greedy token must be equal
SLACK = 2.0  # times the error that PyTorch itself makes in the tested dtype
SLACK_GRADIENT = 3.0
SLACK_CHAIN = 5.0  # float32 products of oneDNN, which adds all products in one chain, MKL in blocks
FEW = 512  # elements: so few may all be exact by chance, and errors in a row are correlated

Inputs = dict[str, object]

# Called for every comparison: op, dtype, output, and error as a share of its budget.
observers: list[Callable[[str, torch.dtype, str, float], None]] = []


def recorded(golden: Path, file: str, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a golden file whose names start with `prefix`, which is cut off."""
    tensors = load_file(golden / file)
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def assert_relative(actual: Tensor, wanted: Tensor, name: str = "") -> None:
    """Largest error at most RELATIVE of the largest element."""
    assert actual.shape == wanted.shape, f"{name}: {tuple(actual.shape)} != {tuple(wanted.shape)}"
    scale = wanted.abs().max().clamp(min=1e-30)
    error = ((actual - wanted).abs().max() / scale).item()
    assert error <= RELATIVE, f"{name}: relative error {error:.2e} above {RELATIVE:.0e}"


def evaluate(op: Callable, inputs: Inputs, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs of `op`, and gradients of the inputs that require them for random cotangents.

    With `dtype`, floating point inputs are converted to it first.
    """

    def convert(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)

    inputs = {name: convert(value) for name, value in inputs.items()}
    found = op(**inputs)
    outputs = [t for t in (found if isinstance(found, tuple) else (found,)) if t is not None]
    results = {f"output {i}": t for i, t in enumerate(outputs)}
    leaves = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        results |= {f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}
    return {name: t.detach() for name, t in results.items()}


def assert_matches(op: Callable, reference: Callable, inputs: Inputs, slack: float = SLACK) -> None:
    """The error of `op` is at most `slack` times that of `reference` in the same dtype.

    Errors are relative to `reference` in float64 on the same rounded inputs, plus one rounding of
    the largest value, because the reference may be exact by chance. For an output of fewer than FEW
    elements, the error of the reference is the largest on several inputs near these. Integers must
    be equal. Everything that `op` allocates with torch.empty is filled with NaN and fenced by NaN.
    """
    with red_zones():
        ours = evaluate(op, inputs)
    rounded, exact = evaluate(reference, inputs), evaluate(reference, inputs, torch.float64)
    assert list(ours) == list(rounded)
    few = any(t.is_floating_point() and 0 < t.numel() < FEW for t in ours.values())
    near = [
        (evaluate(reference, others), evaluate(reference, others, torch.float64))
        for others in (_near(inputs, 1 + i / 32) for i in (-4, -3, -2, -1, 1, 2, 3, 4) if few)
    ]
    for name, actual in ours.items():
        truth = exact[name]
        assert actual.shape == truth.shape, name
        assert actual.dtype == rounded[name].dtype, name
        if not actual.is_floating_point():
            assert torch.equal(actual, rounded[name]), name
            continue
        if not actual.numel():
            continue
        assert torch.isfinite(actual).all(), f"{name}: not finite (an element not written?)"
        allowed = SLACK_GRADIENT if name.startswith("gradient") else slack
        others = [(of[name], true[name]) for of, true in near] if actual.numel() < FEW else []
        assert_errs_no_more(actual, rounded[name], truth, name, allowed, _name_of(op), others)


def _near(inputs: Inputs, factor: float) -> Inputs:
    """Inputs with other roundings and about the same magnitude."""

    def scale(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        scaled = (factor * value.detach().double()).to(value.dtype)
        return scaled.requires_grad_(value.requires_grad)

    return {name: scale(value) for name, value in inputs.items()}


def assert_errs_no_more(
    actual: Tensor,
    rounded: Tensor,
    truth: Tensor,
    name: str = "",
    slack: float = SLACK,
    op: str = "",
    others: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Largest and mean error at most `slack` times those of `rounded`, and one rounding.

    `others` are more pairs like `rounded` and `truth`; the largest of their errors counts.
    """
    floor = torch.finfo(actual.dtype).eps * truth.abs().max().item()
    shares, faults = [], []
    for kind, measure in (("largest", Tensor.amax), ("mean", Tensor.mean)):
        error = measure((actual.double() - truth).abs()).item()
        pairs = [(rounded, truth), *others]
        yardstick = max(measure((found.double() - true).abs()).item() for found, true in pairs)
        budget = slack * yardstick + floor
        shares.append(error / budget if budget else math.inf if error else 0.0)
        if not error <= budget < math.inf:
            faults.append(
                f"{name}: {kind} error {error:.2e}, PyTorch {yardstick:.2e}, floor {floor:.2e}"
            )
    for observe in observers:
        observe(op, actual.dtype, name, max(shares))
    assert not faults, "; ".join(faults)


def _name_of(op: Callable) -> str:
    """Name of a function or of a partial one."""
    return getattr(getattr(op, "func", op), "__name__", "")


@contextlib.contextmanager
def red_zones(strip: int = 4096) -> Iterator[None]:
    """Fill what torch.empty and torch.empty_like return with NaN, and fence it.

    An element that a kernel does not write stays NaN (for integers the smallest number). A write
    outside the output changes one of the strips around it, which are checked on exit.
    """
    buffers: list[tuple[Tensor, object]] = []
    originals = torch.empty, torch.empty_like

    def fence(like: Tensor) -> Tensor:
        poison = math.nan if like.is_floating_point() else torch.iinfo(like.dtype).min
        size = like.untyped_storage().size() // like.element_size()
        buffer = like.new_full((size + 2 * strip,), poison)
        buffers.append((buffer, poison))
        return buffer.as_strided(like.shape, like.stride(), strip)

    torch.empty = lambda *args, **kwargs: fence(originals[0](*args, **kwargs))
    torch.empty_like = lambda *args, **kwargs: fence(originals[1](*args, **kwargs))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = originals
    for buffer, poison in buffers:
        for end in (buffer[:strip], buffer[-strip:]):
            untouched = end.isnan() if poison is math.nan else end == poison
            assert untouched.all(), "written outside the output"
