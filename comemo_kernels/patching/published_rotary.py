"""Rotary buffers of the published code: are they what their formula gives?

transformers 5 creates models without storage and then loads their weights. Buffers that are in no
checkpoint stay uninitialised then, silently.
"""

import torch
from torch import Tensor, nn

_ROWS = (0, 1, 2, 3, 100, 1000)


def _frequencies(module: nn.Module) -> Tensor:
    """inv_freq [D/2] as the module's class computes it, after its last growth if it has grown."""
    base, dim, length = float(module.base), int(module.dim), module.max_seq_len_cached
    factor = float(getattr(module, "scaling_factor", 1.0))
    if "DynamicNTK" in type(module).__name__ and length > module.max_position_embeddings:
        stretch = factor * length / module.max_position_embeddings - (factor - 1)
        base *= stretch ** (dim / (dim - 2))
    steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    return base**-steps


def check_rotary(path: str, module: nn.Module) -> None:
    """Raise unless the buffers of a rotary embedding hold their analytic values.

    Args:
        path: its name in the model, for the error.
        module: with `inv_freq` [D/2], `cos_cached`, `sin_cached` [P, D], `base`, `dim`. Buffers
            without storage are not checked.

    Raises:
        ValueError: other values.
    """
    tensors = module.inv_freq, module.cos_cached, module.sin_cached
    if any(t.is_meta for t in tensors):
        return
    want = _frequencies(module)
    length = len(module.cos_cached)
    rows = torch.tensor([row for row in _ROWS if row < length])
    ids = rows.double()
    if "LinearScaling" in type(module).__name__:
        ids = ids / float(module.scaling_factor)
    angles = torch.outer(ids, want).repeat(1, 2)
    # A model in bfloat16 rounds frequencies and tables; angles of row 1000 are wrong then.
    got = module.inv_freq.double().cpu()
    right = got.shape == want.shape and bool(((got - want).abs() <= want * 2**-7).all())
    rounded = module.inv_freq.dtype != torch.float32
    checked = rows <= 3 if rounded else rows >= 0
    for table, exact in ((module.cos_cached, angles.cos()), (module.sin_cached, angles.sin())):
        part = table[rows.to(table.device)].double().cpu()
        right = right and part.shape == exact.shape
        right = right and bool(((part - exact)[checked].abs() <= 2**-6).all())
    if not right:
        raise ValueError(
            f"patched: the rotary buffers of {path} do not hold their analytic values: loading this"
            " model with from_pretrained under transformers 5 leaves them uninitialised. Load it"
            " under transformers 4.37 to 4.57, or construct its class and use load_state_dict, or"
            " use comemo.CoMemoForConditionalGeneration, which reads the same checkpoint"
        )
