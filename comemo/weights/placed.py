"""Layers on several devices of one process, as `device_map` places them.

accelerate gives every module a hook that moves its inputs. Inside a decoder layer all weights are
on one device, and the hook of the layer is enough: without the others a layer is computed by fused
operations, as on one device.
"""

from typing import Any

import torch
from torch import nn


def is_placed(module: nn.Module, kind: type[nn.Module] | None = None) -> bool:
    """Whether a module has accelerate's hook for a device, and its weights stay there.

    Args:
        module: its submodules are not checked.
        kind: the class that it must have; None for any.
    """
    hook = vars(module).get("_hf_hook")
    if hook is None or (kind is not None and type(module) is not kind):
        return False
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload


def place_of(module: nn.Module) -> torch.device | None:
    """The device that all weights of a module are on; None if there are several, or none."""
    places = {weight.device for weight in module.parameters()}
    return places.pop() if len(places) == 1 else None


def free_layers(model: Any) -> None:
    """Remove hooks within decoder layers whose weights are on the device of the layer's hook.

    Args:
        model: has `decoder_layers`; layers without a hook, or offloaded ones, are left alone.
    """
    for layer in model.decoder_layers():
        place = place_of(layer)
        if place is None or place.type == "meta" or not is_placed(layer):
            continue
        inner = [module for module in layer.modules() if module is not layer]
        hooked = [module for module in inner if "_hf_hook" in vars(module)]
        if hooked and all(map(is_placed, hooked)):
            from accelerate.hooks import remove_hook_from_module

            for module in hooked:
                remove_hook_from_module(module)
                own = vars(module).get("forward")  # left behind, bound to the module
                if getattr(own, "__func__", None) is type(module).forward:
                    del module.forward
