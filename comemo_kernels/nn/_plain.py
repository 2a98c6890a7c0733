"""Which modules may be computed from their weights instead of being called.

The operations read a module's weights and skip its `forward`. That is only correct for modules as
they were made: hooks, adapters, quantisation, sharding and offloading need the call.
"""

from torch import nn

from comemo_kernels.nn.feed_forward import FeedForward

KINDS = frozenset(
    (nn.Linear, nn.RMSNorm, nn.LayerNorm, nn.GELU, FeedForward)  # subclasses may compute otherwise
)
_any_global_hook = nn.modules.module._has_any_global_hook


def is_untouched(module: nn.Module) -> bool:
    """Whether calling a module runs the forward of its class and nothing else."""
    held = vars(module)
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        or "_hf_hook" in held
    )


def is_plain(*modules: nn.Module, biased: bool = False) -> bool:
    """Whether modules may be computed from their weights, without calling them.

    Args:
        modules: their submodules are checked too.
        biased: whether linear layers may have a bias.

    Returns:
        True if all are of a class in `KINDS`, untouched, with ordinary parameters that are not on
        the meta device.
    """
    if _any_global_hook():
        return False
    for module in modules:
        if type(module) not in KINDS or not is_untouched(module):
            return False
        if type(module) is nn.RMSNorm and module.eps is None:  # depends on the dtype
            return False
        held = vars(module)
        for name, parameter in held["_parameters"].items():
            if parameter is not None and (
                type(parameter) is not nn.Parameter
                or parameter.is_meta
                or (name == "bias" and not biased)
            ):
                return False
        parts = held["_modules"]
        if parts and not is_plain(*parts.values(), biased=biased):
            return False
    return True
