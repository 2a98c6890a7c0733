"""Prefill: a prompt is read into the KV cache, in chunks that bound memory.

Letters: B prompts, N tokens of a prompt, d width of the language model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from comemo.decode.interface import GeneratingModel
from comemo.outputs import CoMemoOutput
from comemo_kernels import ImageMemory


def _no_memory(first: int, last: int) -> None:
    return None


@torch.no_grad()
def prefill(
    model: GeneratingModel,
    embed: Callable[[int, int], Tensor],
    position_ids: Tensor,
    cache: Any,
    *,
    start: int = 0,
    chunk: int | None = None,
    attention_mask: Tensor | None = None,
    token_counts: Tensor | None = None,
    memory: Callable[[int, int], ImageMemory | None] = _no_memory,
) -> CoMemoOutput:
    """Run the model over the tokens of prompts from `start` on. Results are those of one pass.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        embed: returns the embeddings [B, last - first, d] of tokens first to last.
        position_ids: [B, N] of whole prompts.
        cache: a KV cache that holds the first `start` tokens; filled.
        start: tokens in the cache.
        chunk: tokens of one pass, None for all; activations grow with it.
        attention_mask: [B, N], 0 at padding; None without padding.
        token_counts: [B], tokens of each prompt; None for N.
        memory: returns the image memory as tokens first to last read it.

    Returns:
        The output of the last pass, with the logits [B, 1, V] of the last token.

    Raises:
        ValueError: no token to read, or a chunk below 1.
    """
    B, N = position_ids.shape
    size = N - start if chunk is None else chunk
    if size < 1 or start >= N:
        raise ValueError(
            f"prefill: chunk and the tokens after start must be positive, got {chunk} and"
            f" {N} - {start}"
        )
    if token_counts is None:
        token_counts = torch.full((B,), N, device=position_ids.device)
    # All chunks use the angles of the whole prompt.
    lengths = model.model.rope_lengths(position_ids, token_counts)
    for first in range(start, N, size):
        last = min(first + size, N)
        output = model(
            inputs_embeds=embed(first, last),
            position_ids=position_ids[:, first:last],
            attention_mask=None if attention_mask is None else attention_mask[:, :last],
            cache=cache,
            image_memory=memory(first, last),
            rope_lengths=lengths,
            use_cache=True,
            logits_to_keep=1,
        )
    return output
