"""Which modules of somebody else's model may be computed from their weights, not called.

Fused operations read a module's weights and skip its `forward`. That is only right for modules as
the model was made: hooks, adapters, quantisation and offloading need the call. These questions are
asked in every layer of every decode step: no generators.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from comemo_kernels.patching.replacement import Replacement

_TORCH = frozenset((nn.Linear, nn.LayerNorm, nn.GELU, nn.SiLU, nn.Sequential))
_norms: WeakKeyDictionary[type, bool] = WeakKeyDictionary()  # classes that were tried
_any_global_hook = nn.modules.module._has_any_global_hook


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class, or ours, and nothing else.

    Args:
        module: its submodules are not checked.

    Returns:
        False if it has hooks of any kind, or if its forward was replaced, but by a patch.
    """
    attributes = vars(module)
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "_hf_hook" in attributes
        or ("forward" in attributes and type(attributes["forward"]) is not Replacement)
        or _any_global_hook()
    )


def has_plain_weights(module: nn.Module, biased: bool = False) -> bool:
    """Whether a module's own parameters are ordinary and on a device; no bias unless `biased`."""
    for name, parameter in vars(module)["_parameters"].items():
        if parameter is not None and (
            type(parameter) is not nn.Parameter
            or parameter.is_meta
            or (name == "bias" and not biased)
        ):
            return False
    return True


def is_plain(*modules: nn.Module, biased: bool = False) -> bool:
    """Whether modules of torch may be computed from their weights; submodules are checked, too.

    Args:
        modules: linear layers, LayerNorms, activations and sequences of them.
        biased: whether linear layers may have a bias.

    Returns:
        True if all of them are exactly of such a class, untouched, with ordinary parameters.
    """
    for module in modules:
        if type(module) not in _TORCH or not is_untouched(module):
            return False
        norm = type(module) is nn.LayerNorm
        if not has_plain_weights(module, biased or norm):
            return False
        children = vars(module)["_modules"]
        if children and not is_plain(*children.values(), biased=biased):
            return False
    return True


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
