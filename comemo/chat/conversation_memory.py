"""The image memory of a conversation: extended by new images, read by tokens that see some of them.

Letters: n tokens, M tokens of the image memory.
"""

from dataclasses import replace

import torch
from torch import Tensor

import comemo_kernels as ops
from comemo.chat.conversation import Conversation
from comemo.chat.driver import Prompt
from comemo.chat.transcript import Transcript
from comemo.memory.protocols import KeepsMemories
from comemo.model import CoMemoModel
from comemo_kernels import ImageMemory


def extend_memory(
    memory: ImageMemory | None,
    conversation: Conversation,
    prompt: Prompt,
    model: CoMemoModel,
    store: KeepsMemories | None,
) -> ImageMemory | None:
    """The memory of all images; only new images are computed.

    Args:
        memory: of earlier images, None if there are none.
        conversation: whose new images still have their pixels.
        prompt: of the conversation, on the model's device.
        model: that builds the memory.
        store: a `MemoryStore` or None.
    """
    new = [image for image in conversation.images if image.pixel_values is not None]
    tiles = [image.pixel_values for image in new if image.pixel_values is not None]
    if not new:
        return memory
    known = sum(image.tokens for image in conversation.images[: -len(new)])
    new_tokens = prompt.image_mask & (prompt.image_mask.long().cumsum(1) > known)
    pixel_values = torch.cat([t.to(tiles[0].device) for t in tiles])
    grids = [image.grid for image in new]
    added = model.build_image_memory(pixel_values, new_tokens, prompt.position_ids, grids, store)
    model.build_memory(added)
    return added if memory is None else _join(memory, added)


def _join(memory: ImageMemory, added: ImageMemory) -> ImageMemory:
    """Both concatenated; the layers rebuild keys and values if one of them has none."""
    if memory.keys.keys() != added.keys.keys():
        memory, added = replace(memory, keys={}, values={}), replace(added, keys={}, values={})
    return ops.join_images([memory, added])


def place_memory(
    memory: ImageMemory | None, transcript: Transcript, device: torch.device
) -> ImageMemory | None:
    """The memory with its images at their positions in a prompt."""
    if memory is None:
        return None
    spans = torch.tensor([[[0, len(memory)]]], device=device)
    biases = torch.tensor([position for _, position in transcript.images], device=device)
    return memory.reading(spans, None if memory.absolute else biases)


def memory_read_by(
    visible: Tensor, memory: ImageMemory | None, device: torch.device
) -> ImageMemory | None:
    """The memory as tokens read it.

    Args:
        visible: [n], how many images each token reads.
        memory: of all images.
        device: of the model.
    """
    if memory is None:
        return None
    borders = torch.tensor((0, *memory.sizes)).cumsum(0)
    if bool((visible == visible[0]).all()):
        visible = visible[:1]
    ends = borders[visible]
    spans = torch.stack([torch.zeros_like(ends), ends], -1)[None]  # [1, n or 1, 2]
    return memory.reading(spans.to(device))
