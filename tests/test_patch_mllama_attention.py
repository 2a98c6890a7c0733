"""Spans of Mllama's masks, and attention over the layouts of its keys."""

import itertools
import math

import pytest
import torch
from conftest import INTERPRET, SLOW
from harness import assert_matches
from hypothesis import given
from hypothesis import strategies as st

from comemo_kernels.patching.mllama_attention import attend, attend_and_add
from comemo_kernels.patching.mllama_mask import see

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32] if INTERPRET else [torch.float32, torch.bfloat16]


def masks():
    sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 8))
    return sizes.flatmap(
        lambda size: st.lists(
            st.booleans(), min_size=math.prod(size), max_size=math.prod(size)
        ).map(lambda values: torch.tensor(values).view(size))
    )


@given(tiles=masks(), patches=st.integers(1, 3))
def test_spans_hold_what_the_mask_shows(tiles, patches):
    seen = see(tiles, patches, torch.float32)
    place = torch.arange(seen.keys)
    readers = sum(((place >= span[..., :1]) & (place < span[..., 1:])).int() for span in seen.spans)
    mask, factors = seen.dense()
    some = tiles.any(-1, keepdim=True)
    wanted = (tiles | ~some).repeat_interleave(patches, -1)
    assert torch.equal(readers, wanted.int())  # each key once
    assert torch.equal(mask[:, 0] == 0, wanted)
    assert torch.equal(factors[:, 0] == 1, some)
    assert seen.rows is None if some.all() else torch.equal(seen.rows, some)
    runs = (tiles.int().diff(dim=-1, prepend=tiles[..., :1].int() * 0) > 0).sum(-1)
    assert len(seen.spans) == max(1, int(runs.max()))


def reference(q, k, v, mask):
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[1], 1) for t in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    exact = torch.promote_types(q.dtype, torch.float32)
    weights = (scores.to(exact) + mask.to(exact)).softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2)


LAYOUTS = {
    "projected": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "cached": lambda t: t.contiguous(),
    "part of a static cache": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
}


# What takes the ways that the code has; the others are slow in the interpreter.
QUICK = [(1, 3, "cached", False), (2, 3, "projected", True), (2, 3, "cached", False)]
CASES = [
    pytest.param(*case, marks=() if case in QUICK else SLOW)
    for case in itertools.product((1, 2), (3, 1), LAYOUTS, (False, True))
]


@pytest.mark.kernel(reference=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "layout", "learning"), CASES)
def test_attends_to_keys_of_any_layout(device, dtype, batch, tokens, layout, learning):
    draw = torch.Generator().manual_seed(batch)
    tiles = torch.rand(batch, tokens, 4, generator=draw) < 0.6
    tiles[0, -1] = torch.tensor([1, 0, 1, 1]).bool()  # two spans
    seen = see(tiles.to(device), 5, dtype)
    mask = seen.dense()[0]

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(device, dtype)

    size = (batch, 2, 20, 8)
    inputs = {"q": normal(batch, tokens, 4, 8), "k": normal(*size), "v": normal(*size)}
    more = {"x": normal(batch, tokens, 6), "weight": normal(6, 32), "gate": normal(1)}
    for t in (*inputs.values(), *more.values()):
        t.requires_grad_(learning)

    def ours(q, k, v):
        return attend(q, LAYOUTS[layout](k), LAYOUTS[layout](v), seen.spans)

    if not learning:  # else it is part of the layer
        assert_matches(ours, lambda q, k, v: reference(q, k, v, mask), inputs)

    def layer(q, k, v, x, weight, gate):
        k, v = LAYOUTS[layout](k), LAYOUTS[layout](v)
        return attend_and_add(x, q, k, v, seen.spans, weight, gate)

    def plain(q, k, v, x, weight, gate):
        return x + gate.tanh() * (reference(q, k, v, mask).flatten(2) @ weight.t())

    assert_matches(layer, plain, inputs | more)


@pytest.mark.kernel(reference=True)
@pytest.mark.parametrize("layout", ["projected", "cached"])
def test_keys_are_not_copied(device, layout):
    """A cache of a real model holds gigabytes."""
    from comemo_kernels.patching import mllama_attention

    found = []
    k, v = (LAYOUTS[layout](torch.randn(2, 2, 20, 8, device=device)) for _ in "kv")
    q, spans = torch.randn(2, 3, 4, 8, device=device), torch.tensor([[[0, 20]]], device=device)
    attend_spans = mllama_attention.ops.attend_spans

    def watch(q, k, v, spans, **options):
        found.extend((k, v))
        return attend_spans(q, k, v, spans, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mllama_attention.ops, "attend_spans", watch)
        attend(q, k, v, (spans,))
    storages = {t.untyped_storage().data_ptr() for t in (k, v)}
    assert {t.untyped_storage().data_ptr() for t in found} == storages
