"""The image memory: keys and values of an image set, computed once and read by every token."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from comemo_kernels._op import check


@dataclass
class ImageMemory:
    """Keys and values of the images of a batch of prompts, one pair per mixin layer.

    A plain object that the caller owns: it is handed to every forward call, and nothing of it
    stays on a module. All prompts' images lie packed, one after the other, along M.

    Attributes:
        spans: int64 [B, 1, 2] or [B, N, 2], half-open: what each prompt, or each token, may read.
        active: bool [B, 1, 1] or [B, N, 1], False where a prompt has no image at all and passes
            the mixin layers unchanged; None if there is no such prompt.
        media: [M, d] projected image tokens: what keys and values are built from, and what a
            prompt's image tokens are embedded as.
        position_ids: int64 [M], ids of the image tokens in their prompts.
        keys, values: mixin layer index -> [M, H, D]; keys are rotated.
    """

    spans: Tensor
    active: Tensor | None = None
    media: Tensor | None = None
    position_ids: Tensor | None = None
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def from_media(
        cls, media: Tensor, position_ids: Tensor, lengths: list[int] | tuple[int, ...]
    ) -> "ImageMemory":
        """Memory of B prompts whose images lie one after the other in `media`.

        Args:
            media: [M, d] projected image tokens.
            position_ids: [M] ids of the image tokens in their prompts.
            lengths: image tokens of each prompt, 0 for a prompt without images.

        Raises:
            ValueError: lengths that do not sum to M, or ids of another length.
        """
        M = media.shape[0]
        check(
            sum(lengths) == M and position_ids.shape == (M,),
            f"ImageMemory.from_media: media {tuple(media.shape)}, position_ids"
            f" {tuple(position_ids.shape)} and lengths {list(lengths)} must agree on the number"
            " of image tokens",
        )
        ends = torch.tensor(lengths).cumsum(0)
        spans = torch.stack([ends - torch.tensor(lengths), ends], dim=-1)[:, None]  # [B, 1, 2]
        active = None if all(lengths) else (spans[..., 1:] > spans[..., :1]).to(media.device)
        return cls(spans.to(media.device), active, media, position_ids)

    def update(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep the rotated keys and the values [M, H, D] of a mixin layer."""
        self.keys[layer], self.values[layer] = key, value

    def repeat_interleave(self, times: int) -> "ImageMemory":
        """The memory of every prompt `times` over (beams); keys and values are shared."""
        active = None if self.active is None else self.active.repeat_interleave(times, 0)
        return replace(self, spans=self.spans.repeat_interleave(times, 0), active=active)

    def __len__(self) -> int:
        """M, the number of image tokens."""
        tensor = self.media if self.media is not None else next(iter(self.keys.values()), None)
        return 0 if tensor is None else tensor.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(t.nbytes for held in (self.keys, self.values) for t in held.values())


def spans_from_cu_seqlens(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, tokens: int) -> Tensor:
    """Spans of a packed row in which sample i holds tokens [q_i, q_i+1) and memory [k_i, k_i+1).

    Args:
        cu_seqlens_q, cu_seqlens_k: [samples + 1] cumulative lengths, starting at 0.
        tokens: N, the row's length; tokens past the last sample read nothing.

    Returns:
        int64 [1, N, 2].

    Raises:
        ValueError: lengths of different sample counts.
    """
    check(
        cu_seqlens_q.ndim == 1 and cu_seqlens_q.shape == cu_seqlens_k.shape,
        "spans_from_cu_seqlens: cu_seqlens_q and cu_seqlens_k must be [samples + 1], got"
        f" {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}",
    )
    sample = torch.searchsorted(
        cu_seqlens_q.contiguous(), torch.arange(tokens, device=cu_seqlens_q.device), right=True
    )
    bounds = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]]).long()
    return torch.stack([bounds[sample - 1], bounds[sample]], dim=-1)[None]
