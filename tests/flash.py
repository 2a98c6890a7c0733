"""flash-attn's functions in plain PyTorch, for transformers to import: the package needs a GPU.

Semantics by its documentation: half precision only; a causal mask is aligned to the last key; a
query without keys gives 0; several queries may share a key head; samples of `cu_seqlens` follow one
another.
"""

import math
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as utils

HALF = (torch.float16, torch.bfloat16)


def attend(q, k, v, scale, causal):
    """q [N, H, D] reads k and v [M, G, D], in float32."""
    (N, H, D), (M, G, _) = q.shape, k.shape
    if not (N and M):
        return torch.zeros_like(q)
    k, v = (t.float().repeat_interleave(H // G, 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.float(), k) * (scale or D**-0.5)
    if causal:
        place = torch.arange(N, device=q.device)[:, None] + (M - N)
        hidden = torch.arange(M, device=q.device) > place
        scores = scores.masked_fill(hidden, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("hnm,mhd->nhd", weights, v).to(q.dtype)


class Flash:
    """Both functions; `calls` are (kind, shape of q, shape of k, causal, bounds q, bounds k)."""

    def __init__(self):
        self.calls = []

    def check(self, q, k, v):
        if any(t.dtype not in HALF for t in (q, k, v)):
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        assert q.dtype == k.dtype == v.dtype
        assert k.shape == v.shape
        assert q.shape[-1] == k.shape[-1] <= 256
        assert q.shape[-2] % k.shape[-2] == 0
        assert all(t.stride(-1) == 1 for t in (q, k, v))

    def dense(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        self.check(q, k, v)
        assert q.ndim == k.ndim == 4
        assert len(q) == len(k)
        assert (dropout_p, window_size, softcap) == (0.0, (-1, -1), 0.0)
        self.calls.append(("dense", q.shape, k.shape, causal, None, None))
        rows = zip(q, k, v, strict=True)
        return torch.stack([attend(*row, softmax_scale, causal) for row in rows])

    def varlen(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        self.check(q, k, v)
        assert q.ndim == k.ndim == 3
        assert (dropout_p, window_size, softcap) == (0.0, (-1, -1), 0.0)
        edges = []
        longest = (max_seqlen_q, max_seqlen_k)
        for x, cu, limit in zip((q, k), (cu_seqlens_q, cu_seqlens_k), longest, strict=True):
            assert cu.dtype == torch.int32
            assert cu.is_contiguous()
            edges.append(cu.tolist())
            assert edges[-1][0] == 0
            assert edges[-1][-1] == len(x)
            lengths = cu.diff()
            assert (lengths >= 0).all()
            assert lengths.max() <= int(limit)
        self.calls.append(("varlen", q.shape, k.shape, causal, *edges))
        parts = [t.split(cu.diff().tolist()) for t, cu in ((q, cu_seqlens_q), (k, cu_seqlens_k))]
        parts.append(v.split(cu_seqlens_k.diff().tolist()))
        return torch.cat([attend(*s, softmax_scale, causal) for s in zip(*parts, strict=True)])


@pytest.fixture
def flash(monkeypatch):
    """transformers finds flash-attn 2, and calls these functions."""
    found, package, padding = Flash(), ModuleType("flash_attn"), ModuleType("bert_padding")
    package.__spec__ = ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = found.dense, found.varlen
    package.flash_attn_with_kvcache = None
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    package.bert_padding = padding
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    matrix = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]
    monkeypatch.setitem(matrix, "general_availability_check", lambda: True)
    # What it refuses: a missing package, and weights on a CPU.
    monkeypatch.setattr(PreTrainedModel, "_flash_attn_can_dispatch", lambda *_, **__: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    return found


class Layer(nn.Module):
    """What functions of the attention interface read of a mixin layer."""

    is_causal, num_key_value_groups, layer_idx = False, 1, 3

    def __init__(self, config):
        super().__init__()
        self.config = config
