"""Images in a model of your own: `python examples/memory_in_another_model.py`.

Layers of gated cross-attention from `comemo_kernels.nn` read one image memory, which is built once.
They need neither `comemo` nor transformers.
"""

import torch

from comemo_kernels import ImageMemory, image_position_ids
from comemo_kernels.nn import GatedCrossAttention, RotaryDHR, TileProjector, fill_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    projector = TileProjector(vision_dim=32, dim=128, device=DEVICE)
    rotary = RotaryDHR(head_dim=64, max_positions=4096)
    sizes = {"num_heads": 4, "head_dim": 64, "intermediate_size": 512, "device": DEVICE}
    layers = [GatedCrossAttention(256, 128, layer_idx=i, **sizes) for i in range(2)]
    for layer in layers:  # a new layer is the identity
        layer.attn_gate.fill_(0.5)
        layer.mlp_gate.fill_(0.5)

    # Vision tokens of an image of 2 x 1 tiles and its thumbnail: 768 image tokens.
    media = projector(torch.randn(3, 1 + 32 * 32, 32, device=DEVICE)).flatten(0, 1)
    ids = image_position_ids((2, 1))
    memory = ImageMemory.from_media(media, ids, [len(ids)], table=rotary.table(DEVICE))
    fill_memory(layers, memory)  # keys and values of both layers, in one launch

    # Two prompts share the memory; the image begins at id 10 in one and at id 40 in the other.
    starts = torch.tensor([[10], [40]], device=DEVICE)
    memory = memory.reading(memory.spans.expand(2, -1, -1), starts)
    x = torch.randn(2, 5, 256, device=DEVICE)
    positions = starts + 256 + torch.arange(5, device=DEVICE)
    for layer in layers:
        x = layer(x, memory, positions)
    print(
        f"{len(memory)} image tokens, {memory.nbytes:,} bytes of keys and values, output", x.shape
    )


if __name__ == "__main__":
    main()
