"""RoPE-DHR position ids as an option of InternVL: `image_grids` of `forward` and `generate`.

All tiles of an image then share the ids of its thumbnail, so that a long prompt of many images
stays within the range of positions that the language model knows. Source: CoMemo
(arXiv:2506.06279). A model without training on such ids answers otherwise than by its own ids.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from comemo_kernels.grids import Grid
from comemo_kernels.operations import rope_dhr_positions
from comemo_kernels.patching.replacement import Replacement


def forward(
    call: Replacement,
    *args: Any,
    image_grids: Sequence[Grid] | Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the model's `forward`, with one argument more.

    Args:
        image_grids: (cols, rows) of tiles of every image, in reading order, prompt after prompt;
            (1, 1) for a frame of a video. None: the model's own ids.

    Raises:
        ValueError: grids that do not fit the image tokens; no `input_ids`; `position_ids` as well;
            a cache that holds tokens, because the ids before them are not known; flash attention,
            which takes such ids for those of packed prompts.
    """
    if image_grids is None:
        return call.original(*args, **kwargs)
    given = _bind(call, args, kwargs)
    held = _held(given)
    if held:
        raise ValueError(
            "forward: with image_grids the cache must be empty, because ids go on from earlier"
            f" tokens, got {held} tokens; give position_ids, or use generate"
        )
    _add_positions("forward", call.module, given, given.get("input_ids"), image_grids)
    return call.original(**given)


def generate(
    call: Replacement,
    *args: Any,
    image_grids: Sequence[Grid] | Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """In place of the model's `generate`, with one argument more; generated ids go on from them.

    With a cache of earlier turns, `input_ids` and `image_grids` are those of the whole
    conversation, `pixel_values` those of the new images.

    Args:
        image_grids: as in `forward`.

    Raises:
        ValueError: as in `forward`; tokens of the cache that are not in `input_ids`; padding
            without `attention_mask`; `use_cache=False`, without which transformers takes such ids
            for those of packed prompts.
    """
    if image_grids is None:
        return call.original(*args, **kwargs)
    given = _bind(call, args, kwargs)
    own, inputs = call.module, given.pop("inputs", None)
    ids = given.pop("input_ids", None)
    ids = inputs if ids is None else ids
    config = given.get("generation_config") or own.generation_config
    if given.get("use_cache", config.use_cache) is False:
        raise ValueError("generate: with image_grids use_cache must be True, got False")
    held = _held(given)
    if ids is not None and held >= ids.shape[-1]:
        raise ValueError(
            "generate: with image_grids input_ids must hold the whole conversation, longer than the"
            f" {held} tokens of the cache, got {tuple(ids.shape)}"
        )
    if given.get("attention_mask") is None and ids is not None and config.pad_token_id is not None:
        padded = ids == config.pad_token_id
        if bool(padded.any()):
            raise ValueError(
                "generate: with image_grids attention_mask must be given for padded prompts, got"
                f" None and {int(padded.sum())} padding tokens"
            )
    _add_positions("generate", own, given, ids, image_grids)
    return call.original(input_ids=ids, **given)


def _bind(call: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    names = list(inspect.signature(call.original).parameters)
    return dict(zip(names, args, strict=False)) | kwargs


def _held(given: dict[str, Any]) -> int:
    """Tokens in the cache that is given; transformers 5.24 calls it `cache`."""
    caches = (given.get(name) for name in ("past_key_values", "cache"))
    return max((int(cache.get_seq_length()) for cache in caches if cache is not None), default=0)


def _add_positions(
    verb: str,
    own: nn.Module,
    given: dict[str, Any],
    ids: Tensor | None,
    grids: Sequence[Grid] | Tensor,
) -> None:
    """Set position ids, and a mask, without which transformers takes them for packed prompts."""
    if ids is None or ids.ndim != 2:
        shape = None if ids is None else tuple(ids.shape)
        raise ValueError(f"{verb}: with image_grids input_ids must be [B, N], got {shape}")
    if given.get("position_ids") is not None:
        raise ValueError(f"{verb}: image_grids and position_ids exclude each other, got both")
    attention = str(own.config.get_text_config()._attn_implementation)
    if "flash" in attention:
        raise ValueError(
            f"{verb}: with image_grids the attention must be sdpa or eager, because flash attention"
            f" takes their ids for those of packed prompts, got {attention!r}"
        )
    mask = given.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        told = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"{verb}: with image_grids attention_mask must be {tuple(ids.shape)}, as input_ids, got"
            f" {told}"
        )
    given["attention_mask"] = mask
    given["position_ids"] = rope_dhr_positions(
        ids == own.config.image_token_id,
        mask,
        grids,
        side=_find_side(verb, own),
        validate=not torch.compiler.is_compiling(),
    )


def _find_side(verb: str, own: nn.Module) -> int:
    """Image tokens along a tile's side."""
    vision = own.config.vision_config
    sides = {
        size / patch * own.config.downsample_ratio
        for size, patch in zip(_pair(vision.image_size), _pair(vision.patch_size), strict=True)
    }
    side = max(sides)
    if len(sides) > 1 or side != int(side):
        raise ValueError(
            f"{verb}: with image_grids tiles must be squares of whole tokens, got sides {sides}"
        )
    return int(side)


def _pair(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size
