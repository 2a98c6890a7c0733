"""What an image memory depends on in a model: modules, weights, settings, and its tensors.

A `MemoryStore` makes its keys of this. A memory may only be stored if the weights of these modules
say all about it.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.models.internvl import modeling_internvl as internvl

from comemo.config import CoMemoConfig
from comemo.language_model import CoMemoTextModel
from comemo.mixin import MixinLayer
from comemo.weights.fusable import FUSABLE, is_original
from comemo.weights.placed import is_placed
from comemo.weights.quantised import QuantisedLinear, describe, is_quantised, parts_of
from comemo_kernels import ImageMemory

# Modules of the vision tower that compute nothing but what their weights and settings say.
PLAIN_VISION = (
    internvl.InternVLVisionEmbeddings,
    internvl.InternVLVisionPatchEmbeddings,
    internvl.InternVLVisionLayer,
    internvl.InternVLVisionAttention,
    internvl.InternVLVisionMLP,
    internvl.InternVLVisionRMSNorm,
    nn.LayerNorm,
    nn.Conv2d,
    nn.Dropout,
    nn.Identity,
    nn.Sequential,
    nn.ModuleList,
)
# Hooks from these modules only observe, or ask for gradients: they change no value.
OBSERVERS = (
    "comemo.cli.progress",
    "transformers.utils.output_capturing",
    "transformers.modeling_utils",
)
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of tensors by name


class StorableModel(Protocol):
    """What a store needs of a model; a `CoMemoModel` has it."""

    config: CoMemoConfig
    vision_tower: internvl.InternVLVisionModel
    multi_modal_projector: nn.Sequential
    language_model: CoMemoTextModel

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def agree(self, known: list[bool]) -> list[bool]: ...

    def build_image_memories(
        self, pixels: list[Tensor], ids: list[Tensor]
    ) -> list[ImageMemory]: ...


def memory_modules(model: StorableModel) -> dict[str, nn.Module]:
    """The modules that compute an image memory, by their names in a `CoMemoModel`."""
    vision, text = model.vision_tower, model.language_model
    depth = model.config.select_layer % (len(vision.encoder.layer) + 1)
    modules: dict[str, nn.Module] = {"vision_tower.embeddings": vision.embeddings}
    for i, layer in enumerate(vision.encoder.layer[:depth]):
        modules[f"vision_tower.encoder.layer.{i}"] = layer
    modules["multi_modal_projector"] = model.multi_modal_projector
    for i, mixin in text.mixin_layers.items():
        for name in ("attn_norm", "kv_proj"):
            modules[f"language_model.layers.{i}.mixin.{name}"] = getattr(mixin, name)
    return modules


def memory_weights(model: StorableModel) -> list[tuple[str, Tensor]]:
    """All weights that an image memory depends on, with their names.

    Of a quantised weight these are the tensors that it consists of.
    """
    return [
        part
        for name, weight in _named_weights(model)
        for part in (parts_of(name, weight) if is_quantised(weight) else [(name, weight)])
    ]


def _named_weights(model: StorableModel) -> Iterator[tuple[str, nn.Parameter]]:
    for part, module in memory_modules(model).items():
        for name, weight in module.named_parameters():
            yield f"{part}.{name}", weight


def memory_settings(model: StorableModel) -> dict[str, Any]:
    """All settings that an image memory depends on, as values that JSON can write."""
    config, vision, mixin = model.config, model.config.vision_config, model.config.mixin_config
    of_config = ("select_layer", "ps_version", "downsample_ratio", "mixin_layers")
    of_vision = (
        "num_attention_heads",
        "hidden_act",
        "norm_type",
        "use_qk_norm",
        "layer_norm_eps",
        "image_size",
        "patch_size",
    )
    of_mixin = ("num_heads", "head_dim", "rope_theta", "max_position_embeddings")
    layers = model.language_model.mixin_layers
    eps = {mixin.attn_norm.variance_epsilon for mixin in layers.values()}
    settings: dict[str, Any] = {name: getattr(config, name) for name in of_config}
    settings["vision"] = {name: getattr(vision, name) for name in of_vision}
    settings["mixin"] = {name: getattr(mixin, name) for name in of_mixin}
    settings["eps"] = {
        "mixin": eps.pop() if len(eps) == 1 else sorted(eps),
        "projector": model.multi_modal_projector[0].eps,
    }
    quantised = {name: describe(w) for name, w in _named_weights(model) if is_quantised(w)}
    if quantised:  # no key otherwise: keys of other models stay what they were
        settings["quantised"] = quantised
    return settings


def memory_layout(model: StorableModel, tokens: int) -> Layout:
    """Dtype and shape of each tensor in the memory of one image, by name.

    Args:
        model: a `CoMemoModel`.
        tokens: image tokens of the image.
    """
    mixin = model.config.mixin_config
    layout: Layout = {
        "media": (model.dtype, (tokens, mixin.vision_dim)),
        "ids": (torch.int32, (tokens,)),
    }
    for kind in ("keys", "values"):
        for i, layer in model.language_model.mixin_layers.items():
            layout[f"{kind}.{i}"] = model.dtype, (tokens, layer.num_heads, mixin.head_dim)
    return layout


def memory_places(model: StorableModel) -> dict[int, torch.device]:
    """The device of the keys and values of each mixin layer, by its index."""
    layers = model.language_model.mixin_layers
    return {i: mixin.kv_proj.weight.device for i, mixin in layers.items()}


def check_storable(function: str, model: StorableModel) -> None:
    """Refuse a model whose image memories are not determined by its weights and settings.

    Args:
        function: the name that the error begins with.
        model: a `CoMemoModel`.

    Raises:
        ValueError: with the reason.
    """
    if model.config.memory_positions == "absolute":
        raise ValueError(
            f"{function}: memory_positions must be 'relative', got 'absolute': keys are then"
            " rotated by the position of an image in its prompt and fit no other prompt"
        )
    reason = _find_reason(model)
    if reason is not None:
        raise ValueError(
            f"{function}: the modules that compute an image memory must be unchanged since the"
            f" model was made, with weights in memory: {reason}"
        )


def _find_reason(model: StorableModel) -> str | None:
    """Why the modules' weights do not determine a memory; None if they do."""
    vision = model.vision_tower
    parents: dict[str, tuple[nn.Module, type[nn.Module]]] = {
        "vision_tower": (vision, internvl.InternVLVisionModel),
        "vision_tower.encoder": (vision.encoder, internvl.InternVLVisionEncoder),
    }
    for i, mixin in model.language_model.mixin_layers.items():
        parents[f"language_model.layers.{i}.mixin"] = mixin, MixinLayer
    for name, (module, own) in parents.items():
        if not (is_original(module, own) or is_placed(module, own)):
            return f"{name} is a {type(module).__name__} (an adapter, or quantised), or has hooks"
    weights = set()
    for part, root in memory_modules(model).items():
        for inner, module in root.named_modules():
            name = f"{part}.{inner}".rstrip(".")
            if fault := _find_fault(module):
                return f"{name} {fault}"
            for weight in module.parameters(recurse=False):
                if type(weight) is not nn.Parameter and not is_quantised(weight):
                    return f"a weight of {name} is a {type(weight).__name__} (sharded or quantised)"
                weights.add((str(weight.device), weight.dtype))
    devices, dtypes = {device for device, _ in weights}, {dtype for _, dtype in weights}
    if "meta" in devices:
        return "weights are on the device meta (offloaded, or not loaded)"
    if len(dtypes) > 1:
        return f"weights are in {sorted(map(str, dtypes))}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    return None


def _find_fault(module: nn.Module) -> str | None:
    """Why a module may compute something that its weights do not say; None if it does not."""
    kind = type(module)
    known = kind in FUSABLE or kind in PLAIN_VISION or kind is QuantisedLinear
    if not known and not _is_activation(module):
        return f"is a {kind.__name__} (an adapter, or quantised)"
    if ("_hf_hook" in vars(module) or "forward" in vars(module)) and not is_placed(module):
        return "has a replaced forward (as by offloading)"
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    if any(getattr(hook, "__module__", None) not in OBSERVERS for hook in hooks):
        return "has hooks"
    if module.training and _drops(module):
        return "has dropout in training: call model.eval()"
    return None


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is a function of its input alone, whatever transformers names it."""
    home = type(module).__module__
    named = home in ("transformers.activations", "torch.nn.modules.activation")
    return named and not [*module.parameters(), *module.buffers(), *module.children()]


def _drops(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
    return float(rate) > 0
