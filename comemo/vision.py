"""From tiles to image tokens: the vision tower and the projector.

Letters: T tiles, C channels of the tower, d width of the language model.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.modeling_internvl import (
    InternVLVisionEncoder,
    InternVLVisionModel,
)
from transformers.utils.generic import can_return_tuple

import comemo_kernels as ops
from comemo.fusable import is_fusable, is_own

PROJECTOR = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)


class CoMemoVision:
    """Image tokens for a model with `vision_tower` and `multi_modal_projector`."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def project_images(
        self, pixel_values: Tensor, embeds: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Projected image tokens [T, tokens per tile, d] of tiles [T, 3, side, side].

        Only the vision layers up to `select_layer` run, on `config.tiles_at_once` tiles at a time:
        what lies between two layers is bounded by that, whatever T.

        Args:
            pixel_values: [T, 3, side, side].
            embeds, rows: where to write the image tokens besides, as of `project_tiles`.

        Raises:
            ValueError: pixel values that are not square tiles of three colours; or as of
                `project_tiles`.
        """
        config, projector = self.config, self.multi_modal_projector
        check_tiles("project_images", pixel_values)
        if not len(pixel_values):  # for which newer towers have no shape
            side = pixel_values.shape[2] // config.vision_config.patch_size[0]
            tokens = round(side**2 * config.downsample_ratio**2)
            return pixel_values.new_empty(0, tokens, config.text_config.hidden_size)
        rounds = pixel_values.split(config.tiles_at_once)
        if not _is_as_made(projector):
            return self._project_by_modules(map(self._see, rounds), embeds, rows)
        norm, first, _, second = projector
        weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
        into_one = len(rounds) > 1 and not (
            torch.is_grad_enabled() or torch.is_autocast_enabled(pixel_values.device.type)
        )
        media, parts, end = None, [], 0
        for tiles in rounds:
            x = self._see(tiles)
            per_tile = round((x.shape[1] - 1) * config.downsample_ratio**2)
            start, end = end, end + len(tiles) * per_tile
            if into_one and media is None:
                media = x.new_empty(len(pixel_values) * per_tile, len(second.bias))
            parts.append(
                ops.project_tiles(
                    x,
                    *weights,
                    ratio=config.downsample_ratio,
                    version=config.ps_version,
                    eps=norm.eps,
                    media=None if media is None else media[start:end],
                    embeds=embeds,
                    rows=None if rows is None else rows[start:end],
                )
            )
        if media is not None:
            return media.view(len(pixel_values), -1, media.shape[1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | None = None,
        vision_feature_select_strategy: str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """What the vision tower returns, and the image tokens, as of transformers' InternVL.

        Args:
            pixel_values: [T, 3, side, side].
            vision_feature_layer: which hidden state is projected; None for `config.select_layer`.
            vision_feature_select_strategy: "default", the only one: the class token is left out.
            kwargs: what the vision tower takes, such as `output_hidden_states`.

        Returns:
            `last_hidden_state` [T, 1 + tokens, C], and as `pooler_output` the image tokens
            [T, tokens per tile, d].

        Raises:
            ValueError: pixel values that are not square tiles of three colours, another strategy,
                or a layer that the tower has not.
        """
        check_tiles("get_image_features", pixel_values)
        if vision_feature_select_strategy not in (None, "default"):
            raise ValueError(
                "get_image_features: vision_feature_select_strategy must be 'default', got"
                f" {vision_feature_select_strategy!r}"
            )
        layer = self.config.select_layer if vision_feature_layer is None else vision_feature_layer
        depth = self.config.vision_config.num_hidden_layers
        if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
            raise ValueError(
                f"get_image_features: vision_feature_layer must be one of the {depth + 1} hidden"
                f" states, got {layer!r}"
            )
        pixel_values = pixel_values.to(_dtype_of(self.vision_tower))
        x, seen = _layer_of(self.vision_tower, pixel_values, layer % (depth + 1), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=seen.last_hidden_state,
            pooler_output=self._project_by_modules([x], None, None),
            hidden_states=seen.hidden_states,
            attentions=seen.attentions,
        )

    def _see(self, tiles: Tensor) -> Tensor:
        """The vision tower's tokens [T, 1 + tokens, C], class token first."""
        vision, config = self.vision_tower, self.config
        depth = config.select_layer % (config.vision_config.num_hidden_layers + 1)
        if not (
            is_own(vision, InternVLVisionModel)
            and is_own(vision.encoder, InternVLVisionEncoder)
            and is_own(vision.encoder.layer, nn.ModuleList)
            and is_own(vision.layernorm, nn.Identity)
        ):
            return _layer_of(vision, tiles, depth)[0]
        x = vision.embeddings(tiles)
        for layer in vision.encoder.layer[:depth]:
            x = layer(x)
        return x

    def _project_by_modules(
        self, parts: Iterable[Tensor], embeds: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """The projector as it stands, adapters, hooks and all, on one round's tokens at a time."""
        found = []
        for x in parts:
            side = round((x.shape[1] - 1) ** 0.5)
            x = x[:, 1:].unflatten(1, (side, -1))
            x = ops.fold_tiles(x, self.config.downsample_ratio, self.config.ps_version)
            found.append(self.multi_modal_projector(x.flatten(1, 2)))
        media = found[0] if len(found) == 1 else torch.cat(found)
        if embeds is not None and rows is not None:
            flat = media.flatten(0, -2)
            embeds.view(-1, embeds.shape[-1])[rows] = flat.to(embeds.device, embeds.dtype)
        return media


def _layer_of(vision: Any, tiles: Tensor, depth: int, **kwargs: Any) -> tuple[Tensor, Any]:
    """A hidden state of the vision tower, by calling it, and all that it returned."""
    if depth == vision.config.num_hidden_layers:  # the tower ends with no norm
        seen = vision(tiles, **kwargs)
        return seen.last_hidden_state, seen
    asked = kwargs.pop("output_hidden_states", None)
    asked = vision.config.output_hidden_states if asked is None else asked
    seen = vision(tiles, output_hidden_states=True, **kwargs)
    x = seen.hidden_states[depth]
    if not asked:
        seen.hidden_states = None
    return x, seen


def _is_as_made(projector: nn.Module) -> bool:
    """Whether a projector may be computed from its weights."""
    if not is_fusable(projector, biased=True):
        return False
    parts = tuple(projector.children())
    return (
        tuple(map(type, parts)) == PROJECTOR
        and parts[2].approximate == "none"
        and all(part.bias is not None for part in parts if part is not parts[2])
    )


def check_tiles(verb: str, pixel_values: Any, side: int | None = None) -> None:
    """Refuse what is no batch of square tiles of three colours.

    Args:
        verb: the function to name.
        pixel_values: to be [T, 3, side, side].
        side: in pixels; None for any.

    Raises:
        ValueError: another shape, or no tensor.
    """
    is_tensor = isinstance(pixel_values, Tensor)
    shape = tuple(pixel_values.shape) if is_tensor else ()
    if len(shape) != 4 or shape[1:] != (3, *[side or shape[3]] * 2):
        got = shape if is_tensor else type(pixel_values).__name__
        size = side or "side"
        raise ValueError(
            f"{verb}: pixel_values must be a tensor [tiles, 3, {size}, {size}], got {got}"
        )


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
