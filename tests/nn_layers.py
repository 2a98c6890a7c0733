"""Layers of `comemo_kernels.nn`, what they read, and the same computed in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from comemo_kernels import ImageMemory
from comemo_kernels.nn import GatedCrossAttention, RotaryDHR

SIZES = {"dim": 64, "media_dim": 48, "num_heads": 4, "head_dim": 16, "intermediate_size": 80}
ROTARY = RotaryDHR(16, theta=1e4, max_positions=64, side=2)
B, N = 2, 20


def make_layer(device, dtype=torch.float32, **options):
    """A layer with random norms and gates, always the same."""
    torch.manual_seed(1 + options.get("layer_idx", 0))
    layer = GatedCrossAttention(**SIZES | options)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if "norm" in name:
                weight.normal_(1.0, 0.3)
            elif "gate" in name and weight.shape == (1,):
                weight.fill_(0.8)
    return layer.to(device, dtype)


def prompts(device):
    """Ids [2, 20] and the mask of the image tokens: 12 in the first prompt, 4 in the second."""
    mask = torch.zeros(B, N, dtype=torch.bool, device=device)
    mask[0, 3:15] = mask[1, 1:5] = True
    ids = ROTARY.position_ids(mask, torch.ones_like(mask), [(2, 1), (1, 1)])
    return ids, mask


def make_memory(media, **change):
    """A memory of two prompts with one image each, 12 and 4 tokens."""
    ids, mask = prompts(media.device)
    lengths = change.pop("lengths", [12, 4])
    table = ROTARY.table(media.device)
    memory = ImageMemory.from_media(media, ids[mask], lengths, table=table)
    for name, value in change.items():
        setattr(memory, name, value)
    return memory


def randoms(*shape, device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def in_pytorch(layer, x, media, spans=None, ids=None, positions=None):
    """What a layer computes for all media [M, media_dim], in the dtype of its weights.

    ids [B, M] are those of the media in each prompt.
    """
    exact = torch.promote_types(x.dtype, torch.float32)

    def norm(module, x):
        wide = x.to(exact)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps)
        return module.weight * wide.to(x.dtype)

    def rotate(x, places):  # [B, L, H, D]
        if places is None:
            return x
        cos, sin = (t.to(exact)[places][:, :, None] for t in ROTARY.table(x.device))
        x1, x2 = x.to(exact).chunk(2, -1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)

    H, G, D = layer.num_heads, layer.num_key_value_heads, layer.head_dim
    media_norm = layer.attn_norm if layer.media_norm is None else layer.media_norm
    q = layer.q_proj(norm(layer.attn_norm, x)).unflatten(-1, (H, D))
    kv = layer.kv_proj(norm(media_norm, media)).unflatten(-1, (2, G, D)).expand(len(x), -1, 2, G, D)
    k, v = (t.repeat_interleave(H // G, 2) for t in kv.unbind(2))  # [B, M, H, D]
    q, k = rotate(q, positions), rotate(k, ids)
    scores = torch.einsum("bnhd,bmhd->bhnm", q.to(exact), k.to(exact)) / D**0.5
    place = torch.arange(len(media), device=x.device)
    seen = (place >= spans[..., :1]) & (place < spans[..., 1:])  # [B, N or 1, M]
    seen = seen[:, None].expand_as(scores)
    weight = scores.masked_fill(~seen, -1e9).softmax(-1) * seen.any(-1, keepdim=True)
    read = torch.einsum("bhnm,bmhd->bnhd", weight, v.to(exact)).to(x.dtype).flatten(2)
    y = x + layer.attn_gate.tanh() * layer.o_proj(read)
    z, mlp = norm(layer.mlp_norm, y), layer.mlp
    inner = F.silu(mlp.gate_proj(z)) * mlp.up_proj(z)
    return y + layer.mlp_gate.tanh() * mlp.down_proj(inner)


def gradients(out, *leaves):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape, generator=generator).to(out)
    return torch.autograd.grad(out, leaves, weight, allow_unused=True)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a scale for each row."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("held", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def weights(self):
        return self.held * self.scale

    def forward(self, x):
        return F.linear(x, self.weights(), self.bias)
