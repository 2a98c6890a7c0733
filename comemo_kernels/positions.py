"""RoPE-DHR position ids of whole prompts in one launch: the kernel and the operation.

    id = text + S*S * images + (cell of the thumbnail, of an image token)

where `text` and `images` count the text tokens and complete images ahead in the prompt. The number
of image tokens ahead in all prompts tells which image a token belongs to, so that a program carries
only two counts from block to block.
Traffic: a program reads the image masks of all previous prompts, B * B * N / 2 bytes in total, and
its own two masks, and writes 8 bytes per token.
Source: CoMemo (arXiv:2506.06279).

Letters: B prompts, N tokens of a prompt, I images, S tokens along a tile's side.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from comemo_kernels import reference
from comemo_kernels._blocks import find_image, thumbnail_cell
from comemo_kernels._op import Kernel, documented, jit, on_triton, register
from comemo_kernels.grids import Grid
from comemo_kernels.reference.positions import pack_prompt_grids

# --- kernel ---


@triton.jit
def _images_ahead(grids_ptr, seen, num_images, num_steps):
    """Image at or ahead of a token with `seen` image tokens ahead, and that image's offset."""
    image = tl.maximum(find_image(grids_ptr, seen, num_images, num_steps), 0)
    offset = tl.load(grids_ptr + image * 4, mask=image < num_images, other=0)
    return image, offset


@jit
def _rope_dhr_kernel(
    ids_ptr,  # [B, N], contiguous
    torn_ptr,  # [B], 1 where images do not fit the prompt
    image_ptr,  # [B, N] of 0 and 1, contiguous
    attention_ptr,  # [B, N], contiguous
    grids_ptr,  # [I, 4], contiguous, without gaps between images
    num_tokens,  # N
    num_images,
    num_steps,  # bit length of num_images
    num_image_tokens,  # of all grids
    SIDE: tl.constexpr,
    COLUMN: tl.constexpr,
    THUMBNAIL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes the ids of one prompt."""
    prompt = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)
    ahead = prompt * num_tokens
    seen_ahead = tl.zeros([], tl.int32)
    for start in range(0, ahead, BLOCK_N):
        is_image = tl.load(image_ptr + start + offs, mask=start + offs < ahead, other=0)
        seen_ahead += tl.sum(is_image.to(tl.int32))
    first, begin = _images_ahead(grids_ptr, seen_ahead, num_images, num_steps)
    images_ahead = first + (seen_ahead > begin).to(tl.int32)

    seen, text, torn = seen_ahead, tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in range(0, num_tokens, BLOCK_N):
        token = start + offs
        mask = token < num_tokens
        place = ahead + token
        is_image = tl.load(image_ptr + place, mask=mask, other=0).to(tl.int32)
        follows = tl.load(image_ptr + place - 1, mask=mask & (token > 0), other=0).to(tl.int32)
        attended = tl.load(attention_ptr + place, mask=mask, other=0) != 0
        is_text = (attended & (is_image == 0)).to(tl.int32)
        seen_before = seen + tl.cumsum(is_image, 0) - is_image
        text_before = text + tl.cumsum(is_text, 0) - is_text
        image, offset = _images_ahead(grids_ptr, seen_before, num_images, num_steps)
        cols = tl.load(grids_ptr + image * 4 + 2, mask=image < num_images, other=0)
        rows = tl.load(grids_ptr + image * 4 + 3, mask=image < num_images, other=0)
        in_image = seen_before - offset
        complete = image + ((is_image == 0) & (in_image > 0)).to(tl.int32)
        cell = thumbnail_cell(in_image, cols, rows, SIDE, COLUMN)
        ids = text_before + SIDE * SIDE * (complete - images_ahead) + is_image * cell
        tl.store(ids_ptr + place, ((is_text + is_image) * ids).to(tl.int64), mask=mask)
        broken = ((in_image > 0) & (follows == 0)) | (seen_before >= num_image_tokens)
        torn = tl.maximum(torn, tl.max(is_image * broken.to(tl.int32)))
        seen += tl.sum(is_image)
        text += tl.sum(is_text)
    if prompt == tl.num_programs(0) - 1:
        torn = tl.maximum(torn, (seen != num_image_tokens).to(tl.int32))
    tl.store(torn_ptr + prompt, torn)


rope_dhr_kernel = Kernel(
    _rope_dhr_kernel,
    [{"BLOCK_N": 512, "num_warps": 4}, {"BLOCK_N": 1024, "num_warps": 4}],
)

# --- operator ---


def _launch(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Tensor,
    end: int,
    side: int,
    column: bool,
    thumbnail: bool,
) -> tuple[Tensor, Tensor]:
    ids, torn = _fake(image_mask)
    image_mask, attention_mask = (
        mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.contiguous()
        for mask in (image_mask, attention_mask)
    )
    B, N = image_mask.shape
    images = len(grids)
    tensors = (ids, torn, image_mask, attention_mask, grids)
    numbers = (N, images, images.bit_length(), end)
    rope_dhr_kernel.launch(B, *tensors, *numbers, side, column, thumbnail)
    return ids, torn


def _fake(image_mask: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    ids = torch.empty(image_mask.shape, dtype=torch.int64, device=image_mask.device)
    return ids, torch.empty(image_mask.shape[:1], dtype=torch.int32, device=image_mask.device)


_rope_dhr = register(
    "rope_dhr(Tensor image_mask, Tensor attention_mask, Tensor grids, int end, int side,"
    " bool column, bool thumbnail) -> (Tensor, Tensor)",
    _launch,
    _fake,
)

# --- public ---


@documented(reference.rope_dhr_positions)
def rope_dhr_positions(
    image_mask: Tensor,
    attention_mask: Tensor,
    grids: Sequence[Grid] | Tensor,
    side: int = 16,
    tile_order: str = "row",
    thumbnail: bool = True,
    validate: bool = True,
) -> Tensor:
    arguments = (image_mask, attention_mask, grids, side, tile_order, thumbnail)
    if not on_triton(image_mask):
        return reference.rope_dhr_positions(*arguments, validate)
    packed = pack_prompt_grids(*arguments)
    column = tile_order == "column"
    ids, torn = _rope_dhr(
        image_mask, attention_mask, packed.table, packed.end, side, column, thumbnail
    )
    if validate and (not len(ids) or bool(torn.any())):
        reference.rope_dhr_positions(*arguments)  # raises the error
        assert not len(ids), "rope_dhr_positions: the kernel rejects what its reference accepts"
    return ids
