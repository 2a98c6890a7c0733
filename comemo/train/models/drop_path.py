"""Stochastic depth in the vision tower (Huang et al., arXiv:1603.09382), per tile."""

from typing import Any

import torch
from torch import Tensor, nn

from comemo.conditional_generation import CoMemoForConditionalGeneration


class _DropBranch:
    """A forward hook of a branch: in training it drops the branch for some of the tiles."""

    draws = True  # random numbers, for each tile in its place

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not module.training:
            return None
        if isinstance(output, tuple):  # attention: output and weights
            return self._drop(output[0]), *output[1:]
        return self._drop(output)

    def _drop(self, x: Tensor) -> Tensor:
        """x [T, tokens, C], 0 for some tiles; the mean over many calls is x."""
        keep = 1 - self.rate
        kept = torch.rand(len(x), 1, 1, device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


def set_drop_path(model: CoMemoForConditionalGeneration, rate: float) -> None:
    """Drop branches of vision layers at random while training.

    Layer i of L drops its attention and, independently, its feed-forward network with probability
    rate * i / (L - 1), for each tile by itself; what is kept is divided by 1 - probability. In
    evaluation mode nothing is dropped. As published, frozen towers drop, too, if in training mode.

    Args:
        model: its vision tower gets hooks; those of an earlier call are replaced.
        rate: from 0, which removes the hooks, up to but not including 1.

    Raises:
        ValueError: another rate. Nothing is changed then.
    """
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"set_drop_path: rate must be a number from 0 to below 1, got {rate!r}")
    layers = model.model.vision_tower.encoder.layer
    rates = torch.linspace(0, rate, len(layers)).tolist()
    branches = [
        (b, own) for layer, own in zip(layers, rates, strict=True) for b in _branches(layer)
    ]
    before = [(branch._forward_hooks, dict(branch._forward_hooks)) for branch, _ in branches]
    try:
        for branch, own in branches:
            for index, hook in list(branch._forward_hooks.items()):
                if isinstance(hook, _DropBranch):
                    del branch._forward_hooks[index]
            if own:
                branch.register_forward_hook(_DropBranch(own))
    except BaseException:
        for hooks, old in before:
            hooks.clear()
            hooks.update(old)
        raise


def _branches(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.attention, layer.mlp
