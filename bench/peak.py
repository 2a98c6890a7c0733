"""A formula for the peak memory of a conversation."""

from typing import Any

import torch

from comemo.chat.session import ChatSession


def reset() -> None:
    """Reset the peak memory of a GPU; that of a process cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def predict(model: Any, session: ChatSession, tiles: int) -> int:
    """Bytes at the peak of an answer.

    Args:
        model: its weights count.
        session: after the answer, with its KV cache and image memory.
        tiles: of new images.

    Returns:
        weights + KV cache + image memory and media + the activations of a chunk of the prefill; or,
        if that is more, weights + the activations of the vision tower and what earlier turns hold.
    """
    report = session.report
    assert report is not None
    weights = sum(p.nbytes for p in model.parameters())
    chunk = min(report.read_tokens, session.prefill_chunk_size or report.read_tokens)
    vision = vision_activations(model, min(tiles, model.config.tiles_at_once), tiles)
    text = text_activations(model, chunk, report.prompt_tokens)
    earlier = session.nbytes if report.read_tokens < report.prompt_tokens else 0
    return weights + max(earlier + vision, session.nbytes + text)


def vision_activations(model: Any, at_once: int, tiles: int) -> int:
    """Bytes in the tower beside its weights: the pixels of all tiles, and for `at_once` of them
    the residual before and after the attention, the normed residual, and the activation."""
    vision, size = model.config.vision_config, model.dtype.itemsize
    side = vision.image_size[0]
    tokens = 1 + (side // vision.patch_size[0]) ** 2
    per_token = 3 * vision.hidden_size + vision.intermediate_size
    return size * (tiles * 3 * side**2 + at_once * tokens * per_token)


def text_activations(model: Any, chunk: int, prompt: int) -> int:
    """Bytes in a decoder layer beside weights and KV cache: for each token of the chunk its
    embedding, the residual before and after the attention, the normed residual without and with
    its weight, and three rows of the widest GEMM, on a CPU two; for a chunk with a past also the
    mask and repeated keys and values of the whole prompt."""
    text, size = model.config.text_config, model.dtype.itemsize
    wide = 2 if model.device.type == "cpu" else 3
    elements = chunk * (5 * text.hidden_size + wide * text.intermediate_size)
    if 1 < chunk < prompt:
        elements += chunk * prompt + 2 * prompt * text.num_attention_heads * text.head_dim
    return size * elements
