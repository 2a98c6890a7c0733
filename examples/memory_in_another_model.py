"""The image memory in a model of your own: `python examples/memory_in_another_model.py`.

A block of gated cross-attention and a gated feed-forward network, written with the operations of
`comemo_kernels`. It needs neither `comemo` nor transformers.

Letters: B prompts, N tokens, M image tokens, H heads, D head dimension, d width.
"""

import torch
from torch import Tensor, nn

from comemo_kernels import (
    ImageMemory,
    append_images,
    attend_spans,
    distance_table,
    gated_residual,
    image_position_ids,
    image_tokens,
    norm_linear,
    norm_swiglu,
)

HEADS, HEAD_DIM, WIDTH, INNER = 4, 64, 256, 512
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def weight(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) / columns**0.5)


class ImageBlock(nn.Module):
    """x + attention over the image memory, then x + feed-forward network; both gated."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.Parameter(torch.ones(WIDTH))
        self.mlp_norm = nn.Parameter(torch.ones(WIDTH))
        self.q_weight = weight(HEADS * HEAD_DIM, WIDTH)
        self.kv_weight = weight(2 * HEADS * HEAD_DIM, WIDTH)  # rows of keys first
        self.out_weight = weight(WIDTH, HEADS * HEAD_DIM)
        self.gate_weight, self.up_weight = weight(INNER, WIDTH), weight(INNER, WIDTH)
        self.down_weight = weight(WIDTH, INNER)
        self.attention_gate = nn.Parameter(torch.full((1,), 0.5))
        self.mlp_gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x: Tensor, memory: ImageMemory, position_ids: Tensor) -> Tensor:
        """x [B, N, d] and position_ids [B, N] to [B, N, d]."""
        q = norm_linear(x, self.attention_norm, self.q_weight).unflatten(-1, (HEADS, HEAD_DIM))
        keys, values = memory.keys[self.layer], memory.values[self.layer]  # [M, H, D]
        read = attend_spans(q, keys, values, memory.spans, memory.rotation(position_ids))
        x = gated_residual(x, read.flatten(-2), self.out_weight, self.attention_gate)
        inner = norm_swiglu(x, self.mlp_norm, self.gate_weight, self.up_weight)
        return gated_residual(x, inner, self.down_weight, self.mlp_gate)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList(ImageBlock(layer) for layer in range(2)).to(DEVICE)

    # The media of an image of 2 x 1 tiles and a thumbnail: 768 projected image tokens.
    grid = (2, 1)
    M = image_tokens(grid)
    media = torch.randn(M, WIDTH, device=DEVICE)
    table = distance_table(HEAD_DIM, 1e4, 4096, DEVICE)
    memory = ImageMemory.allocate(M, [0, 1], HEADS, HEAD_DIM, table, torch.float32)
    kv_weights = [block.kv_weight for block in blocks]
    norms = [block.attention_norm for block in blocks]
    append_images(memory, media, image_position_ids(grid), [M], kv_weights, norms)

    # Two prompts share the memory; the image begins at id 10 in one and at id 40 in the other.
    spans = torch.tensor([[[0, M]], [[0, M]]], device=DEVICE)
    memory = memory.reading(spans, torch.tensor([[10], [40]], device=DEVICE))
    x = torch.randn(2, 5, WIDTH, device=DEVICE)
    position_ids = torch.tensor([[266], [296]], device=DEVICE) + torch.arange(5, device=DEVICE)
    for block in blocks:
        x = block(x, memory, position_ids)
    print(f"{M} image tokens, {memory.nbytes:,} bytes of keys and values, output {tuple(x.shape)}")


if __name__ == "__main__":
    main()
