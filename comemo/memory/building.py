"""Keys and values of the image memory, built for all mixin layers at once.

Letters: M tokens of the image memory, d width of the language model, D head dimension.
"""

from typing import Any

import torch
from torch import Tensor, nn

import comemo_kernels as ops
from comemo.config import CoMemoConfig
from comemo.mixin import MixinLayer
from comemo.weights.fusable import is_fusable, is_original
from comemo.weights.quantised import QuantisedLinear
from comemo_kernels import ImageMemory


class BuildsMemory:
    """For a decoder with `layers` and the config of the whole model."""

    comemo_config: CoMemoConfig
    layers: nn.ModuleList

    @property
    def mixin_layers(self) -> dict[int, Any]:
        """The mixin layers that are here, by the index of the decoder layer after each."""
        found = {i: self.layers[i].mixin for i in self.comemo_config.mixin_layers}
        return {i: mixin for i, mixin in found.items() if mixin is not None}

    def _prepare_memory(
        self, memory: ImageMemory, x: Tensor, places: Tensor, use_cache: bool
    ) -> dict[str, Any]:
        """Arguments of the mixin layers beside the memory; its keys and values, if possible now."""
        self._give_table(memory, x)
        tables: dict[str, Any] = {"rotation": memory.rotation(places)}
        if len(memory.keys) == len(self.mixin_layers) or memory.media is None:
            return tables
        if not (use_cache and self.build_memory(memory)):
            assert memory.table is not None
            tables["key_angles"] = *memory.table, memory.ids
        return tables

    def _give_table(self, memory: ImageMemory, x: Tensor) -> None:
        if memory.table is None:
            # Generated text may continue beyond the trained range.
            mixin = self.comemo_config.mixin_config
            length = 2 * mixin.max_position_embeddings
            cos, sin = ops.distance_table(mixin.head_dim, mixin.rope_theta, length, x.device)
            if memory.absolute:  # published: rounded to the activations' dtype
                cos, sin = cos.to(x.dtype), sin.to(x.dtype)
            memory.table = cos, sin

    def build_memory(self, memory: ImageMemory) -> bool:
        """Build keys and values of all mixin layers at once, before the first forward.

        Args:
            memory: has media [M, d] and no keys; it is filled. It gets its table of angles in any
                case.

        Returns:
            False if it was not possible: the layers must be fusable or quantised, with weights of
            one dtype, and no gradients may be required. Each layer then builds its own keys and
            values when it is first called.
        """
        if memory.media is None or memory.ids is None:
            return False
        self._give_table(memory, memory.media)  # readers copy it
        if memory.keys:
            return False
        layers = self.mixin_layers
        if not all(is_original(mixin, MixinLayer) for mixin in layers.values()):
            return False
        if any(is_original(mixin.kv_proj, QuantisedLinear) for mixin in layers.values()):
            return self._build_by_modules(layers, memory)
        if not all(is_fusable(mixin.attn_norm, mixin.kv_proj) for mixin in layers.values()):
            return False
        if len({mixin.attn_norm.variance_epsilon for mixin in layers.values()}) > 1:
            return False
        parameters = [
            weight
            for mixin in layers.values()
            for weight in (
                mixin.kv_proj.weight,
                *([] if mixin.folded else [mixin.attn_norm.weight]),
            )
        ]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (memory.media, *parameters)):
            return False
        if {t.dtype for t in parameters} - {memory.media.dtype}:
            return False
        places: dict[torch.device, dict[int, Any]] = {}
        for i, mixin in layers.items():
            places.setdefault(mixin.kv_proj.weight.device, {})[i] = mixin
        for place, own in places.items():
            self._build_on(place, own, memory)
        return True

    def _build_by_modules(self, layers: dict[int, Any], memory: ImageMemory) -> bool:
        """Let each layer build its keys and values now; False if one has to be called for it."""
        media = memory.media
        assert media is not None
        assert memory.ids is not None
        assert memory.table is not None
        for mixin in layers.values():
            norm, projection = mixin.attn_norm, mixin.kv_proj
            if not is_fusable(norm) or not (
                is_original(projection, QuantisedLinear) or is_fusable(projection)
            ):
                return False
            if {norm.weight.dtype, projection.weight.dtype} != {media.dtype}:
                return False
            if torch.is_grad_enabled() and (media.requires_grad or norm.weight.requires_grad):
                return False
        for index, mixin in layers.items():
            place = mixin.kv_proj.weight.device
            angles: Any = tuple(t.to(place) for t in (*memory.table, memory.ids))
            memory.update(index, *mixin.build(media.to(place), angles))
        return True

    def _build_on(self, place: torch.device, layers: dict[int, Any], memory: ImageMemory) -> None:
        """Build keys and values of the layers on one device, there."""
        assert memory.media is not None
        assert memory.ids is not None
        assert memory.table is not None
        media, ids, *table = (t.to(place) for t in (memory.media, memory.ids, *memory.table))
        mixins = list(layers.values())
        heads = mixins[0].num_heads  # of this rank, if ranks divide them
        shape = (len(layers), len(media), heads, self.comemo_config.mixin_config.head_dim)
        keys, values = ops.memory_buffers(*shape, media.dtype, place).unbind(0)
        ops.build_memory(
            media,
            [mixin.kv_proj.weight for mixin in mixins],
            [mixin.attn_norm.weight for mixin in mixins if not mixin.folded] or None,
            *table,
            ids,
            list(keys.unbind(0)),
            list(values.unbind(0)),
            eps=mixins[0].attn_norm.variance_epsilon,
        )
        for index, key, value in zip(layers, keys.unbind(0), values.unbind(0), strict=True):
            memory.update(index, key, value)
