"""Arguments of `apply_rotary` in every layout and with every kind of position."""

import torch

from comemo_kernels import TEXT, ImageGrids, rotary_table

LAYOUTS = ("bnhd", "bhnd", "packed qkv", "tokens")
KINDS = ("int32", "int64", "grids", "table", "one table for all")
ROWS = 80  # of the table


def heads(layout, B, N, H, G, D, dtype, device):
    """q and k in a memory layout: both orders of tokens and heads, a packed qkv, no batch."""
    generator = torch.Generator().manual_seed(B + 10 * N)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    if layout == "packed qkv":
        return draw(B, N, H + 2 * G, D).split([H, G, G], dim=2)[:2]
    if layout == "bhnd":
        return draw(B, H, N, D).transpose(1, 2), draw(B, G, N, D).transpose(1, 2)
    q, k = draw(B, N, H, D), draw(B, N, G, D)
    return (q.flatten(0, 1), k.flatten(0, 1)) if layout == "tokens" else (q, k)


def make_inputs(
    B=2, N=5, H=2, G=1, D=8, R=8, dtype=torch.float32, layout="bnhd", kind="int64", device="cpu"
):
    q, k = heads(layout, B, N, H, G, D, dtype, device)
    tokens, P = q.shape[:-2], ROWS
    generator = torch.Generator().manual_seed(N)
    table = rotary_table(torch.arange(P)[None], R, 100.0)
    cos, sin = (t[0].to(torch.promote_types(dtype, torch.float32)) for t in table)
    ids = torch.randint(P, tokens, generator=generator)  # repeated, in any order
    positions = None
    if kind in ("int32", "int64"):
        positions = ids.to(getattr(torch, kind)).to(device)
    elif kind == "grids":
        positions = grids_within(tokens.numel(), device)
    else:
        rows = ids[:1] if kind == "one table for all" and layout != "tokens" else ids
        cos, sin = cos[rows], sin[rows]
    cos, sin = cos.to(device), sin.to(device)
    return {
        "q": q.requires_grad_(),
        "k": k.requires_grad_(),
        "cos": cos,
        "sin": sin,
        "positions": positions,
    }


def grids_within(tokens, device):
    """As many as fit of: text, an image of 2 x 2 tiles of 4 tokens, text that restarts, a frame."""
    order = ("row", "column")[tokens % 2]
    entries = [((2, 2), 2, 2, 22), (TEXT, 25, 0, 25), ((0, 0), 26, 1, 30)]
    fitting = [entry[:3] for entry in entries if entry[3] <= tokens]
    grids, offsets, biases = zip(*fitting, strict=True) if fitting else ((), (), ())
    return ImageGrids.pack(grids, offsets, biases, side=2, tile_order=order, device=device)
