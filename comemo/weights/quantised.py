"""Linear layers with weights of 8 or 4 bits as torchao quantises them, and fast products on a CPU.

    y = s * (Q x)                        Q integers [N, K], s [N]: one scale for each row

torchao multiplies by converting all of Q to floating point, for every token. On a CPU the same
tensors are multiplied here by PyTorch's own operators: for a few rows x by one that reads Q as it
is, for many rows in pieces of Q that fit the cache. In both x is rounded to bfloat16, which Q is
exact in, and the sums are float32; a CPU without products of bfloat16 computes many rows in the
dtype of x. Everything else is left to the layer, as torchao computes it.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 8  # beyond, pieces are faster: they are converted once for all rows
PIECE = 2**21  # integers of a piece; in bfloat16 it fits the cache of a core
STEP = 32  # the operator for few rows reads so many integers at a time, also beyond a row's end
DTYPES = (torch.float32, torch.bfloat16)  # of x


class QuantisedLinear(nn.Linear):
    """A linear layer whose weight is a tensor of torchao; made of an `nn.Linear`, in place."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], in the dtype of `input`."""
        y = multiply(input, self.weight) if _is_plain_call(input, self.bias) else None
        if y is None:
            return super().forward(input)
        return y if self.bias is None else y.add_(self.bias)


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is a tensor class of torchao."""
    return type(weight).__module__.startswith("torchao.") and hasattr(weight, "__tensor_flatten__")


def speed_up(model: nn.Module) -> nn.Module:
    """Let linear layers with weights of torchao use the fast products of a CPU, in place.

    `from_pretrained` does so itself; this is for models that `torchao.quantize_` quantised. Layers
    of other classes than `nn.Linear` and other weights are left alone.

    Returns:
        The same model.
    """
    for module in model.modules():
        if type(module) is nn.Linear and is_quantised(module.weight):
            module.__class__ = QuantisedLinear
    return model


def parts_of(name: str, weight: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a quantised weight consists of, with their names.

    Args:
        name: of the weight.
        weight: of torchao.
    """
    names, _ = weight.__tensor_flatten__()
    for part in names:
        yield f"{name}.{part}", getattr(weight, part)


def describe(weight: Any) -> str:
    """The class of a quantised weight and all that its tensors do not say."""
    _, settings = weight.__tensor_flatten__()
    return f"{type(weight).__name__} {tuple(weight.shape)} {sorted(settings.items())}"


def multiply(x: Tensor, weight: Any) -> Tensor | None:
    """x W^T for a quantised weight, if there is a fast product for it; no gradients.

    Args:
        x: [..., K] on a CPU.
        weight: [N, K].

    Returns:
        [..., N] in the dtype of `x`; None if the layer has to be called.
    """
    kind = type(weight).__name__
    if x.dtype not in DTYPES or not is_quantised(weight):
        return None
    if getattr(weight, "act_pre_scale", None) is not None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    if kind == "Int8Tensor" and _has_a_scale_per_row(weight):
        y = _multiply_int8(rows, weight.qdata, weight.scale.flatten())
    elif kind == "Int4OpaqueTensor" and weight.act_mapping_type is None and len(rows):
        groups, scales = weight.block_size[1], weight.scale_and_zero.to(torch.bfloat16)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.to(torch.bfloat16).contiguous(), weight.qdata, groups, scales
        )[:, : weight.shape[0]]
    else:
        return None
    return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[1])


def _multiply_int8(x: Tensor, integers: Tensor, scale: Tensor) -> Tensor:
    """x [R, K] times integers [N, K] times scale [N], in float32 or in the dtype of `x`."""
    R, (N, K) = len(x), integers.shape
    if 0 < R <= FEW_ROWS and K % STEP == 0 and _has_vectors():
        ones = scale.new_ones(N, dtype=torch.bfloat16)  # the scales would be rounded to bfloat16
        narrow = x.to(torch.bfloat16).contiguous()
        return torch._weight_int8pack_mm(narrow, integers, ones) * scale
    dtype = torch.bfloat16 if _has_bfloat16() else x.dtype
    x, y = x.to(dtype), x.new_empty(R, N)
    step = max(1, PIECE // K)
    for first in range(0, N, step):
        piece = slice(first, first + step)
        torch.mul(F.linear(x, integers[piece].to(dtype)), scale[piece], out=y[:, piece])
    return y


def _has_a_scale_per_row(weight: Any) -> bool:
    """Whether an Int8Tensor is one of weight-only quantisation, without groups in a row."""
    N, K = weight.qdata.shape
    return (
        weight.act_quant_kwargs is None
        and tuple(weight.block_size) == (1, K)
        and weight.scale.numel() == N
        and weight.qdata.is_contiguous()
    )


def _is_plain_call(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody differentiates, traces or casts a call with x."""
    if torch.compiler.is_compiling() or not x.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.is_grad_enabled() or not (
        x.requires_grad or (bias is not None and bias.requires_grad)
    )


@functools.cache
def _has_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, which take half the time."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@functools.cache
def _has_vectors() -> bool:
    """Whether this CPU has the vector instructions that the operator for few rows needs."""
    return torch.backends.cpu.get_cpu_capability() != "DEFAULT"
