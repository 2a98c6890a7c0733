"""Tile projection: values and gradients against its reference and transformers."""

import pytest
import torch
from conftest import DEVICE, DTYPES, GPU, SLOW, WITHOUT_HALF
from harness import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLModel,
    InternVLMultiModalProjector,
)

from comemo_kernels import fold_tiles, project_tiles, reference

pytestmark = [pytest.mark.kernel(reference=True), pytest.mark.usefixtures("one_thread")]


def make_inputs(T=2, side=2, n=2, C=8, d=24, dtype=torch.float32, grad=(), device=DEVICE):
    """Operands by name; those of `grad` require gradients."""
    g, W, h = torch.Generator().manual_seed(T + side + C), C * n * n, side * n

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype)

    inputs = {
        "tokens": draw(T, 1 + h * h, C, scale=3.0),
        "norm_weight": 1 + draw(W, scale=0.3),
        "norm_bias": draw(W),
        "weight1": draw(d, W, scale=W**-0.5),
        "bias1": draw(d),
        "weight2": draw(d, d, scale=d**-0.5),
        "bias2": draw(d),
    }
    return {name: t.requires_grad_(name in grad) for name, t in inputs.items()}


EVERY = tuple(make_inputs())


def both(n=2, version="v2"):
    """The op and its reference, folding by n."""

    def of(project):
        return lambda **given: project(**given, ratio=1 / n, version=version)

    return of(project_tiles), of(reference.project_tiles)


# --- values and gradients ---


@pytest.mark.parametrize("dtype", WITHOUT_HALF, ids=str)
@given(
    T=st.integers(1, 3),
    side=st.integers(1, 3),
    n=st.integers(1, 4),
    C=st.sampled_from([8, 12, 64] if GPU else [1, 5, 8, 12, 64]),  # each compiles
    d=st.sampled_from([8, 24, 130]),
    version=st.sampled_from(["v1", "v2"]),
    gradients=st.booleans(),
)
def test_matches_reference(dtype, T, side, n, C, d, version, gradients):
    inputs = make_inputs(T, side, n, C, d, dtype, EVERY if gradients else ())
    assert_matches(*both(n, version), inputs)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slots", [3, *(pytest.param(n, marks=SLOW) for n in (1, 4, 1000))])
def test_split_waves_give_what_whole_ones_do(monkeypatch, slots, dtype):
    """2 x 2 blocks and at least 17 steps, on numbers of multiprocessors that they fill or not."""
    from comemo_kernels import _gemm

    monkeypatch.setattr(_gemm, "multiprocessors", lambda _: slots)
    monkeypatch.setattr(_gemm, "STEPS", 2)
    config = _gemm.product.config | {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    exact = _gemm.product_exact.config | {"BLOCK_M": 32, "BLOCK_N": 32}
    inputs = make_inputs(T=3, side=4, C=66, d=42, dtype=dtype, grad=EVERY)
    blocks, steps = -(-48 // 32) * 2, -(-264 // 16)
    whole, splits = _gemm.choose_splits(blocks, steps, slots)
    assert (whole, splits) == {1: (4, 1), 3: (3, 3), 4: (4, 1), 1000: (0, 8)}[slots]
    with _gemm.product.using(config), _gemm.product_exact.using(exact):
        assert_matches(*both(), inputs)


@pytest.mark.slow
@pytest.mark.kernel
def test_rows_for_more_warps(monkeypatch):
    """Kernels for wide towers: the gradient takes a pass for the tokens and one for the norm."""
    from comemo_kernels import _unshuffle_norm

    monkeypatch.setattr(_unshuffle_norm, "NARROW", 16)
    assert _unshuffle_norm._Plan.of(make_inputs()["tokens"], 2, False).wide
    for dtype in DTYPES:
        for grad in ((), EVERY, ("tokens",), ("norm_bias",)):
            assert_matches(*both(), make_inputs(T=3, C=12, dtype=dtype, grad=grad))


def test_strides_change_nothing():
    """Transposed tokens, as from a tower, and views that are not aligned to 128 bits."""
    for dtype in DTYPES:
        inputs = make_inputs(C=16, dtype=dtype)
        wanted, tokens = project_tiles(**inputs), inputs["tokens"]
        wide = torch.full((2, 20, 19), float("nan"), device=DEVICE, dtype=dtype)
        wide[:, 2:19, 1:17] = tokens
        turned = tokens.transpose(0, 1).contiguous().transpose(0, 1)
        for view in (wide[:, 2:19, 1:17], turned):
            assert view.data_ptr() % 16 or not view.is_contiguous()
            torch.testing.assert_close(project_tiles(**inputs | {"tokens": view}), wanted)


@pytest.mark.parametrize("frozen", [set(EVERY) - {name} for name in EVERY], ids=lambda s: None)
def test_gradients_of_what_is_not_frozen(frozen):
    """A frozen tower or projector: the rest gets the same gradients as without freezing."""
    whole = evaluate(project_tiles, make_inputs(grad=EVERY))
    part = evaluate(project_tiles, make_inputs(grad=set(EVERY) - frozen))
    assert len(part) == 2
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name])


