"""Arguments of `attend_spans`, and how tests call it."""

import pytest
import torch
from conftest import DEVICE
from harness import assert_matches

pytest.importorskip("triton")


from comemo_kernels import QueryRotation, attend_spans, reference, rotary_table


def make_inputs(
    B=2,
    N=3,
    H=2,
    G=1,
    D=16,
    M=70,
    spans="token",
    starts=(0, 32),
    biases=1,
    P=90,
    dtype=torch.float32,
    ids=torch.int64,
    device=DEVICE,
):
    """Arguments of `attend_spans`; `starts` None for queries that are rotated already."""
    g = torch.Generator().manual_seed(B * N + M + D)

    def draw(*shape):
        return torch.randn(*shape, generator=g).to(device, dtype)

    def integers(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=g).to(device, dtype)

    places = integers(0, M + 1, B, N if spans == "token" else 1, 2, dtype=ids)
    inputs = {
        "q": draw(B, N, H, D),
        "k": draw(M, G, D),
        "v": draw(M, G, D),
        "spans": places.sort(-1).values,
        "cos": None,
        "sin": None,
    }
    rest = {"positions": integers(0, P // 2, B, N, dtype=ids), "starts": None, "biases": None}
    if starts is not None:
        cos, sin = rotary_table(torch.arange(P, device=device)[None], D, theta=100.0)
        inputs |= {"cos": cos[0], "sin": sin[0]}
        if starts:
            rest["starts"] = torch.tensor(starts, dtype=torch.int32, device=device)
            rest["biases"] = integers(0, P // 2, biases, len(starts))
    return inputs, rest


def ways(rest, **kwargs):
    """The operation and its reference as functions of tensors, for `assert_matches`."""

    def call(attend, q, k, v, spans, cos, sin):
        rotation = None if cos is None else QueryRotation(cos, sin, **rest)
        return attend(q, k, v, spans, rotation, **kwargs)

    return (
        lambda **inputs: call(attend_spans, **inputs),
        lambda **inputs: call(reference.attend_spans, **inputs),
    )


def check(inputs, rest, **kwargs):
    ours, theirs = ways(rest, **kwargs)
    assert_matches(ours, theirs, inputs)


def assert_repeats(call, plain):
    """A call matches `plain`, and gives the same bits 1,000 times."""
    first = call().clone()
    torch.testing.assert_close(first, plain, atol=2e-2, rtol=2e-2)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)
    for _ in range(1000):
        same &= (call() == first).all()
    assert same
