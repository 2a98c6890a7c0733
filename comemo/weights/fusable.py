"""Which modules may be computed from their weights instead of being called.

Fused operations read a module's weights and skip its `forward`. That is only correct for modules as
the model was made: hooks, adapters, quantisation and offloading need the call.
"""

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import comemo_kernels as ops
from comemo.parallel.split import SplitHead
from comemo_kernels import is_plain, is_untouched

_OF_DECODER = (nn.Linear, LlamaRMSNorm, LlamaMLP, SiLUActivation, nn.SiLU)
_OF_PROJECTOR = (nn.Sequential, nn.LayerNorm, nn.Linear, nn.GELU)
FUSABLE = frozenset((*_OF_DECODER, *_OF_PROJECTOR, SplitHead))


def is_original(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module has the class that the model was made with, and is untouched.

    Then its submodules may be called without it. Adapters replace its class; hooks of offloading
    load the weights of all its submodules.

    Args:
        module: its submodules are not checked.
        kind: the class that the model was made with.
    """
    return type(module) is kind and is_untouched(module)


def is_fusable(*modules: nn.Module, biased: bool = False) -> bool:
    """Whether modules may be computed from their weights, without calling them.

    Adapters and quantisation replace modules; sharding and offloading replace weights or load them
    by hooks. Such modules have to be called. This runs in every layer of every decode step:
    no generators.

    Args:
        modules: linear layers, norms and feed-forward networks; submodules are checked, too.
        biased: whether linear layers may have a bias.

    Returns:
        True if all of them are of classes in `FUSABLE`, untouched, with ordinary parameters that
        are not on the meta device.
    """
    return is_plain(*modules, kinds=FUSABLE, biased=biased)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer on x [..., d]: from its weights if it is plain, otherwise by calling it."""
    if type(module) is nn.Linear and is_fusable(module, biased=True):
        return ops.linear(x, module.weight, module.bias)
    return module(x)


def offloaded_to(model: nn.Module) -> torch.device | None:
    """The device on which accelerate's hooks execute offloaded modules; None without such hooks."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def in_step(training: bool, module: nn.Module) -> bool:
    """Whether all ranks have to call the same modules in the same order.

    True in training where `torch.distributed` is initialised, and wherever weights are sharded:
    other ranks would wait in a collective for a module that this one does not call.

    Args:
        training: of the model.
        module: one that all ranks use, see `is_sharded`.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return (training and torch.is_grad_enabled()) or is_sharded(module)


def is_sharded(module: nn.Module) -> bool:
    """Whether a module has weights that its submodules collect from all ranks when called."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return any(hasattr(weight, "full_tensor") for weight in module.parameters())  # a DTensor


def refuse_folded(verb: str, model: nn.Module) -> None:
    """Raise if norms and gates are folded into projections.

    Args:
        verb: the function that the error names.
        model: all its submodules are checked.

    Raises:
        ValueError: a layer is folded, see `fold_for_inference`.
    """
    if any(getattr(module, "folded", False) for module in model.modules()):
        raise ValueError(
            f"{verb}: wanted a model with its own weights, got one whose norms and gates are"
            " folded into its projections: call undo() on the result of fold_for_inference first"
        )


def join_weights(*linears: nn.Linear) -> Tensor:
    """Concatenate the weights of linear layers; their parameters become views of the result.

    Args:
        linears: layers with weights [O, d] of one d, dtype and device; O may differ.

    Returns:
        [sum of all O, d], the storage of all these weights.
    """
    weights = [linear.weight for linear in linears]
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return joined


def are_joined(joined: Tensor, *linears: nn.Linear) -> bool:
    """Whether the weights of linear layers still are views of the result of `join_weights`.

    Moving, converting or replacing a weight gives it a storage of its own.
    """
    address, step = joined.data_ptr(), joined.element_size() * joined.shape[1]
    for linear in linears:
        if linear.weight.data_ptr() != address:
            return False
        address += step * linear.out_features
    return True
