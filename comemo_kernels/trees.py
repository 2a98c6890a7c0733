"""Registration of `ImageMemory` as a pytree, for `torch.export` and `torch.utils._pytree`."""

from dataclasses import replace
from typing import Any

from torch.utils import _pytree as pytree

from comemo_kernels.memory import ImageMemory

# Tensors and containers of tensors; the other attributes are constants.
CHILDREN = (
    "spans",
    "active",
    "media",
    "ids",
    "starts",
    "biases",
    "keys",
    "values",
    "scales",
    "table",
)
Constants = tuple[tuple[int, ...], bool]


def _flatten(memory: ImageMemory) -> tuple[list[Any], Constants]:
    return [getattr(memory, name) for name in CHILDREN], (memory.sizes, memory.absolute)


def _unflatten(children: Any, constants: Constants) -> ImageMemory:
    sizes, absolute = constants
    memory = ImageMemory(sizes=tuple(sizes), absolute=bool(absolute))
    return replace(memory, **dict(zip(CHILDREN, children, strict=True)))


def _flatten_with_keys(memory: ImageMemory) -> tuple[list[tuple[Any, Any]], Constants]:
    children, constants = _flatten(memory)
    keys = [pytree.GetAttrKey(name) for name in CHILDREN]
    return list(zip(keys, children, strict=True)), constants


pytree.register_pytree_node(
    ImageMemory,
    _flatten,
    _unflatten,
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name=f"{ImageMemory.__module__}.{ImageMemory.__name__}",
    to_dumpable_context=lambda constants: [list(constants[0]), constants[1]],
    from_dumpable_context=lambda dumped: (tuple(dumped[0]), bool(dumped[1])),
)
