"""The published model in packed training: its forward, its attention by samples, its loss."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.models import made_on
from bench.published_model import internlm2
from bench.published_model.chat_model import CoMemoChatConfig, CoMemoChatModel
from bench.published_model.internlm2 import InternLM2Attention
from bench.published_model.parts import rotate
from bench.recipe_batch import tiles_of_samples


class PackedAttention(InternLM2Attention):
    """Sample by sample; the published training calls flash attention of packed rows here."""

    bounds: tuple[int, ...] = ()

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, position_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        groups = self.num_key_value_groups
        qkv = self.wqkv(hidden_states).unflatten(-1, (-1, groups + 2, self.head_dim))
        q = qkv[..., :groups, :].flatten(2, 3).transpose(1, 2)  # [1, H, N, D]
        k, v = (qkv[..., i, :].transpose(1, 2) for i in (-2, -1))  # [1, G, N, D]
        cos, sin = self.rotary_emb(v, seq_len=hidden_states.shape[1])
        q, k = (rotate(t, cos, sin, position_ids) for t in (q, k))
        counts = [b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False)]
        parts = zip(*(t.to(v.dtype).split(counts, 2) for t in (q, k, v)), strict=True)
        attend: Any = F.scaled_dot_product_attention
        out = torch.cat([attend(*part, is_causal=True, enable_gqa=True) for part in parts], 2)
        return self.wo(out.transpose(1, 2).flatten(2)), None, None


class PublishedStep:
    """Our weights in the published model, and its loss of a pack.

    Args:
        config: a published config, as a dictionary.
        weights: published name -> weight; the model takes them as they are.
        batch: of `recipe_batch.draw_batch`, on the device.
        position_ids: [1, N].
        image_id: id of image tokens.
    """

    def __init__(
        self,
        config: dict[str, Any],
        weights: dict[str, Tensor],
        batch: dict[str, Any],
        position_ids: Tensor,
        image_id: int,
    ) -> None:
        device = batch["input_ids"].device
        with made_on(str(device), torch.float32):
            self.model = CoMemoChatModel(CoMemoChatConfig(**config))
        self.model.load_state_dict(weights, strict=True, assign=True)
        self.model.img_context_token_id = image_id
        bounds = batch["cu_seqlens"]
        for layer in self.model.language_model._get_decoder_layers():
            attention = layer.decoder_layer.attention
            attention.__class__, attention.bounds = PackedAttention, tuple(bounds)
        counts = tiles_of_samples(batch, self.model.num_image_token, image_id)
        media_ids = position_ids[batch["input_ids"] == image_id][None]
        self.inputs = {
            "input_ids": batch["input_ids"],
            "pixel_values": batch["pixel_values"],
            "position_ids": position_ids,
            "attention_mask": torch.tensor([bounds], device=device),
            "seq_imgs": torch.tensor([counts], device=device),
            "image_flags": torch.ones(sum(counts), dtype=torch.long, device=device),
            "cross_attention_media_position_ids": media_ids,
        }
        keys = [0, *itertools.accumulate(n * self.model.num_image_token for n in counts)]
        self.keys = torch.tensor([keys], device=device)
        self.labels = batch["labels"][:, 1:].flatten()
        self.weights = batch["loss_weights"][:, 1:].flatten()

    def loss(self) -> Tensor:
        """sum(w * l) / sum(w), from the logits of all tokens in float32."""
        with self._without_mask(), self._by_samples():
            logits = self.model(**self.inputs).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.labels, reduction="none")
        return (losses * self.weights).sum() / self.weights.sum()

    @contextlib.contextmanager
    def _without_mask(self) -> Iterator[None]:
        """Packed training has no mask of all pairs of tokens."""
        made, internlm2.causal_mask = internlm2.causal_mask, lambda *_: None
        try:
            yield
        finally:
            internlm2.causal_mask = made

    @contextlib.contextmanager
    def _by_samples(self) -> Iterator[None]:
        """Cross-attention of each sample with its own images, without a mask of all pairs."""
        model: Any = self.model
        condition = model._condition_attn_mask_and_pos_ids

        def conditioned(mask: Any, *args: Any) -> None:
            condition(None, *args, self.inputs["attention_mask"], self.keys)

        model._condition_attn_mask_and_pos_ids = conditioned
        try:
            yield
        finally:
            del model._condition_attn_mask_and_pos_ids
