"""Parts of the published language model that its mixin layers use, too."""

import torch
from torch import Tensor, nn


class InternLM2RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        exact = hidden_states.float()
        normed = exact * (exact.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        return self.weight * normed.to(hidden_states.dtype)


class InternLM2RotaryEmbedding(nn.Module):
    inv_freq: Tensor
    cos_cached: Tensor
    sin_cached: Tensor

    def __init__(self, dim: int, max_position_embeddings: int = 2048, base: float = 10000) -> None:
        super().__init__()
        self.dim, self.base = dim, base
        self.max_position_embeddings = max_position_embeddings
        self.register_buffer("inv_freq", self._frequencies(base, None), persistent=False)
        dtype = torch.get_default_dtype()
        self._set_cos_sin_cache(max_position_embeddings, self.inv_freq.device, dtype)

    def _frequencies(self, base: float, device: torch.device | None) -> Tensor:
        return 1.0 / (base ** (torch.arange(0, self.dim, 2).float().to(device) / self.dim))

    def _set_cos_sin_cache(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        self.max_seq_len_cached = seq_len
        ids = torch.arange(seq_len, device=device).to(self.inv_freq.dtype)
        angles = torch.outer(ids, self.inv_freq).repeat(1, 2)
        self.register_buffer("cos_cached", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin_cached", angles.sin().to(dtype), persistent=False)

    def forward(self, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        if seq_len > self.max_seq_len_cached:
            self._set_cos_sin_cache(seq_len, x.device, torch.float32)
        return self.cos_cached[:seq_len].to(x.dtype), self.sin_cached[:seq_len].to(x.dtype)


class InternLM2DynamicNTKScalingRotaryEmbedding(InternLM2RotaryEmbedding):
    def __init__(
        self, dim: int, max_position_embeddings: int, base: float, scaling_factor: float
    ) -> None:
        self.scaling_factor = scaling_factor
        super().__init__(dim, max_position_embeddings, base)

    def _set_cos_sin_cache(self, seq_len: int, device: torch.device, dtype: torch.dtype) -> None:
        longest = self.max_position_embeddings
        if seq_len > longest:
            stretch = self.scaling_factor * seq_len / longest - (self.scaling_factor - 1)
            base = self.base * stretch ** (self.dim / (self.dim - 2))
            self.register_buffer("inv_freq", self._frequencies(base, device), persistent=False)
        super()._set_cos_sin_cache(seq_len, device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
    """Rotate x [B, H, N, D] in float32 by rows `position_ids` [B, N] of tables [P, D]."""
    cos, sin = (t[position_ids].unsqueeze(1).float() for t in (cos, sin))
    exact = x.float()
    first, second = exact.chunk(2, -1)
    return (exact * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


class InternLM2MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w3 = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w2 = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))
