"""The model without its head: vision tower, projector and language model.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, T tiles, d width of the
language model.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.utils.generic import can_return_tuple

import comemo_kernels as ops
from comemo.attention import ChoosesAttention
from comemo.checkpoint import PublishedCheckpoint
from comemo.config import CoMemoConfig
from comemo.language_model import CoMemoTextModel
from comemo.memory.inputs import CoMemoImages
from comemo.outputs import CACHE, OLD_NAME, CoMemoModelOutput, one_cache, warn_old_name
from comemo.packing import (
    VARLEN,
    find_begins,
    find_bounds,
    places_from_begins,
    prompt_positions,
    take_bounds,
    within_samples,
)
from comemo.parallel.split import Split, refuse_divided
from comemo.vision import CoMemoVision
from comemo.weights.fusable import in_step, is_sharded, offloaded_to
from comemo_kernels import ImageMemory

# Keyword arguments of a forward beside its named ones.
KEYWORDS = {"output_attentions", "output_hidden_states", *VARLEN}


class CoMemoPreTrainedModel(ChoosesAttention, PublishedCheckpoint, PreTrainedModel):
    config: CoMemoConfig
    config_class = CoMemoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CoMemoDecoderLayer", "InternVLVisionLayer"]
    _skip_keys_device_placement = ["cache", OLD_NAME, "image_memory"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @property
    def device(self) -> torch.device:
        """Where inputs go: device of the first weight, or where offloaded weights are loaded to."""
        device = super().device
        return device if device.type != "meta" else offloaded_to(self) or device

    def enable_input_require_grads(self) -> None:
        """As in transformers, but not for checkpointing that is not reentrant: it needs none.

        Checkpointing calls this. A frozen vision tower would then be computed again and
        differentiated in every step, for gradients that nobody uses.
        """
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", False):
                checkpoint = getattr(module, "_gradient_checkpointing_func", None)
                if getattr(checkpoint, "keywords", {}).get("use_reentrant") is False:
                    return
        super().enable_input_require_grads()

    def add_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; refused where ranks divide the model, see `refuse_divided`."""
        refuse_divided("add_adapter", self)
        return super().add_adapter(*args, **kwargs)

    def load_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; refused where ranks divide the model, see `refuse_divided`."""
        refuse_divided("load_adapter", self)
        return super().load_adapter(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; refused where ranks divide the model, see `refuse_divided`."""
        refuse_divided("resize_token_embeddings", self)
        return super().resize_token_embeddings(*args, **kwargs)


