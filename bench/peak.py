"""What a conversation needs of memory, by a formula."""

from typing import Any

import torch

from comemo.chat.session import ChatSession


def reset() -> None:
    """Forget the largest memory of a GPU so far; that of a process cannot be forgotten."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def predict(model: Any, session: ChatSession, tiles: int) -> int:
    """Bytes at the peak of an answer.

    Args:
        model: whose weights count.
        session: behind the answer: cache and memory are what it holds then.
        tiles: of new pictures.

    Returns:
        weights + cache + image memory and media + the larger of what the vision tower and a piece
        of the prompt need for a moment.
    """
    report = session.report
    assert report is not None
    weights = sum(p.nbytes for p in model.parameters())
    piece = min(report.read_tokens, session.prefill_chunk_size or report.read_tokens)
    seeing = moment_of_vision(model, min(tiles, model.config.tiles_at_once), tiles)
    reading = moment_of_reading(model, piece, report.prompt_tokens)
    return weights + session.nbytes + max(seeing, reading)


def moment_of_vision(model: Any, at_once: int, tiles: int) -> int:
    """Bytes that the tower holds beside its weights: pixels of all tiles, and of those at once
    residual, normed residual and both sides of the activation."""
    vision, size = model.config.vision_config, model.dtype.itemsize
    side = vision.image_size[0]
    tokens = 1 + (side // vision.patch_size[0]) ** 2
    held = 2 * vision.hidden_size + 2 * vision.intermediate_size
    return size * (tiles * 3 * side**2 + at_once * tokens * held)


def moment_of_reading(model: Any, piece: int, prompt: int) -> int:
    """Bytes that a layer holds beside weights and cache: for each token of the piece embeddings,
    residuals before and behind the attention, normed residual before and after it is weighted, and
    three rows of the widest product; a mask and repeated keys and values of the whole prompt where
    a piece has a past."""
    text, size = model.config.text_config, model.dtype.itemsize
    held = piece * (5 * text.hidden_size + 3 * text.intermediate_size)
    if 1 < piece < prompt:
        held += piece * prompt + 2 * prompt * text.num_attention_heads * text.head_dim
    return size * held
