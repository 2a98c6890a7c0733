"""Norms and activations of somebody else's model that may be computed from their weights."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from comemo_kernels.plain import has_plain_weights, is_plain, is_untouched

__all__ = ["has_plain_weights", "is_plain", "is_rms_norm", "is_silu", "is_untouched"]

_norms: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # classes that were tried


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module is a plain RMSNorm as in Llama: `weight * normed`, `variance_epsilon`.

    The name does not prove it, some add 1 to their weight: a class is tried once, on one row.
    """
    attributes = vars(module)
    return (
        type(module).__name__.endswith("RMSNorm")
        and list(attributes["_parameters"]) == ["weight"]
        and not attributes["_modules"]
        and isinstance(attributes.get("variance_epsilon"), float)
        and is_untouched(module)
        and has_plain_weights(module)
        and _is_known_norm(module)
    )


def _is_known_norm(module: nn.Module) -> bool:
    known = _norms.get(type(module))
    if known is None:
        if torch.compiler.is_compiling():
            return False
        known = _norms[type(module)] = _computes_rms_norm(module)
    return known


def _computes_rms_norm(module: nn.Module) -> bool:
    """Whether `weight * normed` is what a module computes. It syncs."""
    weight: Any = module.weight
    with torch.no_grad():
        x = torch.linspace(-2, 3, len(weight), device=weight.device).to(weight.dtype)[None]
        exact = x.float()
        mean = exact.square().mean(-1, keepdim=True) + float(module.variance_epsilon)
        want = weight.float() * (exact * mean.rsqrt())
        got = module(x).float()
    step = torch.finfo(weight.dtype).eps
    return bool(((got - want).abs() <= 8 * step * (want.abs() + step)).all())


def is_silu(module: nn.Module) -> bool:
    """Whether a module is a plain SiLU of torch or of transformers."""
    name = type(module).__name__
    return name in ("SiLU", "SiLUActivation") and is_untouched(module)
