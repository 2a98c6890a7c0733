"""Which modules may be computed from their weights instead of being called.

Fused operations read a module's weights and skip its `forward`. That is only right for modules as
the model was made: hooks, adapters, quantisation, sharding and offloading need the call. These
questions are asked in every layer of every decode step: no generators.
"""

from collections.abc import Container

from torch import nn

KINDS = frozenset((nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.SiLU, nn.Sequential))
_hooks = nn.modules.module


def has_global_hook() -> bool:
    """Whether there are hooks of all modules, in a form that torch 2.6 has, too."""
    return bool(
        _hooks._global_forward_hooks
        or _hooks._global_forward_pre_hooks
        or _hooks._global_backward_hooks
        or _hooks._global_backward_pre_hooks
    )


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class, or a patch of ours, and nothing else.

    Args:
        module: its submodules are not checked.

    Returns:
        False if there are hooks of any kind, or if its forward was replaced by somebody else.
    """
    attributes = vars(module)
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "_hf_hook" in attributes
        or ("forward" in attributes and not hasattr(attributes["forward"], "is_a_patch"))
        or has_global_hook()
    )


def has_plain_weights(module: nn.Module, biased: bool = False) -> bool:
    """Whether a module's own parameters are ordinary and on a device; no bias unless `biased`."""
    for name, parameter in vars(module)["_parameters"].items():
        if parameter is not None and (
            (type(parameter) is not nn.Parameter and not hasattr(parameter, "is_a_part"))
            or parameter.is_meta
            or (name == "bias" and not biased)
        ):
            return False
    return True


def is_plain(
    *modules: nn.Module, kinds: Container[type[nn.Module]] = KINDS, biased: bool = False
) -> bool:
    """Whether modules may be computed from their weights, without calling them.

    Args:
        modules: linear layers, norms and networks of them; submodules are checked, too.
        kinds: classes that compute what the caller takes them for. Subclasses do not count.
        biased: whether linear layers may have a bias; a LayerNorm may.

    Returns:
        True if all of them are of these classes, untouched, with ordinary parameters that are not
        on the meta device.
    """
    for module in modules:
        kind = type(module)
        if kind not in kinds or not is_untouched(module):
            return False
        if kind is nn.RMSNorm and module.eps is None:  # depends on the dtype
            return False
        if not has_plain_weights(module, biased or kind is nn.LayerNorm):
            return False
        children = vars(module)["_modules"]
        if children and not is_plain(*children.values(), kinds=kinds, biased=biased):
            return False
    return True
