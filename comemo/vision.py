"""The vision tower and the projector: image tokens of tiles.

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
from comemo.config import CoMemoConfig
from comemo.parallel.split import Split, gather_parts, part_of
from comemo.vision_layers import encode
from comemo.weights.fusable import is_fusable, is_original, is_sharded

PROJECTOR = (nn.LayerNorm, nn.Linear, nn.GELU, nn.Linear)  # its layers, as published


class CoMemoVision:
    """Image tokens for a model with `vision_tower` and `multi_modal_projector`."""

    config: CoMemoConfig
    vision_tower: InternVLVisionModel
    multi_modal_projector: nn.Sequential
    split: Split | None
    training: bool

    def project_images(
        self, pixel_values: Tensor, embeds: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Projected image tokens [T, tokens per tile, d] of tiles [T, 3, side, side].

        Only the vision layers up to `select_layer` run, on `config.tiles_at_once` tiles at a time:
        this bounds the memory of activations for any T.

        Args:
            pixel_values: [T, 3, side, side].
            embeds, rows: also write the image tokens there, see `project_tiles`.

        Raises:
            ValueError: pixel values that are not square tiles of three channels; errors of
                `project_tiles`.
        """
        config = self.config
        check_tiles("project_images", pixel_values)
        if not len(pixel_values):  # which newer towers do not accept
            side = pixel_values.shape[2] // config.vision_config.patch_size[0]
            tokens = round(side**2 * config.downsample_ratio**2)
            return pixel_values.new_empty(0, tokens, config.text_config.hidden_size)
        if self.split is not None and not self._draws():
            return self._project_divided(self.split, pixel_values, embeds, rows)
        return self._project(pixel_values, embeds, rows)

    def _project_divided(
        self, split: Split, pixel_values: Tensor, embeds: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """`project_images` with some of the tiles on each rank."""
        total = len(pixel_values)
        own = pixel_values[part_of(split, total)]
        # Ranks without a tile compute one, too: sharded weights are collected by all of them.
        media = self._project(own if len(own) else pixel_values[:1], None, None)[: len(own)]
        media = gather_parts(split, media, total)
        _write(media, embeds, rows)
        return media

    def _draws(self) -> bool:
        """Whether tiles have random numbers, which must not depend on how they are divided."""
        vision = self.config.vision_config
        return self.training and bool(
            vision.hidden_dropout_prob
            or vision.attention_dropout
            or any(
                getattr(hook, "draws", False)
                for module in self.vision_tower.modules()
                for hook in module._forward_hooks.values()
            )
        )

    def _project(self, pixel_values: Tensor, embeds: Tensor | None, rows: Tensor | None) -> Tensor:
        config, projector = self.config, self.multi_modal_projector
        # Ranks with sharded weights must call the tower equally often, with any number of tiles.
        together = is_sharded(self.vision_tower)
        rounds = pixel_values.split(len(pixel_values) if together else config.tiles_at_once)
        if not _is_fusable_projector(projector):
            return self._project_by_modules(map(self._encode, rounds), embeds, rows)
        norm, first, _, second = projector
        weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
        one_buffer = len(rounds) > 1 and not (
            torch.is_grad_enabled() or torch.is_autocast_enabled(pixel_values.device.type)
        )
        media, parts, end = None, [], 0
        for tiles in rounds:
            x = self._encode(tiles)
            per_tile = round((x.shape[1] - 1) * config.downsample_ratio**2)
            start, end = end, end + len(tiles) * per_tile
            if one_buffer and media is None:
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
        """Outputs of the vision tower and the image tokens, like transformers' InternVL.

        Args:
            pixel_values: [T, 3, side, side].
            vision_feature_layer: which hidden state is projected; None for `config.select_layer`.
            vision_feature_select_strategy: only "default": without the class token.
            kwargs: arguments of the vision tower, such as `output_hidden_states`.

        Returns:
            `last_hidden_state` [T, 1 + tokens, C], and as `pooler_output` the image tokens
            [T, tokens per tile, d].

        Raises:
            ValueError: pixel values that are not square tiles of three channels, another strategy,
                or a layer that the tower does not have.
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
        x, output = _layer_of(self.vision_tower, pixel_values, layer % (depth + 1), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=output.last_hidden_state,
            pooler_output=self._project_by_modules([x], None, None),
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def _encode(self, tiles: Tensor) -> Tensor:
        """The vision tower's tokens [T, 1 + tokens, C], class token first."""
        vision, config = self.vision_tower, self.config
        depth = config.select_layer % (config.vision_config.num_hidden_layers + 1)
        if not (
            is_original(vision, InternVLVisionModel)
            and is_original(vision.encoder, InternVLVisionEncoder)
            and is_original(vision.encoder.layer, nn.ModuleList)
            and is_original(vision.layernorm, nn.Identity)
        ):
            return _layer_of(vision, tiles, depth)[0]
        x = vision.embeddings(tiles)
        for layer in vision.encoder.layer[:depth]:
            x = encode(layer, x)
        return x

    def _project_by_modules(
        self, parts: Iterable[Tensor], embeds: Tensor | None, rows: Tensor | None
    ) -> Tensor:
        """Call the projector, adapters and hooks included, on the tokens of one round at a time."""
        projected = []
        for x in parts:
            side = round((x.shape[1] - 1) ** 0.5)
            x = x[:, 1:].unflatten(1, (side, -1))
            x = ops.fold_tiles(x, self.config.downsample_ratio, self.config.ps_version)
            projected.append(self.multi_modal_projector(x.flatten(1, 2)))
        media = projected[0] if len(projected) == 1 else torch.cat(projected)
        _write(media, embeds, rows)
        return media


def _write(media: Tensor, embeds: Tensor | None, rows: Tensor | None) -> None:
    """Write image tokens [..., d] at rows of embeddings [B, N, d]."""
    if embeds is not None and rows is not None:
        flat = media.flatten(0, -2)
        embeds.view(-1, embeds.shape[-1])[rows] = flat.to(embeds.device, embeds.dtype)


def _layer_of(
    vision: InternVLVisionModel, tiles: Tensor, depth: int, **kwargs: Any
) -> tuple[Tensor, Any]:
    """Call the vision tower: hidden state `depth`, and the whole output."""
    if depth == vision.config.num_hidden_layers:  # the tower has no final norm
        output = vision(tiles, **kwargs)
        return output.last_hidden_state, output
    wanted = kwargs.pop("output_hidden_states", None)
    wanted = vision.config.output_hidden_states if wanted is None else wanted
    output = vision(tiles, output_hidden_states=True, **kwargs)
    x = output.hidden_states[depth]
    if not wanted:
        output.hidden_states = None
    return x, output


def _is_fusable_projector(projector: nn.Module) -> bool:
    """Whether a projector is as published and may be computed from its weights."""
    if not is_fusable(projector, biased=True):
        return False
    parts = tuple(projector.children())
    return (
        tuple(map(type, parts)) == PROJECTOR
        and parts[2].approximate == "none"
        and all(part.bias is not None for part in parts if part is not parts[2])
    )


def check_tiles(verb: str, pixel_values: Any, side: int | None = None) -> None:
    """Raise unless `pixel_values` is a batch of square tiles of three channels.

    Args:
        verb: the function that the error names.
        pixel_values: [T, 3, side, side].
        side: in pixels; None for any.

    Raises:
        ValueError: another shape, or not a tensor.
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
