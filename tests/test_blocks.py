"""Passes by blocks of tokens give the bits of a whole pass, in every layout."""

import pytest
import torch

import comemo_kernels as ops
from comemo_kernels import reference
from comemo_kernels.reference import blocks
from comemo_kernels.reference.norms import rms_norm


@pytest.fixture
def both(monkeypatch):
    """Evaluates a function whole and by blocks of few tokens."""

    def evaluate(function):
        whole = function()
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "ELEMENTS", 100)
            return whole, function()

    return evaluate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("shape", "table"), [((2, 7, 3, 8), (1, 7)), ((2, 7, 3, 8), (2, 7)), ((9, 3, 10), (9,))]
)
def test_rotation(both, dtype, inplace, shape, table):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(shape, generator=generator).to(dtype)
    k = torch.randn(shape, generator=generator).to(dtype).transpose(-2, -3)
    k = k.contiguous().transpose(-2, -3)  # a view with other strides
    angles = torch.randn(*table, 4, generator=generator)
    whole, parts = both(
        lambda: reference.apply_rotary(
            q.clone(), k.clone(), angles.cos(), angles.sin(), inplace=inplace
        )
    )
    assert all(map(torch.equal, whole, parts))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("shape", [(13, 16), (2, 13, 16)])
def test_norm(both, weighted, dtypes, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtypes[0])
    weight = torch.randn(16, generator=generator).to(dtypes[1]) if weighted else None
    whole, parts = both(lambda: rms_norm(x, weight, 1e-5))
    assert whole.dtype == parts.dtype
    assert torch.equal(whole, parts)


def test_gradients_pass_whole(monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 10)
    x = torch.randn(1, 9, 2, 8, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(1, 9, 4, dtype=torch.float64)

    def rotate(x):
        return reference.apply_rotary(x, None, angles.cos(), angles.sin())[0]

    assert torch.autograd.gradcheck(rotate, x)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-5), x)


def test_one_query_in_bfloat16_is_as_exact_as_several():
    """One query in bfloat16 is attended as two; the result is that of many."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 4, 64, generator=generator).bfloat16()[None] for n in (3, 600, 600))
    spans = torch.tensor([[[0, 600]]])
    many = ops.reference.attend_spans(q, k[0], v[0], spans)
    one = ops.reference.attend_spans(q[:, :1], k[0], v[0], spans)
    exact = ops.reference.attend_spans(q.double(), k[0].double(), v[0].double(), spans)
    assert (one - exact[:, :1]).abs().max() <= 2 * (many - exact).abs().max()


OPERANDS = {
    "gated_residual": {"x": (4, 8), "a": (4, 6), "weight": (8, 6), "gate": (1,)},
    "norm_swiglu": {"x": (4, 8), "norm_weight": (8,), "gate_weight": (5, 8), "up_weight": (5, 8)},
}


@pytest.mark.parametrize(("verb", "name"), [(v, name) for v in OPERANDS for name in OPERANDS[v]])
def test_vmap_over_any_one_operand(verb, name):
    """Intermediate results are not overwritten where one of them is batched and another is not."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        key: torch.randn(*([3] if key == name else []), *shape, generator=generator)
        for key, shape in OPERANDS[verb].items()
    }
    operation = getattr(reference, verb)
    dims = tuple(0 if key == name else None for key in inputs)
    found = torch.vmap(operation, dims)(*inputs.values())
    wanted = [operation(**inputs | {name: inputs[name][i]}) for i in range(3)]
    torch.testing.assert_close(found, torch.stack(wanted))
