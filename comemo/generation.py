"""Generation with an image memory: positions, beams, speculative decoding, decode loops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from comemo.decode.cache import ROOM_FOR_ANSWER, RoomyCache
from comemo.decode.interface import Prefilled
from comemo.decode.loop import DecodeLoop, check_loop, why_not
from comemo.decode.prefill import prefill
from comemo.generation_inputs import (
    PreparesInputs,
    check_prefilled,
    refuse_beside_drafts,
    refuse_right_padding,
)
from comemo.memory.inputs import queries_at_count
from comemo.outputs import CACHE, CoMemoOutput, one_cache, take_cache
from comemo_kernels import ImageMemory

# Arguments that transformers passes on to the model although they are not the model's: the image
# memory was built before the loop, and the rest belongs to the loop itself.
NOT_FOR_THE_MODEL = (
    "pixel_values",
    "tokenizer",
    "assistant_tokenizer",
    "assistant_model",
    "streamer",
)


class CoMemoGeneration(PreparesInputs):
    """`generate` for prompts with images. All state is in its arguments."""

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """transformers' `generate`, plus `pixel_values`, `tile_grid` and `image_memory`.

        Args:
            inputs: [B, N] token ids (or `input_ids`), padded on the left. Without them and without
                `inputs_embeds`: the start token alone.
            pixel_values: [T, 3, side, side], the tiles of all prompts in reading order.
            tile_grid: (cols, rows) of each image; None for original RoPE.
            image_memory: of an earlier call with the same images, at any position.
            memory_store: a `MemoryStore` to look images up in. An assistant model builds its own
                memory without it.
            prefilled: a `Prefilled`, prompts that a KV cache holds already. It excludes all other
                inputs and speculative decoding. The returned ids, which are what logits processors
                see, begin with the start token.
            decode_loop: a `DecodeLoop` of this model, for greedy decoding or sampling without
                speculative decoding. `cache_implementation="static"` makes one for the call, unless
                there is a `compile_config`.
            kwargs: everything that `generate` takes, the KV cache by either of its names; a
                processor in place of its `tokenizer`, as the server of transformers passes it;
                `custom_generate` as a function, never as a repository. Position ids of
                `inputs_embeds` are derived from their mask if there are none; with `pixel_values`,
                `input_ids` beside them say where images are.

        Raises:
            ValueError: tiles, grids and image tokens that disagree; a prompt beyond the position
                range or padded on the right; a memory of images of other grids; arguments that
                exclude each other or that a decode loop does not support. Nothing was computed.
        """
        if isinstance(custom := kwargs.get("custom_generate"), str):
            self.load_custom_generate(custom)
        chosen = kwargs.get("generation_config") or self.generation_config

        def option(name: str) -> Any:
            value = kwargs.get(name)
            return getattr(chosen, name, None) if value is None else value

        prefilled: Prefilled | None = kwargs.pop("prefilled", None)
        if prefilled is not None:
            check_prefilled(prefilled, {"inputs": inputs, **kwargs}, option)
        input_ids = self._take_inputs(inputs, kwargs)
        take_cache("generate", kwargs)
        if (tokenizer := kwargs.get("tokenizer")) is not None:
            kwargs["tokenizer"] = getattr(tokenizer, "tokenizer", tokenizer)
        refuse_right_padding(kwargs)
        grid, store = kwargs.pop("tile_grid", None), kwargs.pop("memory_store", None)
        memory: ImageMemory | None = kwargs.get("image_memory")
        pixel_values = kwargs.get("pixel_values")
        embeds, assistant = kwargs.get("inputs_embeds"), kwargs.get("assistant_model")
        if kwargs.get("decode_loop") is not None:
            check_loop("generate", self, kwargs["decode_loop"], option)
        rows: Any = input_ids if embeds is None else embeds
        if prefilled is not None:
            rows = input_ids = rows.expand(len(prefilled.position_ids), 1)
        refuse_beside_drafts(option, len(rows))
        if pixel_values is not None and memory is not None and assistant is None:
            raise ValueError("generate: give either pixel_values or image_memory, got both")
        if prefilled is not None:
            copies = [option(name) or 1 for name in ("num_beams", "num_return_sequences")]
            kwargs |= prefilled.inputs(max(copies))
        elif embeds is not None:
            input_ids = self._prepare_embeds(input_ids, grid, kwargs, store, option)
        elif pixel_values is not None or kwargs.get("position_ids") is None:
            self._prepare_prompt(input_ids, grid, kwargs, store)
            if assistant is None:
                kwargs.pop("pixel_values", None)  # an assistant builds a memory of its own
        if kwargs.get("position_ids") is not None:
            kwargs.setdefault("prompt_length", kwargs["position_ids"].shape[1])
        self._make_room(option, kwargs)
        return super().generate(input_ids, **kwargs)  # type: ignore[safe-super]

    def load_custom_generate(self, pretrained_model_name_or_path: Any = None, **_: Any) -> Any:
        """Refuse: the code of a repository is never run.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "generate: custom_generate must be a function, got the repository"
            f" {str(pretrained_model_name_or_path)!r}, whose code is not run"
        )

    def _make_room(self, option: Callable[[str], Any], kwargs: dict[str, Any]) -> None:
        """Provide a cache that grows without copies, unless another kind is asked for."""
        given = kwargs.get(CACHE) is not None  # an empty cache is false
        if given or option("cache_implementation") is not None:
            return
        if option("use_cache") is False or kwargs.get("position_ids") is None:
            return
        layers = self.config.text_config.num_hidden_layers
        answer = min(option("max_new_tokens") or 0, ROOM_FOR_ANSWER)
        kwargs[CACHE] = RoomyCache(layers, kwargs["position_ids"].shape[1] + answer)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """With a decode loop if there is one, or if static buffers are asked for."""

        def option(name: str) -> Any:
            return synced_gpus if name == "synced_gpus" else getattr(generation_config, name, None)

        loop: DecodeLoop | None = model_kwargs.pop("decode_loop", None)
        if loop is not None:
            check_loop("generate", self, loop, option)
        elif option("cache_implementation") == "static" and not why_not(self, option):
            loop = DecodeLoop(self)
        if loop is None:
            return super()._sample(  # type: ignore[misc]
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                synced_gpus,
                streamer,
                **model_kwargs,
            )
        return loop.answer(
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
            model_kwargs,
            lambda: self._prefill(input_ids, generation_config, model_kwargs),
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Embeddings, and whole prompts that are read in chunks, go through our own `prefill`."""
        prefilled: Prefilled | None = model_kwargs.pop("prefilled", None)
        if prefilled is not None:
            return CoMemoOutput(logits=prefilled.logits, **{CACHE: prefilled.cache})
        chunk, memory = generation_config.prefill_chunk_size, model_kwargs.get("image_memory")
        ids, given = model_kwargs.get("position_ids"), model_kwargs.get("inputs_embeds")
        cache = model_kwargs.get(CACHE)
        whole = given is not None or (ids is not None and input_ids.shape[1] == ids.shape[1])
        embedded = given is not None and type(cache) is RoomyCache
        ours = whole and (chunk is not None or (embedded and not _records(generation_config)))
        if not ours or cache is None or ids is None:
            return super()._prefill(  # type: ignore[misc]
                input_ids, generation_config, model_kwargs, *args, **kwargs
            )
        mask = model_kwargs.get("attention_mask")
        image_mask = None
        if memory is not None and given is None:
            image_mask = self.model.find_image_tokens(input_ids)

        def embed(first: int, last: int) -> Tensor:
            if given is not None:
                return given[:, first:last]
            return self.model.embed(input_ids, image_mask, memory, first, last)

        return prefill(
            self,
            embed,
            ids,
            cache,
            start=int(cache.get_seq_length()),
            chunk=chunk,
            attention_mask=mask,
            token_counts=None if mask is None else mask.sum(1),
            memory=lambda first, last: memory,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        image_memory: ImageMemory | None = None,
        prompt_length: int | None = None,
        prefilled: Prefilled | None = None,
        decode_loop: DecodeLoop | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = one_cache("prepare_inputs_for_generation", cache, past_key_values)
        for name in NOT_FOR_THE_MODEL:
            kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )
        inputs["image_memory"] = image_memory
        if position_ids is not None:
            # Newer transformers drop a mask of ones.
            mask = torch.ones_like(position_ids) if attention_mask is None else attention_mask
            inputs["token_counts"] = mask.sum(1)
            has_images = image_memory is not None and prompt_length is not None
            if queries_at_count(self.config, has_images):
                column = torch.arange(mask.shape[1], device=mask.device)
                count = mask.long().cumsum(1) - 1
                query = torch.where(column < prompt_length, position_ids, count)
                tokens = inputs["position_ids"].shape[1]
                inputs["query_position_ids"] = query[:, -tokens:].clone()
        return inputs

    def _expand_inputs_for_generation(
        self, input_ids: Tensor | None = None, expand_size: int = 1, **model_kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # The beams of a prompt share tiles and memory; everything else is repeated.
        memory, pixel_values = (model_kwargs.pop(k, None) for k in ("image_memory", "pixel_values"))
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            input_ids=input_ids, expand_size=expand_size, **model_kwargs
        )
        if memory is not None:
            model_kwargs["image_memory"] = memory.repeat_interleave(expand_size)
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs

    def _get_candidate_generator(
        self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> Any:
        """An assistant drafts tokens from its own image memory, or from the text alone."""
        assistant, theirs = kwargs.get("assistant_model"), dict(model_kwargs)
        pixel_values = theirs.pop("pixel_values", None)
        theirs.pop("image_memory", None)  # of this model's weights
        if not isinstance(assistant, CoMemoGeneration):
            theirs.pop("prompt_length", None)
        elif pixel_values is not None:
            image_mask = assistant.model.find_image_tokens(kwargs["input_ids"])
            theirs["image_memory"] = assistant.model.build_image_memory(
                pixel_values, image_mask, theirs["position_ids"]
            )
        return super()._get_candidate_generator(  # type: ignore[misc]
            *args, model_kwargs=theirs, **kwargs
        )


def _records(generation_config: Any) -> bool:
    """Whether attentions or hidden states of the prefill are returned."""
    return bool(generation_config.output_attentions or generation_config.output_hidden_states)
