"""Whether tensors can be written: asked of all of them before the first is."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._C import _autograd


def check_writable(verb: str, written: Mapping[str, Tensor | None], learns: bool = False) -> None:
    """Raise ValueError in the name of `verb` for what PyTorch would refuse to write, or race on.

    Args:
        verb: the function that writes.
        written: by their names, what it writes.
        learns: whether what it writes requires grad.
    """
    if torch.compiler.is_compiling():  # then all is written or nothing
        return
    grad = torch.is_grad_enabled()
    addresses: dict[int, str] = {}
    for name, x in written.items():
        if x is None:
            continue
        reason = _why_not(x, grad and (learns or x.requires_grad))
        other = addresses.setdefault(x.data_ptr(), name)
        if other != name and x.numel() and not x.is_meta:
            reason = f"one that begins where {other} does"
        if reason is not None:
            raise ValueError(f"{verb}: {name}, which is written, must not be {reason}")


def _why_not(x: Tensor, grad: bool) -> str | None:
    """What PyTorch has against writing into a tensor that is there; that of sparse ones it says."""
    if not x.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)
    ):
        return f"expanded, got strides {x.stride()} of {tuple(x.shape)}"
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor outside of torch.inference_mode"
    if not grad:
        return None
    if x.requires_grad and x.is_leaf:
        return "a leaf that requires grad"
    if x._is_view() and x._base is not None:
        if x._base.requires_grad and x._base.is_leaf:
            return "a view of a leaf that requires grad"
        if _autograd._get_creation_meta(x) != _autograd.CreationMeta.DEFAULT:
            return "one of several views made at once, or a view made without grad, while it learns"
    return None
