"""The published model: vision tower, projector, language model with mixin layers."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bench.published_model.internlm2 import InternLM2Config, InternLM2ForCausalLM
from bench.published_model.mixin import LMMixin, extend_instance
from bench.published_model.vision import InternVisionModel
from comemo_kernels.patching.published_generate import view_of

MIXIN = {
    "language_dim": 2048,
    "vision_dim": 2048,
    "head_dim": 128,
    "num_heads": 16,
    "intermediate_size": 8192,
    "mixin_every_n_layers": 4,
}
VISION = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "patch_size": 14,
    "image_size": 448,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}


class CoMemoChatConfig(PretrainedConfig):
    """From the dictionaries of a published `config.json`; defaults are those of CoMemo-2B."""

    model_type = "comemo_chat"
    has_no_defaults_at_init = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.llm_config = InternLM2Config(**settings.get("llm_config", {}))
        self.mixin_config = SimpleNamespace(**(MIXIN | settings.get("mixin_config", {})))
        self.vision_config = SimpleNamespace(**(VISION | settings.get("vision_config", {})))
        self.select_layer = settings.get("select_layer", -1)
        self.ps_version = settings.get("ps_version", "v2")
        self.downsample_ratio = settings.get("downsample_ratio", 0.5)


def repair_generate(model: "CoMemoChatModel") -> "CoMemoChatModel":
    """Give the language model a `generate` on releases whose models do not inherit it.

    The layers stay as published; without this nothing could be compared there.
    """
    language_model = model.language_model
    vars(language_model).update(vars(view_of(language_model)))
    language_model.__class__ = type(view_of(language_model))
    return model


class CoMemoChatModel(PreTrainedModel):
    config_class = CoMemoChatConfig
    main_input_name = "pixel_values"

    def __init__(self, config: CoMemoChatConfig) -> None:
        super().__init__(config)
        vision, llm = config.vision_config, config.llm_config
        ratio = self.downsample_ratio = config.downsample_ratio
        self.select_layer, self.ps_version = config.select_layer, config.ps_version
        self.num_image_token = int((vision.image_size // vision.patch_size) ** 2 * ratio**2)
        self.vision_model = InternVisionModel(vision)
        self.language_model: Any = InternLM2ForCausalLM(llm)
        folded = vision.hidden_size * int(1 / ratio) ** 2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(folded),
            nn.Linear(folded, llm.hidden_size),
            nn.GELU(),
            nn.Linear(llm.hidden_size, llm.hidden_size),
        )
        self.img_context_token_id: int | None = None
        self.mixin_every_n_layers = config.mixin_config.mixin_every_n_layers
        extend_instance(self.language_model, LMMixin)
        self.language_model.init_mixin(config.mixin_config)

    def _condition_attn_mask_and_pos_ids(
        self,
        attn_mask: Tensor | None,
        cross_attn_media_position_ids: Tensor | None,
        cross_attn_text_position_ids: Tensor | None,
        text_time: Tensor | None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
    ) -> None:
        for layer in self.language_model._get_decoder_layers():
            block = layer.gated_cross_attn_layer
            if block is not None:
                block.cross_attn.media_attn_mask = attn_mask
                block.cross_attn_media_position_ids = cross_attn_media_position_ids
                block.cross_attn_text_position_ids = cross_attn_text_position_ids
                block.text_time = text_time
                block.cross_attn.cu_seqlens_q = cu_seqlens_q
                block.cross_attn.cu_seqlens_k = cu_seqlens_k

    def _condition_vision(self, vision_x: Tensor) -> None:
        for index, layer in enumerate(self.language_model._get_decoder_layers()):
            if (index + 1) % self.mixin_every_n_layers == 0:
                layer.condition_vis_x(vision_x)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        image_flags: Tensor | None = None,
        seq_imgs: Tensor | None = None,
        cross_attention_media_position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Training: packed rows, `attention_mask` [1, S + 1] bounds of the samples.

        The language model gets no padding mask here; the published packed training patches it.
        """
        assert image_flags is not None
        assert seq_imgs is not None
        for layer in self.language_model._get_decoder_layers():
            layer.condition_use_cached_media(False)
        embeds = self.language_model.get_input_embeddings()(input_ids).clone()
        features = self.extract_feature(pixel_values)
        self._condition_vision(features.flatten(0, 1)[None])
        used = features[image_flags.flatten() == 1].flatten(0, 1)
        embeds[input_ids == self.img_context_token_id] = used.to(embeds.dtype)
        counts = attention_mask[0].diff().tolist()
        tokens = (seq_imgs[0] * features.shape[1]).tolist()
        mask = torch.zeros(sum(counts), sum(tokens), dtype=torch.bool, device=input_ids.device)
        row = column = 0
        for count, length in zip(counts, tokens, strict=True):
            mask[row : row + count, column : column + length] = True
            row, column = row + count, column + length
        self._condition_attn_mask_and_pos_ids(
            mask[None, None], cross_attention_media_position_ids, position_ids, None
        )
        return self.language_model(
            inputs_embeds=embeds, position_ids=position_ids, use_cache=False, **kwargs
        )

    def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
        n, w, h, c = x.shape
        wide, narrow = int(h * scale_factor), int(w * scale_factor)
        x = x.view(n, w, wide, int(c / scale_factor)).permute(0, 2, 1, 3).contiguous()
        x = x.view(n, wide, narrow, int(c / scale_factor**2))
        return x if self.ps_version == "v1" else x.permute(0, 2, 1, 3).contiguous()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        last = self.select_layer == -1
        out = self.vision_model(
            pixel_values=pixel_values, output_hidden_states=not last, return_dict=True
        )
        tokens = out.last_hidden_state if last else out.hidden_states[self.select_layer]
        tokens = tokens[:, 1:, :]
        side = int(tokens.shape[1] ** 0.5)
        tokens = tokens.reshape(len(tokens), side, side, -1)
        return self.mlp1(self.pixel_shuffle(tokens, self.downsample_ratio).flatten(1, 2))

    @torch.no_grad()
    def generate(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        visual_features: Tensor | None = None,
        generation_config: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_patches_list: Any = None,
        position_ids: Tensor | None = None,
        cross_attention_media_position_ids: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        assert self.img_context_token_id is not None
        assert input_ids is not None
        language = self.language_model
        for layer in language._get_decoder_layers():
            layer.condition_use_cached_media(True)
        embeds = language.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = visual_features
            if features is None:
                features = self.extract_feature(pixel_values)
            language._use_cached_vision_x = True
            self._condition_vision(features.flatten(0, 1)[None])
            selected = input_ids == self.img_context_token_id
            assert selected.sum() != 0
            embeds[selected] = features.flatten(0, 1).to(embeds.device)
        self._condition_attn_mask_and_pos_ids(
            None, cross_attention_media_position_ids, position_ids, None
        )
        outputs = language.generate(
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            generation_config=generation_config,
            output_hidden_states=output_hidden_states,
            use_cache=True,
            position_ids=position_ids,
            **generate_kwargs,
        )
        language.clear_conditioned_layers()
        language._use_cached_vision_x = False
        for layer in language._get_decoder_layers():
            layer.condition_use_cached_media(False)
        return outputs