class CoMemoModel(CoMemoVision, CoMemoImages, CoMemoPreTrainedModel):
    """Vision tower, projector and language model."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]
    split: Split | None = None  # the ranks that divide its layers
    stages: Split | None = None  # the ranks that have some of the layers each

    def __init__(self, config: CoMemoConfig) -> None:
        config.check()
        super().__init__(config)
        channels = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        width = config.text_config.hidden_size
        self.vision_tower = InternVLVisionModel(config.vision_config)
        if config.vision_config.use_qk_norm:
            for layer in self.vision_tower.encoder.layer:  # published: one eps for all norms
                for norm in (layer.attention.q_norm, layer.attention.k_norm):
                    norm.variance_epsilon = config.vision_config.layer_norm_eps
        self.multi_modal_projector = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, width), nn.GELU(), nn.Linear(width, width)
        )
        self.language_model = CoMemoTextModel(config)
        self.post_init()

    def vision_layers(self) -> list[nn.Module]:
        """Layers of the vision tower that run, see `config.select_layer`."""
        layers = self.vision_tower.encoder.layer
        return list(layers[: self.config.select_layer % (len(layers) + 1)])

    def decoder_layers(self) -> list[nn.Module]:
        """All layers of the language model."""
        return list(self.language_model.layers)

    def rope_lengths(self, position_ids: Tensor, token_counts: Tensor) -> Tensor:
        """[B], the lengths for dynamic scaling, of prompts with ids [B, N] and token_counts [B]."""
        return self.language_model.rope_lengths(position_ids, token_counts)

    def build_memory(self, memory: ImageMemory) -> bool:
        """Build keys and values of all mixin layers at once, see `BuildsMemory.build_memory`."""
        return self.language_model.build_memory(memory)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    @warn_old_name
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tile_grid: Any = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        image_memory: ImageMemory | None = None,
        use_cache: bool | None = None,
        query_position_ids: Tensor | None = None,
        token_counts: Tensor | None = None,
        rope_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> CoMemoModelOutput:
        """The last hidden states [B, N, d]; arguments as in `CoMemoForConditionalGeneration`."""
        _check_keywords(kwargs)
        if self.split is not None or self.stages is not None:
            self._check_divided(kwargs)
        cache = one_cache("CoMemo", cache, past_key_values)
        if input_ids is None and inputs_embeds is None:
            raise ValueError("CoMemo: give either input_ids or inputs_embeds")
        if pixel_values is None and input_ids is not None and inputs_embeds is not None:
            raise ValueError("CoMemo: input_ids beside inputs_embeds need pixel_values")
        if pixel_values is not None and (input_ids is None or image_memory is not None):
            raise ValueError("CoMemo: pixel_values need input_ids and exclude an image_memory")
        past = 0 if cache is None else cache.get_seq_length()
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        B, N = given.shape[:2]
        if position_ids is not None:
            position_ids = position_ids.expand(B, N)
        image_mask = None
        # Image tokens are searched for in prompts, not while decoding.
        if pixel_values is not None or (
            image_memory is not None and inputs_embeds is None and N > 1 and past == 0
        ):
            assert input_ids is not None
            image_mask = self.find_image_tokens(input_ids)
        bounds, places = take_bounds(cu_seqlens, kwargs, B, N), None
        if (bounds, cache, attention_mask) == (None,) * 3 and position_ids is not None and N > 1:
            bounds, places = self._find_samples(input_ids, image_mask, position_ids)
        if bounds is not None:
            attention_mask, use_cache = _check_pack(attention_mask, use_cache, cache)
        if position_ids is None:
            position_ids = self._number(given, image_mask, attention_mask, tile_grid, bounds, past)
        if pixel_values is not None:
            assert image_mask is not None
            inputs_embeds, image_memory = self._embed_images(
                input_ids, pixel_values, image_mask, position_ids, tile_grid, inputs_embeds
            )
        elif inputs_embeds is None:
            inputs_embeds = self.embed(input_ids, image_mask, image_memory)
        if bounds is not None and image_memory is not None:
            image_memory = within_samples(image_memory, image_mask, bounds, N)
        read = image_memory
        if past == 0 and in_step(self.training, self.vision_tower):
            read = self._blank_memory(B) if read is None else read
            frozen = torch.is_grad_enabled() and not inputs_embeds.requires_grad
            if frozen and is_sharded(self.vision_tower):
                # FSDP exchanges gradients of a layer when that of its input is known: on all ranks
                # at the same place, or with images earlier than without.
                inputs_embeds = inputs_embeds.detach().requires_grad_()
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            attention_mask=attention_mask,
            image_memory=read,
            use_cache=use_cache,
            query_position_ids=query_position_ids,
            token_counts=token_counts,
            rope_lengths=rope_lengths,
            cu_seqlens=bounds,
            sample_places=places,
            **{CACHE: cache},
            **kwargs,
        )
        output.image_memory = image_memory
        if pixel_values is not None and len(pixel_values) and image_memory is not None:
            media = image_memory.media
            assert media is not None
            media = media.unflatten(0, (len(pixel_values), -1))
            output.image_outputs = BaseModelOutputWithPooling(pooler_output=media)
        return output

    def _check_divided(self, kwargs: dict[str, Any]) -> None:
        """Refuse outputs of which this rank has only a part."""
        partial = {"output_attentions": True, "output_hidden_states": self.stages is not None}
        for name, is_partial in partial.items():
            wanted = kwargs.get(name)
            wanted = getattr(self.config, name, False) if wanted is None else wanted
            if is_partial and wanted:
                refuse_divided(name, self)

    def _find_samples(
        self, input_ids: Tensor | None, image_mask: Tensor | None, position_ids: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Bounds of packed samples, where ids restart; while tracing, positions in the samples."""
        if image_mask is None and input_ids is not None and self.config.image_token_id is not None:
            image_mask = self.find_image_tokens(input_ids)
        begins = find_begins(position_ids, image_mask)
        if torch.compiler.is_compiling():  # the number of samples is unknown
            return None, places_from_begins(begins)
        return find_bounds(begins), None

    def _number(
        self,
        given: Tensor,
        image_mask: Tensor | None,
        attention_mask: Any,
        tile_grid: Any,
        bounds: Tensor | None,
        past: int,
    ) -> Tensor:
        """Position ids [B, N] of ids or embeddings that were given without them."""
        (B, N), device = given.shape[:2], given.device
        if bounds is not None:
            mask = torch.zeros(B, N, dtype=torch.bool, device=device)
            return prompt_positions(
                self,
                mask if image_mask is None else image_mask,
                bounds,
                tile_grid,
                lambda grid: ops.image_tokens(grid, self.config.side, self.config.use_thumbnail),
            )
        if image_mask is not None:
            ones = torch.ones(B, N, dtype=torch.long, device=device)
            mask = ones if attention_mask is None else attention_mask
            return self.prompt_position_ids(image_mask, mask, tile_grid)
        if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -N:]
        return past + torch.arange(N, device=device).expand(B, N)


def _check_keywords(kwargs: dict[str, Any]) -> None:
    if unknown := kwargs.keys() - KEYWORDS:
        raise ValueError(
            f"CoMemo: a forward takes its named arguments and {sorted(KEYWORDS)}, got"
            f" {sorted(unknown)}"
        )


def _check_pack(attention_mask: Any, use_cache: bool | None, cache: Any) -> tuple[None, bool]:
    """Mask and use_cache of packed rows, which have neither padding nor a cache."""
    padded = attention_mask is not None and not bool((torch.as_tensor(attention_mask) == 1).all())
    if padded or use_cache or cache is not None:
        got = "padding in attention_mask" if padded else "use_cache=True or a cache"
        raise ValueError(
            "CoMemo: packed rows (cu_seqlens, cu_seq_lens_q or position_ids that restart) must come"
            f" whole, without padding and without a cache, got {got}"
        )
    return None, False
