"""Gradients that have no gradient of their own, and say so.

PyTorch's `once_differentiable` returns gradients that do not require grad if only the inputs of the
forward pass do: a penalty on a gradient would silently have none.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def once(verb: str) -> Callable[[Callable[..., Gradients]], Callable[..., Gradients]]:
    """Decorate `backward(ctx, saved, *dys)` of an autograd function of the operation `verb`.

    It gets the saved tensors, which may be unpacked only once. To differentiate what it returns
    raises RuntimeError.
    """

    def decorate(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def computed(ctx: Any, *dys: Tensor | None) -> Gradients:
            saved = ctx.saved_tensors
            # As in the forward pass, wherever the backward pass is called.
            with torch.no_grad(), torch.autocast(saved[0].device.type, enabled=False):
                grads = backward(ctx, saved, *dys)
            if not torch.is_grad_enabled() or torch.compiler.is_compiling():
                return grads
            sources = [t for t in (*saved, *dys) if t is not None and t.requires_grad]
            given = [g for g in grads if g is not None]
            if not sources or not given:
                return grads
            held = iter(_Refuse.apply(verb, len(given), *given, *sources))
            return tuple(None if g is None else next(held) for g in grads)

        return computed

    return decorate


class _Refuse(torch.autograd.Function):
    """The first `count` tensors, which the others lead to."""

    @staticmethod
    def forward(ctx, verb, count, *tensors):
        ctx.verb = verb
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.verb}: second derivatives are not computed")
