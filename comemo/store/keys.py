"""What a picture's memory is known by: the weights that made it, its pixels, its positions."""

import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.internvl import modeling_internvl as internvl

from comemo.fusable import FUSABLE, is_original
from comemo.mixin import MixinLayer

VERSION = 1  # of what keys are made of and of the files; raised when either changes
CHUNK = 2**26  # bytes hashed at a time
BLOCK = 2**20  # integers summed at a time: they and what they are multiplied with fit a cache
SMALL = 2**16  # elements; smaller weights are laid behind one another first
PLAIN_VISION = (
    *(internvl.InternVLVisionEmbeddings, internvl.InternVLVisionPatchEmbeddings),
    *(internvl.InternVLVisionLayer, internvl.InternVLVisionAttention, internvl.InternVLVisionMLP),
    *(internvl.InternVLVisionRMSNorm, nn.LayerNorm, nn.Conv2d, nn.Dropout, nn.Identity),
    *(nn.Sequential, nn.ModuleList),
)
# A hook of these modules looks on and changes no value; the last asks for gradients.
ONLOOKERS = (
    "comemo.cli.progress",
    "transformers.utils.output_capturing",
    "transformers.modeling_utils",
)


def memory_parts(model: Any) -> dict[str, nn.Module]:
    """The modules that an image memory is computed by, under their names in a `CoMemoModel`."""
    vision, text = model.vision_tower, model.language_model
    depth = model.config.select_layer % (len(vision.encoder.layer) + 1)
    parts = {"vision_tower.embeddings": vision.embeddings}
    for i, layer in enumerate(vision.encoder.layer[:depth]):
        parts[f"vision_tower.encoder.layer.{i}"] = layer
    parts["multi_modal_projector"] = model.multi_modal_projector
    for i in model.config.mixin_layers:
        mixin = text.layers[i].mixin
        for name in ("attn_norm", "kv_proj"):
            parts[f"language_model.layers.{i}.mixin.{name}"] = getattr(mixin, name)
    return parts


def check_storable(model: Any) -> None:
    """Refuse a model whose memories its weights do not determine.

    Args:
        model: a `CoMemoModel`.

    Raises:
        ValueError: with the reason.
    """
    if model.config.memory_positions == "absolute":
        raise ValueError(
            "MemoryStore: memory_positions must be 'relative', got 'absolute': keys are then"
            " rotated by the place of a picture in its prompt and serve no other"
        )
    reason = _find_reason(model)
    if reason is not None:
        raise ValueError(
            "MemoryStore: the parts of the model that make an image memory must be as they were"
            f" made, with whole weights on one device: {reason}"
        )


def _find_reason(model: Any) -> str | None:
    """Why the parts' weights do not say all about a memory; None if they do."""
    vision = model.vision_tower
    whole = {"vision_tower": (vision, internvl.InternVLVisionModel)}
    whole["vision_tower.encoder"] = (vision.encoder, internvl.InternVLVisionEncoder)
    for i in model.config.mixin_layers:
        name = f"language_model.layers.{i}.mixin"
        whole[name] = (model.language_model.layers[i].mixin, MixinLayer)
    for name, (module, own) in whole.items():
        if not is_original(module, own):
            return f"{name} is a {type(module).__name__} (an adapter, or quantised), or has hooks"
    weights = set()
    for part, root in memory_parts(model).items():
        for inner, module in root.named_modules():
            name, kind = f"{part}.{inner}".rstrip("."), type(module)
            if kind not in (*FUSABLE, *PLAIN_VISION) and not _is_activation(module):
                return f"{name} is a {kind.__name__} (an adapter, or quantised)"
            if hasattr(module, "_hf_hook") or "forward" in vars(module):
                return f"another forward was put into {name} (as offloading does)"
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if any(getattr(hook, "__module__", None) not in ONLOOKERS for hook in hooks):
                return f"{name} has hooks"
            if module.training and _drops(module):
                return f"{name} drops out in training: call model.eval()"
            for weight in module._parameters.values():
                if weight is None:
                    continue
                if type(weight) is not nn.Parameter:
                    return f"a weight of {name} is a {type(weight).__name__} (sharded or quantised)"
                weights.add((str(weight.device), weight.dtype))
    devices, dtypes = ({kind[i] for kind in weights} for i in (0, 1))
    if "meta" in devices:
        return "weights are on the device meta (offloaded, or not loaded)"
    if len(devices) > 1 or len(dtypes) > 1:
        return f"weights are on {sorted(devices)} in {sorted(map(str, dtypes))}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    return None


def _is_activation(module: nn.Module) -> bool:
    """A function of its input alone, whatever transformers calls it."""
    home = type(module).__module__
    named = home in ("transformers.activations", "torch.nn.modules.activation")
    return named and not (module._parameters or module._modules or module._buffers)


def _drops(module: nn.Module) -> bool:
    rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
    return rate > 0


