"""The kernels of attention's gradient: configurations, ranges of row blocks, refusals."""

import pytest
import torch
from attention_inputs import make_inputs, ways
from conftest import DEVICE

pytest.importorskip("triton")

from comemo_kernels import _attend_gradient as gradient
from comemo_kernels import attend_spans

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("name", ["gradient_queries", "gradient_keys", "gradient_keys_small"])
def test_every_configuration(monkeypatch, name):
    inputs, rest = make_inputs(1, 70, 2, 1, 16, 150, "token", (0, 64), dtype=torch.float16)
    leaves = [inputs[n].requires_grad_() for n in "qkv"]
    wanted = torch.autograd.grad(ways(rest)[1](**inputs).sum(), leaves)
    kernel = getattr(gradient, name)
    if name == "gradient_keys_small":
        monkeypatch.setattr(gradient, "has_warp_groups", lambda device: False)
    distinct = {(c["BLOCK_M"], c["BLOCK_N"]): c for c in kernel.configs}
    for config in distinct.values():
        with kernel.using(config):
            found = torch.autograd.grad(ways(rest)[0](**inputs).sum(), leaves)
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("blocks", "period"), [(1, 1), (7, 2), (70, 2), (300, 9), (600, 40)])
def test_ranges_hold_the_blocks_that_meet(blocks, period):
    """All of them, and no others as long as there are ranges left."""
    reads = torch.arange(blocks) // period % 2 == 0
    first = torch.where(reads, 64, 0)
    bounds = torch.stack([first, first + 64, first, first], 1).int().to(DEVICE)
    runs = torch.full((3, 1 + 2 * gradient.RUNS), -7, dtype=torch.int32, device=DEVICE)
    gradient.gradient_runs.launch(3, runs, bounds, blocks, gradient.RUNS, 64)
    for key, wanted in enumerate((~reads, reads, reads & ~reads)):
        count, *pairs = runs[key].tolist()
        held = [b for i in range(count) for b in range(pairs[2 * i], pairs[2 * i + 1])]
        there = wanted.nonzero().squeeze(1).tolist()
        assert held == sorted(set(held))
        assert set(there) <= set(held)
        separate = int((wanted & ~torch.cat([torch.tensor([False]), wanted[:-1]])).sum())
        assert count == min(separate, gradient.RUNS)
        if separate <= gradient.RUNS:
            assert held == there


def test_what_the_kernels_cannot_do_raises():
    inputs, rest = make_inputs(dtype=torch.float64)
    inputs["q"].requires_grad_()
    with pytest.raises(ValueError, match="attend_spans: on a GPU float64 has no kernel"):
        ways(rest)[0](**inputs)
    inputs, rest = make_inputs()
    inputs["cos"].requires_grad_()
    with pytest.raises(ValueError, match="cos, sin and scales get no gradients"):
        ways(rest)[0](**inputs)
    q = torch.zeros(1, 2, 1, 260, device=DEVICE, requires_grad=True)
    k, spans = q.detach()[0], torch.zeros(1, 1, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="D must be at most 256, got 260"):
        attend_spans(q, k, k, spans)


def test_a_frozen_memory_and_frozen_queries_cost_nothing(monkeypatch):
    inputs, rest = make_inputs(2, 5, 2, 1, 16, 70, "token", (0,))
    launched = []
    for name in ("gradient_queries_exact", "gradient_keys_exact"):
        kernel = getattr(gradient, name)
        launch = kernel.launch
        monkeypatch.setattr(
            kernel, "launch", lambda *args, n=name, run=launch: (launched.append(n), run(*args))
        )
    for learning, wanted in (("q", "queries"), ("k", "keys"), ("v", "keys")):
        launched.clear()
        own = {n: t if t is None else t.detach() for n, t in inputs.items()}
        leaf = own[learning].requires_grad_()
        torch.autograd.grad(ways(rest)[0](**own).sum(), leaf)
        assert launched == [f"gradient_{wanted}_exact"]
