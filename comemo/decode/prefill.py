"""Reading a prompt into the cache, in pieces of bounded memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def read_prompt(
    model: Any,
    embed: Callable[[int, int], Tensor],
    position_ids: Tensor,
    cache: Any,
    *,
    start: int = 0,
    chunk: int | None = None,
    attention_mask: Tensor | None = None,
    token_counts: Tensor | None = None,
    memory: Callable[[int, int], Any] = lambda first, last: None,
) -> Any:
    """Run a model over a prompt's tokens from `start` on, as if over all of them at once.

    Args:
        model: a `CoMemoForConditionalGeneration`.
        embed: embeddings [B, n, d] of the tokens from one index to another.
        position_ids: [B, N] of the whole prompt.
        cache: of the first `start` tokens; filled.
        start: tokens that the cache holds.
        chunk: tokens of a piece, None for all at once: what lies between two layers is as large.
        attention_mask: [B, N], 0 at padding; None for prompts without any.
        token_counts: [B], tokens of each prompt; None for N.
        memory: the image memory as the tokens from one index to another read it.

    Returns:
        What the model returned for the last piece, with the logits of the last token.

    Raises:
        ValueError: no token to read, or a chunk below 1.
    """
    B, N = position_ids.shape
    size = N - start if chunk is None else chunk
    if size < 1 or start >= N:
        raise ValueError(
            f"read_prompt: chunk and the tokens behind start must be positive, got {chunk} and"
            f" {N} - {start}"
        )
    if token_counts is None:
        token_counts = torch.full((B,), N, device=position_ids.device)
    # All pieces share the angles of the whole prompt.
    lengths = model.model.language_model.rope_lengths(position_ids, token_counts)
    output = None
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
