"""Whether modules may be computed from their weights, and whether their weights are folded."""

from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

PLAIN = frozenset(
    (
        *(nn.Linear, LlamaRMSNorm, LlamaMLP, SiLUActivation, nn.SiLU),
        *(nn.Sequential, nn.LayerNorm, nn.GELU),  # of the projector
    )
)
_has_hooks_everywhere = nn.modules.module._has_any_global_hook


def is_untouched(module: nn.Module) -> bool:
    """Whether nothing but its own forward runs where a module is called.

    Args:
        module: looked at alone, without what it holds.

    Returns:
        False where hooks of any kind or another forward were put on it.
    """
    held = vars(module)
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
        or "_hf_hook" in held
    )


def is_own(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of its own class and untouched.

    Then what it holds may be called without calling it. Adapters put another class in its place,
    hooks of offloading bring the weights of all that it holds.

    Args:
        module: looked at alone, without what it holds.
        kind: the class that the model was made with.
    """
    return type(module) is kind and is_untouched(module) and not _has_hooks_everywhere()


def is_fusable(*modules: nn.Module, biased: bool = False) -> bool:
    """Whether modules are what they were made as, and may be computed from their weights.

    Adapters and quantisation replace modules, sharding and offloading replace weights or bring
    them by hooks: then the modules themselves have to be called. This runs in every layer of every
    decode step: no generators.

    Args:
        modules: linear layers, norms and feed-forward networks, looked at with what they hold.
        biased: whether linear layers may have a bias.

    Returns:
        True if all of them are.
    """
    if _has_hooks_everywhere():
        return False
    for part in modules:
        if type(part) not in PLAIN or not is_untouched(part):
            return False
        held = vars(part)
        for name, parameter in held["_parameters"].items():
            if parameter is not None and (
                type(parameter) is not nn.Parameter
                or parameter.is_meta
                or (name == "bias" and not biased)
            ):
                return False
        inner = held["_modules"]
        if inner and not is_fusable(*inner.values(), biased=biased):
            return False
    return True


def offloaded_to(model: nn.Module) -> torch.device | None:
    """The device that accelerate's hooks bring offloaded weights to; None if there are no hooks."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def in_step(model: Any) -> bool:
    """Whether other processes may be waiting for this one to call each module that they call.

    True in training where `torch.distributed` is initialised, and wherever weights are sharded.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    if model.training and torch.is_grad_enabled():
        return True
    weight = next(model.multi_modal_projector.parameters())
    return hasattr(weight, "full_tensor")  # a DTensor


def refuse_folded(verb: str, model: Any) -> None:
    """Raise for what a folded model cannot do.

    Args:
        verb: the function to name.
        model: a module, looked at with all that it holds.

    Raises:
        ValueError: norms and gates of a layer are folded into its projections.
    """
    if any(getattr(module, "folded", False) for module in model.modules()):
        raise ValueError(
            f"{verb}: wanted a model with its own weights, got one whose norms and gates are"
            " folded into its projections: undo() what fold_for_inference returned first"
        )


def join_weights(*linears: nn.Linear) -> torch.Tensor:
    """Lay the weights of linear layers behind one another; their parameters become views.

    Args:
        linears: layers of [O, d] each, of one d, dtype and device.

    Returns:
        [sum of all O, d], with the storage of all of them.
    """
    weights = [linear.weight for linear in linears]
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return joined


def are_joined(joined: torch.Tensor, *linears: nn.Linear) -> bool:
    """Whether the weights of linear layers are still views of what `join_weights` returned.

    Moving, converting or replacing one of them tears it out.
    """
    address, step = joined.data_ptr(), joined.element_size() * joined.shape[1]
    for linear in linears:
        if linear.weight.data_ptr() != address:
            return False
        address += step * linear.out_features
    return True