def test_outlier_channels():
    """InternViT's tokens have channels hundreds of times as large as the others."""
    for dtype in DTYPES:
        inputs = make_inputs(side=3, C=64, dtype=dtype)
        inputs["tokens"][..., 7] = 400
        inputs["tokens"][..., 20] -= 150
        assert_matches(*both(), {n: t.detach() for n, t in inputs.items()})
        leaves = {n: t.detach().requires_grad_() for n, t in inputs.items()}
        assert_matches(*both(), leaves)


def test_eps_counts():
    inputs = make_inputs()
    inputs["tokens"] *= 1e-4
    assert_matches(
        lambda **given: project_tiles(**given, eps=1e-3),
        lambda **given: reference.project_tiles(**given, eps=1e-3),
        inputs,
    )
    assert not torch.allclose(project_tiles(**inputs, eps=1e-3), project_tiles(**inputs))


def test_no_tiles():
    inputs = make_inputs(T=0, grad=EVERY)
    found = project_tiles(**inputs)
    assert found.shape == (0, 4, 24)
    for grad in torch.autograd.grad(found.sum(), list(inputs.values())):
        assert not grad.any()
    assert project_tiles(**make_inputs(T=0)).shape == (0, 4, 24)


# --- other implementations ---


@torch.no_grad()
def test_transformers_projector():
    """InternVL's own pixel shuffle and projector, with its weights."""
    config = InternVLConfig(
        vision_config={"hidden_size": 16, "num_attention_heads": 2}, text_config={"hidden_size": 24}
    )
    projector = InternVLMultiModalProjector(config).to(DEVICE)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 17, 16, device=DEVICE)
    shuffled = InternVLModel.pixel_shuffle(None, x[:, 1:].view(2, 4, 4, 16), 0.5)
    wanted = projector(shuffled.flatten(1, 2))
    norm, first, second = projector.layer_norm, projector.linear_1, projector.linear_2
    weights = (norm.weight, norm.bias, first.weight, first.bias, second.weight, second.bias)
    found = project_tiles(
        x, *weights, ratio=config.downsample_ratio, activation=config.projector_hidden_act
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_v1_is_the_transposed_raster_of_v2():
    inputs = make_inputs(side=3)
    there, back = (project_tiles(**inputs, version=v).unflatten(1, (3, 3)) for v in ("v1", "v2"))
    torch.testing.assert_close(there, back.transpose(1, 2))
    assert torch.equal(
        fold_tiles(inputs["tokens"][:, 1:].unflatten(1, (6, 6)), version="v1"),
        fold_tiles(inputs["tokens"][:, 1:].unflatten(1, (6, 6))).transpose(1, 2),
    )
