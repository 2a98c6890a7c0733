"""Self-attention of packed samples: grouped by length, each alone."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from comemo.packed_attention import SHORTEST, attend_samples, group_samples

pytestmark = pytest.mark.usefixtures("one_thread")

BOUNDS = {
    "one sample": [0, 12],
    "equal": [0, 4, 8, 12],
    "mixed": [0, 5, 6, 10, 12],
    "empty ones": [0, 0, 7, 7, 12],
    "single tokens": list(range(13)),
}


def one_by_one(q, k, v, bounds):
    """[tokens, H, D] of causal attention, sample by sample."""
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    outs = []
    for start, end in itertools.pairwise(bounds):
        own = [t[start:end].transpose(0, 1) for t in rows]
        own[1:] = [t.repeat_interleave(len(own[0]) // len(t), 0) for t in own[1:]]
        outs.append(F.scaled_dot_product_attention(*own, is_causal=True).transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", BOUNDS)
def test_groups_give_what_each_sample_gives_alone(name, rows):
    torch.manual_seed(0)
    own = BOUNDS[name]
    bounds = own + [12 + bound for bound in own[1:]] * (rows - 1)
    shape = {"q": (rows, 4, 12, 8), "k": (rows, 2, 12, 8), "v": (rows, 2, 12, 8)}
    q, k, v = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shape.values())
    groups = group_samples(bounds, q.device)
    out = attend_samples(q, k, v, groups, 0.0, 8**-0.5)
    wanted = one_by_one(q, k, v, bounds)
    torch.testing.assert_close(out.flatten(0, 1), wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    found = torch.autograd.grad((out.flatten(0, 1) * weight).sum(), (q, k, v))
    right = torch.autograd.grad((wanted * weight).sum(), (q, k, v))
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_sample_never_sees_another():
    q, k, v = (torch.randn(1, 2, 10, 4) for _ in range(3))
    for t in (q, k, v):
        t[:, :, 4:7] = float("nan")
    out = attend_samples(q, k, v, group_samples([0, 4, 7, 10], q.device), 0.0, 0.5)
    assert out[:, 4:7].isnan().all()
    assert out[:, :4].isfinite().all()
    assert out[:, 7:].isfinite().all()


def test_padding_is_bounded_and_calls_are_few():
    torch.manual_seed(0)
    sizes = torch.randint(20, 60, (200,)).tolist()
    bounds = [0, *itertools.accumulate(sizes)]
    groups = group_samples(bounds, torch.device("cpu"))
    assert sum(samples for samples, _ in groups.shapes) == 200
    slots = sum(samples * longest for samples, longest in groups.shapes)
    assert slots <= bounds[-1] / SHORTEST
    assert len(groups.shapes) <= 6
    assert (groups.token[groups.slot] == torch.arange(bounds[-1])).all()
