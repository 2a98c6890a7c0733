"""The published vision tower, InternViT, with the published names."""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InternVisionEmbeddings(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patches = config.hidden_size, (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + patches, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), -1, -1).to(patches.dtype)
        return torch.cat([first, patches], 1) + self.position_embedding.to(patches.dtype)


class InternAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class InternMLP(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn, self.mlp = InternAttention(config), InternMLP(config)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((width,), 0.1))
        self.ls2 = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp(self.norm2(x)) * self.ls2


class InternVisionEncoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )


class InternVisionModel(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> Any:
        states = [self.embeddings(pixel_values)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        hidden_states = tuple(states) if output_hidden_states else None
        return SimpleNamespace(last_hidden_state=states[-1], hidden_states=hidden_states)
