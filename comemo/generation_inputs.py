"""Inputs of `generate`: checked and completed before anything is generated.

Letters: B prompts, N tokens of a prompt, I images.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from comemo.config import CoMemoConfig
from comemo.decode.interface import DRAFTS, ModelMixin, Prefilled
from comemo.memory.inputs import queries_at_count
from comemo.outputs import CACHE
from comemo_kernels import ImageMemory

# Inputs that a `Prefilled` holds or replaces.
PROMPT_INPUTS = (
    "inputs",
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "pixel_values",
    "tile_grid",
    "image_memory",
    "memory_store",
    "cache",
    "past_key_values",
)


class PreparesInputs(ModelMixin):
    """Ids, positions, mask and memory of prompts."""

    def _take_inputs(self, inputs: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
        """The ids, by either name; the start token alone if there is no input."""
        ids = kwargs.pop("input_ids", None)
        if inputs is not None and ids is not None:
            raise ValueError("generate: inputs and input_ids are two names of one argument")
        ids = inputs if ids is None else ids
        if ids is not None or kwargs.get("inputs_embeds") is not None:
            return ids
        chosen = kwargs.get("generation_config") or self.generation_config
        start = kwargs.get("bos_token_id")
        for config in (chosen, self.generation_config, self.config.text_config):
            start = config.bos_token_id if start is None else start
        if start is None:
            raise ValueError("generate: give input_ids, inputs_embeds or a bos_token_id, got none")
        return torch.tensor([[int(start)]], device=self.device)

    def _prepare_embeds(
        self,
        input_ids: Tensor | None,
        grid: Any,
        kwargs: dict[str, Any],
        store: Any,
        option: Callable[[str], Any],
    ) -> Tensor | None:
        """Complete the inputs of embeddings; returns the ids that new ones are appended to."""
        embeds, pixel_values = kwargs["inputs_embeds"], kwargs.pop("pixel_values", None)
        if option("use_cache") is False:
            raise ValueError(
                "generate: inputs_embeds need a cache, because later steps are given as ids, got"
                " use_cache=False"
            )
        if option("assistant_model") is not None or option("prompt_lookup_num_tokens"):
            raise ValueError(
                "generate: speculative decoding needs input_ids alone, got inputs_embeds"
            )
        mask = kwargs.get("attention_mask")
        if mask is None:
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
            kwargs["attention_mask"] = mask
        if pixel_values is not None:
            if input_ids is None or input_ids.shape != embeds.shape[:2]:
                got = None if input_ids is None else tuple(input_ids.shape)
                raise ValueError(
                    "generate: pixel_values beside inputs_embeds need input_ids"
                    f" {tuple(embeds.shape[:2])}, which say where images are, got {got}"
                )
            held = kwargs | {"pixel_values": pixel_values}
            self._prepare_prompt(input_ids, grid, held, store)
            kwargs |= {name: held[name] for name in ("position_ids", "image_memory")}
            image_mask = self.model.find_image_tokens(input_ids)
            kwargs["inputs_embeds"] = self.model.with_media(
                embeds, image_mask, kwargs["image_memory"]
            )
        elif kwargs.get("position_ids") is None:
            counted = mask.long().cumsum(1) - 1
            kwargs["position_ids"] = counted.clamp(min=0)[:, -embeds.shape[1] :]
        return input_ids

    def _prepare_prompt(
        self, input_ids: Tensor, grid: Any, kwargs: dict[str, Any], store: Any
    ) -> None:
        """Check mask, positions and memory of whole prompts, and complete them."""
        model, memory = self.model, kwargs.get("image_memory")
        pixel_values, mask = kwargs.get("pixel_values"), kwargs.get("attention_mask")
        kwargs["attention_mask"] = mask = torch.ones_like(input_ids) if mask is None else mask
        has_images = pixel_values is not None or memory is not None
        if has_images or self.config.image_token_id is not None:
            image_mask = model.find_image_tokens(input_ids)
        else:
            image_mask = torch.zeros_like(input_ids, dtype=torch.bool)
        if not has_images and image_mask.any():
            raise ValueError(
                f"generate: the prompts hold {image_mask.sum(1).tolist()} image tokens, got"
                " neither pixel_values nor an image_memory"
            )
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = model.prompt_position_ids(image_mask, mask, grid if has_images else None)
            kwargs["position_ids"] = ids
        check_range(self.config, ids, mask, has_images)
        if memory is not None:
            kwargs["image_memory"] = _place(memory, image_mask, ids)
        elif pixel_values is not None:
            kwargs["image_memory"] = model.build_image_memory(
                pixel_values, image_mask, ids, grid, store
            )


def check_prefilled(
    prefilled: Prefilled, given: dict[str, Any], option: Callable[[str], Any]
) -> None:
    """Raise for a `Prefilled` whose parts disagree, or that is not the only input.

    Args:
        prefilled: to be continued.
        given: other arguments of `generate`, by name.
        option: returns the value of an argument of `generate` by name, None if unset.

    Raises:
        ValueError: another type, inputs beside it, options that need the ids of the prompt or no
            cache, padding on the right, a cache of another length.
    """
    if not isinstance(prefilled, Prefilled):
        raise ValueError(f"generate: prefilled must be a Prefilled, got {type(prefilled).__name__}")
    refuse_right_padding({"attention_mask": prefilled.attention_mask})
    beside = [name for name in PROMPT_INPUTS if given.get(name) is not None]
    beside += [f"{name} (it needs the prompt as ids)" for name in DRAFTS if option(name)]
    beside += ["use_cache=False"] if option("use_cache") is False else []
    if beside:
        raise ValueError(f"generate: prefilled must be the only input, got {', '.join(beside)} too")
    N, held = prefilled.position_ids.shape[1], int(prefilled.cache.get_seq_length())
    if held != N:
        raise ValueError(
            f"generate: the {CACHE} of prefilled must hold the {N} tokens of position_ids, got"
            f" {held}"
        )


def check_range(
    config: CoMemoConfig, position_ids: Tensor, attention_mask: Tensor, has_images: bool
) -> None:
    """Raise for prompts whose positions the model cannot rotate.

    Args:
        config: of the model.
        position_ids: [B, N].
        attention_mask: [B, N], 0 at padding.
        has_images: whether mixin layers run.

    Raises:
        ValueError: a position beyond the range.
    """
    highest = int(position_ids.max()) if position_ids.numel() else 0
    if has_images:
        limit = config.mixin_config.max_position_embeddings
    elif config.rope_scaling is None:
        limit = config.text_config.max_position_embeddings
    else:  # scaled angles extend the trained range
        return
    if highest >= limit:
        raise ValueError(
            f"generate: the prompt needs position ids up to {highest}, the model has"
            f" {limit}: use fewer or smaller images"
            + (", or rope='dhr'" if has_images and config.rope == "original" else "")
        )
    tokens = int(attention_mask.sum(1).max())
    if queries_at_count(config, has_images) and tokens >= limit:
        raise ValueError(
            f"generate: the prompt has {tokens} tokens and decode_positions='raw' puts the"
            f" next one at position {tokens}, the model has {limit}: set"
            " config.decode_positions = 'compressed'"
        )


def refuse_beside_drafts(option: Callable[[str], Any], rows: int) -> None:
    """Raise for options that transformers cannot combine with speculative decoding.

    Args:
        option: returns the value of an argument of `generate` by name, None if unset.
        rows: number of prompts.
    """
    drafts = [name for name in DRAFTS if option(name)]
    reasons = [f"{rows} prompts"] if rows > 1 else []
    reasons += [
        f"{name}={option(name)}"
        for name in ("num_beams", "num_return_sequences")
        if (option(name) or 1) > 1
    ]
    reasons += ["use_cache=False"] if option("use_cache") is False else []
    if option("cache_implementation") == "static":
        reasons.append("cache_implementation='static'")
    if drafts and reasons:
        raise ValueError(
            f"generate: speculative decoding ({', '.join(drafts)}) needs one prompt, one answer and"
            f" a cache that can be cropped, got {', '.join(reasons)}"
        )


def refuse_right_padding(kwargs: dict[str, Any]) -> None:
    """Generated tokens follow the last column, which must be a token of every prompt."""
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] and not mask[:, -1].all():
        rows = (mask[:, -1] == 0).nonzero().flatten().tolist()
        raise ValueError(
            "generate: prompts must be padded on the left (tokenizer.padding_side = 'left'), got an"
            f" attention_mask that ends with padding in rows {rows}"
        )


def _place(memory: ImageMemory, image_mask: Tensor, position_ids: Tensor) -> ImageMemory:
    """The memory for prompts whose images may be at other positions than when it was built."""
    if memory.media is None:
        raise ValueError(
            "generate: image_memory must have its media, which prompts embed, got None"
        )
    lengths, spans = image_mask.sum(1).tolist(), memory.spans
    if spans is None and len(lengths) == 1:  # what `append_images` made
        spans = torch.tensor([[[0, len(memory)]]], device=image_mask.device)
    held = (
        [] if spans is None or spans.shape[1] != 1 else (spans[:, 0, 1] - spans[:, 0, 0]).tolist()
    )
    biases = None
    if memory.ids is not None and spans is not None and held == lengths:
        biases = _find_biases(memory, spans[:, 0].tolist(), image_mask, position_ids)
    if biases is None or spans is None:
        raise ValueError(
            f"generate: image_memory holds {held} image tokens, which do not match the prompts'"
            f" {lengths}: build it for images of the same grids, or pass pixel_values"
        )
    device = spans.device
    return memory.reading(spans, None if memory.absolute else biases.to(device))


def _find_biases(
    memory: ImageMemory, spans: list[list[int]], image_mask: Tensor, position_ids: Tensor
) -> Tensor | None:
    """Position ids [B, I] of the memory's images in each prompt; None if the images differ."""
    assert memory.ids is not None
    places = memory.ids.cpu().long()
    sizes = memory.sizes if not memory.absolute else (len(places),)
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    biases = torch.zeros(len(spans), len(sizes), dtype=torch.int64)
    for prompt, (start, end) in enumerate(spans):
        found = position_ids[prompt][image_mask[prompt]].cpu() - places[start:end]
        biases[prompt, owner[start:end]] = found  # one per image; all must agree
        if not torch.equal(biases[prompt, owner[start:end]], found):
            return None
    return None if memory.absolute and biases.any() else biases
