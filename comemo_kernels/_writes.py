"""Check that tensors can be written, all of them before the first one is, and what is recorded."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._C import _autograd


def check_writable(verb: str, written: Mapping[str, Tensor | None], learns: bool = False) -> None:
    """Raise ValueError for tensors that PyTorch would not write, or that share their start.

    Args:
        verb: name of the function that writes, for the message.
        written: the tensors by name.
        learns: whether the values written require grad.
    """
    if torch.compiler.is_compiling():  # then an error leaves everything unwritten
        return
    grad = torch.is_grad_enabled()
    addresses: dict[int, str] = {}
    for name, x in written.items():
        if x is None:
            continue
        reason = _why_not(x, grad and (learns or x.requires_grad))
        other = addresses.setdefault(x.data_ptr(), name)
        if other != name and x.numel() and not x.is_meta:
            reason = f"at the same address as {other}"
        if reason is not None:
            raise ValueError(f"{verb}: {name}, which is written, must not be {reason}")


def _why_not(x: Tensor, grad: bool) -> str | None:
    """Why PyTorch would not write into a dense tensor; for a sparse one it raises by itself."""
    if not x.is_contiguous() and any(
        stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)
    ):
        return f"expanded, got strides {x.stride()} of {tuple(x.shape)}"
    if x.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor outside torch.inference_mode"
    if not grad:
        return None
    if x.requires_grad and x.is_leaf:
        return "a leaf that requires grad"
    if x._is_view() and x._base is not None:
        if x._base.requires_grad and x._base.is_leaf:
            return "a view of a leaf that requires grad"
        if _autograd._get_creation_meta(x) != _autograd.CreationMeta.DEFAULT:
            return (
                "one of several views from one call, or a view from no_grad mode, if grad is needed"
            )
    return None


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors is recorded for a backward pass."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def may_overwrite() -> bool:
    """Whether an operation may compute in the memory of its own intermediate results.

    Not under torch.compile, which plans memory itself, nor in a transform of torch.func: vmap
    cannot write a result that is batched into one that is not.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is None
