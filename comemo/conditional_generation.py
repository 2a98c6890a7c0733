"""CoMemo: a language model that sees each image twice.

Context path: image tokens are part of the sequence. Memory path: before every n-th decoder layer a
mixin layer lets all tokens read the image memory through gated cross-attention.
Source: CoMemo (arXiv:2506.06279). The vision tower is transformers' InternVL and the language model
is made of Llama's layers. The image memory is an argument, never state of a module.

Letters: B prompts, N tokens of a prompt, M tokens of the image memory, H heads, D head
dimension, T tiles, d width of the language model.
"""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils.generic import can_return_tuple

from comemo.chat.published import CoMemoChat
from comemo.config import CoMemoConfig
from comemo.generation import CoMemoGeneration
from comemo.loss import loss_of_states, next_token_loss
from comemo.model import CoMemoModel, CoMemoPreTrainedModel
from comemo.outputs import CACHE, CoMemoOutput, one_cache, warn_old_name
from comemo.weights.folding import FoldsForInference
from comemo.weights.fusable import apply_linear
from comemo_kernels import ImageMemory


class CoMemoForConditionalGeneration(
    CoMemoChat, CoMemoGeneration, FoldsForInference, CoMemoPreTrainedModel, GenerationMixin
):
    """CoMemo with a language modelling head: `generate`, `chat` and the training forward."""

    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: CoMemoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.model = CoMemoModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """See `CoMemoModel.get_image_features`."""
        return self.model.get_image_features(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

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
        labels: Tensor | None = None,
        loss_weights: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        query_position_ids: Tensor | None = None,
        token_counts: Tensor | None = None,
        rope_lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        cache: Any = None,
        **kwargs: Any,
    ) -> CoMemoOutput:
        """One pass over prompts, packed samples or new tokens.

        Args:
            input_ids: [B, N]; prompts of different lengths are padded on the left.
            pixel_values: [T, 3, side, side], the tiles of all images in reading order.
            tile_grid: (cols, rows) of each image; None for original RoPE.
            attention_mask: [B, past + N], 0 at padding.
            position_ids: [B, N]; computed by `config.rope` if None.
            past_key_values, cache: two names of the KV cache, which is that of the self-attention.
            inputs_embeds: [B, N, d] instead of `input_ids`; both only with `pixel_values`, when the
                ids say where images are.
            image_memory: of an earlier call, instead of `pixel_values`; filled on first use.
            labels: [B, N], -100 where there is no loss; shifted here.
            loss_weights: [B, N], weight of each label: loss = sum(w * l) / sum(w).
            num_items_in_batch, shift_labels: see `next_token_loss`.
            skip_logits: compute the loss without the logits of all tokens, which are large, and
                the losses of single labels; see `loss_of_states`.
            use_cache: whether to keep the KV cache and the memory's keys and values.
            logits_to_keep: last positions, or indices, to compute logits for; 0 for all.
            query_position_ids: [B, N], positions of the mixin queries; None for `position_ids`.
            token_counts: [B], tokens so far; derived if None.
            rope_lengths: [B], lengths for dynamic scaling; derived from these tokens and the cache
                if None.
            cu_seqlens: [samples + 1] bounds of packed samples over all rows. transformers' names
                `cu_seq_lens_q` and `cu_seq_lens_k` mean the same, and so do position_ids that
                restart, if there is no mask and no cache.
            kwargs: `shift_labels`, `output_attentions`, `output_hidden_states`, `return_dict`, and
                the arguments of packing.

        Returns:
            `CoMemoOutput` with loss, logits [B, N, vocabulary] or label_losses [B, N], the cache
            by both its names, image_memory.

        Raises:
            ValueError: arguments that exclude each other or do not fit, or an unknown one.
        """
        # Not a named argument: Trainer requires every one whose name contains "label".
        shift_labels = kwargs.pop("shift_labels", None)
        if skip_logits and labels is None and shift_labels is None:
            raise ValueError("CoMemo: skip_logits needs labels or shift_labels")
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            tile_grid=tile_grid,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            image_memory=image_memory,
            use_cache=use_cache,
            query_position_ids=query_position_ids,
            token_counts=token_counts,
            rope_lengths=rope_lengths,
            cu_seqlens=cu_seqlens,
            **{CACHE: one_cache("CoMemo", cache, past_key_values)},
            **kwargs,
        )
        states = output.last_hidden_state
        logits = loss = losses = None
        divided = (loss_weights, shift_labels, num_items_in_batch)
        if skip_logits:
            loss, losses = loss_of_states(states, self.lm_head, labels, *divided)
        else:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = apply_linear(self.lm_head, states[:, keep])
            if labels is not None or shift_labels is not None:
                loss = next_token_loss(logits, labels, *divided)
        return CoMemoOutput(
            loss=loss,
            logits=logits,
            label_losses=losses,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_memory=output.image_memory,
            image_outputs=output.image_outputs,
            **{CACHE: output.cache},
        )
