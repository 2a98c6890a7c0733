"""The image memory under torch.compile and torch.export, without a sync.

A trace knows shapes, not values. How many image tokens a prompt has, and where they are, stays on
the device, and nothing is checked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from comemo_kernels import ImageMemory


def traced_memory(
    media: Tensor,
    image_mask: Tensor,
    position_ids: Tensor,
    sizes: Sequence[int] | None,
    absolute: bool,
) -> ImageMemory:
    """`ImageMemory.from_media` for a trace: prompts [B, N], images in reading order.

    Args:
        media: [M, d].
        image_mask: bool [B, N], True at M tokens.
        position_ids: [B, N].
        sizes: tokens of each image; None for one image.
        absolute: rotate keys by `position_ids`, as published.
    """
    M, device = len(media), media.device
    rows = torch.argsort(~image_mask.flatten(), stable=True)[:M]
    ids = position_ids.flatten()[rows].to(device)
    sizes = (M,) if sizes is None else tuple(sizes)
    starts = torch.tensor((0, *sizes[:-1]), device=device).cumsum(0)
    biases = ids[starts]
    if not absolute:
        ids = ids - biases.repeat_interleave(torch.tensor(sizes, device=device), output_size=M)
    counts = image_mask.sum(1).to(device)
    ends = counts.cumsum(0)
    return ImageMemory(
        spans=torch.stack([ends - counts, ends], -1)[:, None],
        active=(counts > 0)[:, None, None],
        media=media,
        ids=ids.int(),
        sizes=sizes,
        starts=starts.int(),
        biases=biases.int()[None],
        absolute=absolute,
    )


def with_media(embeds: Tensor, image_mask: Tensor, memory: ImageMemory) -> Tensor:
    """Embeddings [B, N, d] with the memory's media at image tokens."""
    media = memory.media
    assert media is not None
    return embeds.masked_scatter(image_mask[..., None], media.to(embeds.device, embeds.dtype))
