"""Inputs of the fused linear layers, and what these are in PyTorch."""

import torch
import torch.nn.functional as F

import comemo_kernels
from comemo_kernels import reference

VERBS = ["norm_linear", "norm_swiglu", "gated_residual", "gated_swiglu"]
FORMS = [verb + how for verb in VERBS for how in ("", " folded")]  # norm_weight or gate None


def make_inputs(form, rows=(2,), K=24, outputs=10, dtype=torch.float32, gate=0.6, device="cpu"):
    verb, _, folded = form.partition(" ")
    generator = torch.Generator().manual_seed(K)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    x, weight = draw(*rows, K), draw(outputs, K, scale=K**-0.5)
    if verb == "gated_residual":
        gate = None if folded else torch.tensor([gate]).to(device, dtype)
        return {"x": draw(*rows, outputs), "a": x, "weight": weight, "gate": gate}
    inputs = {"x": x, "norm_weight": None if folded else draw(K) + 1}
    if verb == "norm_linear":
        return inputs | {"weight": weight}
    inputs |= {"gate_weight": weight, "up_weight": draw(outputs, K, scale=K**-0.5)}
    if verb == "norm_swiglu":
        return inputs
    gate = None if folded else torch.tensor([gate]).to(device, dtype)
    return inputs | {"down_weight": draw(K, outputs, scale=outputs**-0.5), "gate": gate}


def requiring_grad(inputs):
    return {n: None if t is None else t.detach().requires_grad_() for n, t in inputs.items()}


def both(form):
    verb = form.split()[0]
    return getattr(comemo_kernels, verb), getattr(reference, verb)


def normed(x, weight, eps):
    """RMSNorm of Llama, written out."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return normed if weight is None else weight * normed


def plain_norm_linear(x, norm_weight, weight, eps=1e-5):
    return F.linear(normed(x, norm_weight, eps), weight)


def plain_norm_swiglu(x, norm_weight, gate_weight, up_weight, eps=1e-5):
    y = normed(x, norm_weight, eps)
    return F.silu(F.linear(y, gate_weight)) * F.linear(y, up_weight)


def plain_gated_residual(x, a, weight, gate):
    added = F.linear(a, weight)
    return x + (added if gate is None else gate.tanh() * added)


def plain_gated_swiglu(
    x, norm_weight, gate_weight, up_weight, down_weight, gate, eps=1e-5, recompute=None
):
    wide = plain_norm_swiglu(x, norm_weight, gate_weight, up_weight, eps)
    return plain_gated_residual(x, wide, down_weight, gate)


def plain(form):
    """The operation as PyTorch would compute and differentiate it."""
    return globals()[f"plain_{form.split()[0]}"]