def describe_config(model: Any) -> str:
    """JSON of what a memory depends on beside the weights."""
    config, vision, mixin = model.config, model.config.vision_config, model.config.mixin_config
    facts = {name: getattr(config, name) for name in ("select_layer", "ps_version")}
    facts |= {name: getattr(config, name) for name in ("downsample_ratio", "mixin_layers")}
    seen = ("num_attention_heads", "hidden_act", "norm_type", "use_qk_norm", "layer_norm_eps")
    facts["vision"] = {name: getattr(vision, name) for name in (*seen, "image_size", "patch_size")}
    read = ("num_heads", "head_dim", "rope_theta", "max_position_embeddings")
    facts["mixin"] = {name: getattr(mixin, name) for name in read}
    layers = model.language_model.layers
    eps = {layers[i].mixin.attn_norm.variance_epsilon for i in config.mixin_layers}
    own = eps.pop() if len(eps) == 1 else sorted(eps)
    facts["eps"] = {"mixin": own, "projector": model.multi_modal_projector[0].eps}
    return json.dumps({"version": VERSION, **facts}, sort_keys=True)


def weights_of(model: Any) -> list[tuple[str, Tensor]]:
    """Every weight that a memory depends on, with its name."""
    return [
        (f"{part}.{name}", weight)
        for part, module in memory_parts(model).items()
        for name, weight in module.named_parameters()
    ]


def stamp_weights(model: Any) -> tuple[Any, ...]:
    """A sign that changes when the model does: what `identify_model` need not be asked twice.

    Every bit of every weight counts, whoever changed it: versions of tensors do not tell what is
    written into `weight.data` or through NumPy. It is computed where the weights are, and only
    sums leave a GPU.

    Args:
        model: a `CoMemoModel` that `check_storable` accepts.

    Returns:
        To be compared within this process. A change goes unnoticed with a probability of at
        most 2^-32, that of a single number never.
    """
    weights = [weight for _, weight in weights_of(model)]
    shapes = tuple((tuple(weight.shape), weight.dtype) for weight in weights)
    return describe_config(model), shapes, *sum_bits(weights)


@torch.no_grad()
def sum_bits(tensors: Sequence[Tensor]) -> list[int]:
    """Integers that change when any bit of the tensors does, or their order.

        s = sum_i c_i x_i mod 2^64

    of blocks of integers x of at most 32 bits, with odd c drawn from 64 bits. Of a difference of
    x_i at most 31 bits are trailing zeros: its product takes 2^32 values or more, and never 0.

    Args:
        tensors: of one dtype and device, any shapes and strides.

    Returns:
        A sum for each block of `BLOCK` integers.
    """
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    small = [t for t in flat if t.numel() < SMALL]
    large = [t for t in flat if t.numel() >= SMALL]
    numbers = [_integers_of(t) for t in ([torch.cat(small)] if small else []) + large]
    if not numbers:
        return []
    factors = _factors(numbers[0].device)
    room = torch.empty_like(factors[: max(map(len, numbers))])
    sums = []
    for block in itertools.chain.from_iterable(x.split(BLOCK) for x in numbers):
        products = room[: len(block)]
        products.copy_(block).mul_(factors[: len(block)])
        sums.append(products.sum())
    return torch.stack(sums).tolist()


def _integers_of(flat: Tensor) -> Tensor:
    """The bits of a tensor [n] as integers, as wide as divides it, up to 32 bits."""
    start = flat.storage_offset() * flat.element_size()
    for kind in (torch.int32, torch.int16):
        if flat.nbytes % kind.itemsize == start % kind.itemsize == 0:
            return flat.view(kind)
    return flat.view(torch.int8)


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd int64 [BLOCK], others in every process: no weights are made to go unnoticed."""
    return torch.frombuffer(bytearray(os.urandom(8 * BLOCK)), dtype=torch.int64).to(device) | 1


@torch.no_grad()
def identify_model(model: Any) -> str:
    """Hex digest of the weights, their names and the settings that a memory depends on."""
    digest = hashlib.sha256(describe_config(model).encode())
    for name, weight in weights_of(model):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        for chunk in chunks_of(weight):
            digest.update(chunk)
    return digest.hexdigest()


def identify_picture(identity: str, tiles: Tensor, places: Tensor) -> str:
    """Hex digest of a picture as a model sees it.

    Args:
        identity: of the model.
        tiles: [t, 3, side, side] in the model's dtype.
        places: integers [m], ids of its tokens less that of the first: grid, order of tiles and
            kind of RoPE all show in them.
    """
    shape = f"{identity} {tiles.dtype} {tuple(tiles.shape)} {tuple(places.shape)}\n"
    digest = hashlib.sha256(shape.encode())
    for tensor in (tiles, places.int()):
        for chunk in chunks_of(tensor):
            digest.update(chunk)
    return digest.hexdigest()


def describe_tensors(model: Any, tokens: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of what the memory of a picture of so many image tokens holds, by name."""
    config, mixin = model.config, model.config.mixin_config
    described = {
        "media": (model.dtype, (tokens, mixin.vision_dim)),
        "ids": (torch.int32, (tokens,)),
    }
    for kind in ("keys", "values"):
        for layer in config.mixin_layers:
            shape = (tokens, mixin.num_heads, mixin.head_dim)
            described[f"{kind}.{layer}"] = model.dtype, shape
    return described


def chunks_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor of any dtype and device, row by row, a part of them at a time."""
    flat = tensor.detach().reshape(-1)
    step = max(1, CHUNK // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield memoryview(flat[start : start + step].cpu().view(torch.uint8).numpy())
