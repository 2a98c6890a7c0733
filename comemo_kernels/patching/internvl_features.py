"""Image features of InternVL: the vision tower's tokens go to `project_tiles` as they are.

The model's own `get_image_features` runs, with another fold and projector: it sees an object that
stands for the model during the call. So its arguments and outputs are those of any release.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comemo_kernels.operations import project_tiles
from comemo_kernels.patching.plain import is_plain, is_untouched
from comemo_kernels.patching.replacement import Replacement

PARTS = ("layer_norm", "linear_1", "act", "linear_2")


def is_gelu(module: nn.Module) -> bool:
    """Whether a module is the exact GELU, of torch or of transformers."""
    if type(module) is nn.GELU:
        return module.approximate == "none"
    return type(module).__name__ == "GELUActivation" and vars(module).get("act") is F.gelu


def get_image_features(call: Replacement, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
    """In place of `InternVLModel.get_image_features`."""
    own = call.module
    names = ("vision_feature_layer", "vision_feature_select_strategy")
    given = dict(zip(names, args, strict=False)) | kwargs
    layer, strategy = (
        given[name] if given.get(name) is not None else getattr(own.config, name, None)
        for name in names
    )
    reason = None
    if strategy != "default" or not isinstance(layer, int):
        reason = f"features of layer {layer} by strategy {strategy!r}"
    elif not _is_plain(own):
        reason = "a part of the projector has to be called"
    if reason is not None:
        return call.refuse(reason, pixel_values, *args, **kwargs)
    assert isinstance(layer, int)
    own_function = type(own).get_image_features
    return own_function(_Projecting(call, layer), pixel_values, *args, **kwargs)


def _is_plain(own: nn.Module) -> bool:
    """Whether the projector may be computed from its weights."""
    projector = own.multi_modal_projector
    parts = vars(projector)["_modules"]
    if parts.keys() != set(PARTS):  # in a wrapper, for example
        return False
    norm, first, act, second = (parts[part] for part in PARTS)
    return (
        is_untouched(projector)
        and is_plain(norm, first, second, biased=True)
        and is_gelu(act)
        and is_untouched(act)
        and all(vars(part)["_parameters"]["bias"] is not None for part in (norm, first, second))
    )


class _Projecting:
    """An InternVLModel during one call of its `get_image_features`."""

    def __init__(self, call: Replacement, layer: int) -> None:
        self._call, self._own, self._layer = call, call.module, layer
        self._tokens: Tensor | None = None
        self._raster: Tensor | None = None
        self._ratio = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def vision_tower(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own tower; its tokens are kept until the projector is called."""
        found = self._own.vision_tower(*args, **kwargs)
        layer = self._layer
        self._tokens = found.last_hidden_state if layer == -1 else found.hidden_states[layer]
        return found

    def pixel_shuffle(self, vision_features: Tensor, scale_factor: float = 0.5) -> Tensor:
        """Nothing yet: `project_tiles` folds."""
        self._raster, self._ratio = vision_features, scale_factor
        return vision_features

    def multi_modal_projector(self, image_features: Tensor) -> Tensor:
        """Image tokens of the tower's tokens, from which `image_features` are taken."""
        own, tokens, raster = self._own, self._tokens, self._raster
        assert raster is not None
        projector = own.multi_modal_projector
        reason = None
        if tokens is not None and self._follows(tokens, raster, image_features):
            norm, first, _, second = (getattr(projector, part) for part in PARTS)
            weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
            reason = _find_reason(tokens, weights)
            if reason is None:
                return project_tiles(tokens, *weights, ratio=self._ratio, eps=norm.eps)
        if reason is not None:
            self._call.note(reason)
        folded = own.pixel_shuffle(raster, scale_factor=self._ratio)
        return projector(folded.reshape(len(folded), -1, folded.shape[-1]))

    def _follows(self, tokens: Tensor, raster: Tensor, features: Tensor) -> bool:
        """Whether the raster is the tokens but the class token, and `project_tiles` folds it."""
        T, S, C = tokens.shape
        h, n = math.isqrt(S - 1), round(1 / self._ratio)
        norm = self._own.multi_modal_projector.layer_norm
        return (
            raster.shape == (T, h, h, C)
            and features.shape == (T, h * h, C)
            and abs(n * self._ratio - 1) < 1e-6
            and h % n == 0
            and norm.normalized_shape == (C * n * n,)
            and (
                torch.compiler.is_compiling()
                or raster.data_ptr() == features.data_ptr() == tokens[:, 1:].data_ptr()
            )
        )


def _find_reason(tokens: Tensor, weights: tuple[Tensor, ...]) -> str | None:
    """Why the kernels cannot be used; None if they can."""
    if any(t.device != tokens.device for t in weights):
        return "the projector is on another device than the tokens"
    if not torch.is_autocast_enabled(tokens.device.type) and any(
        t.dtype != tokens.dtype for t in weights
    ):
        return "the projector has another dtype than the tokens"
    if tokens.is_cuda and tokens.dtype == torch.float64:
        return "float64 has no kernel"
    if tokens.is_cuda and not (tokens.stride(-1) == 1 and all(t.is_contiguous() for t in weights)):
        return "tokens or weights are not contiguous"
    return None
