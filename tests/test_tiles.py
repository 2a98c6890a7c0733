"""Tile projection: its reference, both destinations, contract with torch, errors."""

import pytest
import torch
from conftest import DEVICE, DTYPES, GPU, INTERPRET, TRACED, WITHOUT_HALF
from harness import assert_matches, evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck
from transformers.models.internvl.configuration_internvl import InternVLConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLModel,
    InternVLMultiModalProjector,
)

from comemo_kernels import capture, fold_tiles, image_rows, project_tiles, reference

pytestmark = [pytest.mark.kernel(reference=True), pytest.mark.usefixtures("one_thread")]

WEIGHTS = ["norm_weight", "norm_bias", "weight1", "bias1", "weight2", "bias2"]


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
@pytest.mark.parametrize("slots", [1, 3, 4, 1000])
def test_split_waves_are_whole_ones(monkeypatch, slots, dtype):
    """2 x 2 blocks and 17 steps or more, on multiprocessors that they fill or do not."""
    from comemo_kernels import _gemm as _product

    monkeypatch.setattr(_product, "multiprocessors", lambda _: slots)
    monkeypatch.setattr(_product, "STEPS", 2)
    config = _product.product.config | {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}
    exact = _product.product_exact.config | {"BLOCK_M": 32, "BLOCK_N": 32}
    inputs = make_inputs(T=3, side=4, C=66, d=42, dtype=dtype, grad=EVERY)
    blocks, steps = -(-48 // 32) * 2, -(-264 // 16)
    whole, splits = _product.choose_splits(blocks, steps, slots)
    assert (whole, splits) == {1: (4, 1), 3: (3, 3), 4: (4, 1), 1000: (0, 8)}[slots]
    with _product.product.using(config), _product.product_exact.using(exact):
        assert_matches(*both(), inputs)


@pytest.mark.kernel
def test_rows_for_more_warps(monkeypatch):
    """Kernels of wide towers: the gradient takes a pass for the tokens and one for the norm."""
    from comemo_kernels import _unshuffle_norm as _fold

    monkeypatch.setattr(_fold, "NARROW", 16)
    assert _fold._Plan.of(make_inputs()["tokens"], 2, False).wide
    for dtype in DTYPES:
        for grad in ((), EVERY, ("tokens",), ("norm_bias",)):
            assert_matches(*both(), make_inputs(T=3, C=12, dtype=dtype, grad=grad))


def test_strides_change_nothing():
    """Tokens as a tower may hand them on, and views that begin where no 128 bits do."""
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
    """A frozen tower, a frozen projector: what remains gets the gradient of all."""
    whole = evaluate(project_tiles, make_inputs(grad=EVERY))
    part = evaluate(project_tiles, make_inputs(grad=set(EVERY) - frozen))
    assert len(part) == 2
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name])


def test_outlier_channels():
    """InternViT's tokens hold channels hundreds of times as large as the others."""
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


# --- both destinations ---

# Prompts of two, no and one tile, padded on the left, with text ahead and behind.
RAGGED = torch.zeros(3, 14, dtype=torch.bool)
RAGGED[0, 3:11] = RAGGED[2, 9:13] = True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_sequence_and_media_are_written_together(dtype, wide):
    inputs, mask = make_inputs(T=3, dtype=dtype), RAGGED.to(DEVICE)
    wanted = project_tiles(**inputs)
    embeds = torch.randn(3, 14, 24, device=DEVICE, dtype=torch.float32 if wide else dtype)
    before = embeds.clone()
    held = torch.full((20, 32), float("nan"), device=DEVICE, dtype=dtype)
    media = held[4:16, :24]
    found = project_tiles(
        **inputs, media=media, embeds=embeds, rows=image_rows(mask, 3 * 4), version="v2"
    )
    assert found.data_ptr() == media.data_ptr()
    assert torch.equal(found, wanted)
    assert torch.equal(media, wanted.flatten(0, 1))
    assert torch.equal(embeds[mask], media.to(embeds.dtype))
    assert torch.equal(embeds[~mask], before[~mask])
    assert held[:4].isnan().all()
    assert held[16:].isnan().all()
    assert held[:, 24:].isnan().all()


def test_either_destination_alone():
    inputs, mask = make_inputs(T=3), RAGGED.to(DEVICE)
    wanted, media = project_tiles(**inputs), torch.empty(12, 24, device=DEVICE)
    assert torch.equal(project_tiles(**inputs, media=media), wanted)
    assert torch.equal(media, wanted.flatten(0, 1))
    embeds = torch.zeros(3, 14, 24, device=DEVICE)
    version = embeds._version
    found = project_tiles(**inputs, embeds=embeds, rows=image_rows(mask, 12))
    assert torch.equal(found, wanted)
    assert torch.equal(embeds[mask], wanted.flatten(0, 1))
    assert embeds._version > version, "autograd must notice"


def test_parts_of_the_tiles_are_the_whole():
    """What bounded memory takes: tiles in rounds, each into its rows of both."""
    inputs, rows = make_inputs(T=3), image_rows(RAGGED.to(DEVICE), 12)
    whole, media = (torch.zeros(12, 24, device=DEVICE) for _ in range(2))
    wanted, embeds = (torch.zeros(42, 24, device=DEVICE) for _ in range(2))
    project_tiles(**inputs, media=whole, embeds=wanted, rows=rows)
    for first, last in ((0, 2), (2, 3)):
        part = inputs | {"tokens": inputs["tokens"][first:last]}
        at = slice(4 * first, 4 * last)
        project_tiles(**part, media=media[at], embeds=embeds, rows=rows[at])
    torch.testing.assert_close(media, whole)
    torch.testing.assert_close(embeds, wanted)


def test_gradients_of_both_destinations():
    """Of the sequence and of the media, and none for the words that image tokens replace."""
    rows = image_rows(RAGGED.to(DEVICE), 12)

    def op(project):
        def run(words, **given):
            embeds = words.clone()
            media = project(**given, embeds=embeds, rows=rows)
            return tuple(t for t in (media, embeds) if t.requires_grad)

        return run

    words = torch.randn(3, 14, 24, device=DEVICE, requires_grad=True)
    for learning in (EVERY, (), ("bias2",)):
        inputs = make_inputs(T=3, grad=learning) | {"words": words}
        assert_matches(op(project_tiles), op(reference.project_tiles), inputs)
        grad = evaluate(op(project_tiles), inputs)["gradient of words"]
        assert not grad[RAGGED].any()
        assert (grad[~RAGGED] != 0).all()


@pytest.mark.kernel
def test_rows_outside_the_sequence_are_not_written(monkeypatch):
    """As on a GPU, where rows cannot be looked at beforehand."""
    monkeypatch.setattr("comemo_kernels.reference.tiles._check_rows", lambda *_: None)
    inputs = make_inputs(T=1)
    rows = torch.tensor([-1, 2, 5, 2**40], device=DEVICE)
    held = torch.full((7, 24), 5.0, device=DEVICE)
    found = project_tiles(**inputs, embeds=held[1:6], rows=rows)
    assert torch.equal(held[3], found[0, 1])
    assert (held[[0, 1, 2, 4, 5, 6]] == 5).all()


def test_rows_of_a_mask():
    assert image_rows(RAGGED, 12).tolist() == [*range(3, 11), *range(37, 41)]
    assert image_rows(RAGGED[1], 0).shape == (0,)
    for mask, count, message in (
        (RAGGED, 8, r"the tiles have 8 image tokens, image_mask \(3, 14\) holds 12: \[8, 0, 4\]"),
        (RAGGED.int(), 12, r"image_mask must be bool \[..., N\], got torch.int32 \(3, 14\)"),
        (torch.tensor(True), 1, r"got torch.bool \(\)"),
    ):
        with pytest.raises(ValueError, match=f"^image_rows: .*{message}"):
            image_rows(mask, count)


# --- elsewhere ---


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


# --- contract with torch ---


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    from comemo_kernels import _unshuffle_norm as _fold
    from comemo_kernels import tiles

    operands = tuple(make_inputs(T=3, dtype=torch.float16, device=real_device).values())
    media, embeds = (torch.zeros(n, 24, device=real_device).half() for n in (12, 42))
    rows = image_rows(RAGGED.to(real_device), 12)
    for keep in (False, True):
        opcheck(tiles._project, (*operands, 2, False, 1e-5, keep))
    opcheck(tiles._project_, (media, embeds, rows, *operands, 2, True, 1e-5))
    opcheck(tiles._project_, (media, None, None, *operands, 2, False, 1e-5))
    _, normed, stats, before = tiles._project(*operands, 2, False, 1e-5, True)
    opcheck(tiles._gelu_gradient, (media, before))
    for flags in ((True, True), (False, True), (True, False)):
        inputs = (normed, *operands[:2], stats, 2, False, *flags)
        opcheck(_fold.fold_norm_gradient_op, inputs)


# What the reference asks of a raster's size keeps the compiler busy where sizes are unknown.
DYNAMIC = pytest.param(True, marks=() if INTERPRET or GPU else pytest.mark.slow)


@pytest.mark.parametrize("dynamic", [False, DYNAMIC])
@TRACED
def test_compiles_whole(real_device, dynamic):
    torch._dynamo.reset()
    backend = "inductor" if GPU else "aot_eager"
    compiled = torch.compile(project_tiles, fullgraph=True, dynamic=dynamic, backend=backend)

    def into(op):
        def run(embeds, rows, media, **given):
            embeds = embeds.clone()
            op(**given, media=media, embeds=embeds, rows=rows)
            return embeds

        return run

    whole = torch.compile(into(project_tiles), fullgraph=True, dynamic=dynamic, backend=backend)
    for T in (2, 3):
        inputs = make_inputs(T, device=real_device)
        torch.testing.assert_close(compiled(**inputs), project_tiles(**inputs))
        inputs |= {"embeds": torch.zeros(30, 24, device=real_device)}
        inputs |= {"rows": torch.arange(4 * T, device=real_device) + 3}
        media, wanted = (torch.zeros(4 * T, 24, device=real_device) for _ in range(2))
        ours, theirs = whole(media=media, **inputs), into(project_tiles)(media=wanted, **inputs)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(media, wanted)
    inputs = make_inputs(grad=EVERY, device=real_device)
    ours = evaluate(compiled, inputs)
    for name, value in evaluate(project_tiles, inputs).items():
        torch.testing.assert_close(ours[name], value)


@pytest.mark.parametrize("grad", [(), EVERY], ids=["plain", "gradients"])
def test_autocast_is_pytorchs(grad):
    half, inputs = torch.bfloat16, make_inputs(grad=grad)
    for tokens in (inputs["tokens"], inputs["tokens"].detach().to(half)):
        with torch.autocast(DEVICE, half):
            ours, theirs = (
                evaluate(project, inputs | {"tokens": tokens})
                for project in (project_tiles, reference.project_tiles)
            )
        assert ours["output 0"].dtype == half
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype, name
            error = (value.float() - theirs[name].float()).abs().max()
            assert error < 2e-2 * theirs[name].abs().max(), name


@pytest.mark.gpu
def test_a_graph_replays_it():
    inputs = make_inputs(T=3, C=64, d=128, dtype=torch.bfloat16)
    rows = image_rows(RAGGED.to(DEVICE), 12)
    media, wanted = (torch.zeros(12, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    embeds = torch.zeros(42, 128, device=DEVICE, dtype=torch.bfloat16)
    project_tiles(**inputs, media=wanted, embeds=embeds, rows=rows)
    replay = capture(lambda: project_tiles(**inputs, media=media, embeds=embeds, rows=rows), DEVICE)
    for _ in range(3):
        media.fill_(float("nan"))
        replay()
        assert torch.equal(media, wanted)


# --- errors ---


def place(**changes):
    """embeds and rows that fit `make_inputs()`, changed."""
    return {
        "embeds": torch.zeros(2, 9, 24, device=DEVICE),
        "rows": torch.arange(8, device=DEVICE),
    } | changes


WRONG = {
    "no square": (lambda i: {"tokens": i["tokens"][:, :16]}, r"a class token and a square, got"),
    "no class token": (lambda i: {"tokens": i["tokens"][:, 1:]}, r"\[T, 1 \+ h\*h, C\].*2, 16, 8"),
    "class token alone": (lambda i: {"tokens": i["tokens"][:, :1]}, "a square, got .*2, 1, 8"),
    "one tile": (lambda i: {"tokens": i["tokens"][0]}, r"tokens must be .*got .*\(17, 8\)"),
    "integers": (lambda i: {"tokens": i["tokens"].int()}, "must be floats .*torch.int32"),
    "a fold of three": (lambda i: {"ratio": 1 / 3}, "raster of 4 x 4 cannot be folded by 3 x 3"),
    "a ratio of no integer": (lambda i: {"ratio": 0.4}, "1 over an integer, got 0.4"),
    "no ratio": (lambda i: {"ratio": 0}, "1 over an integer, got 0"),
    "a version": (lambda i: {"version": "v3"}, "'v1' or 'v2', got 'v3'"),
    "another activation": (lambda i: {"activation": "silu"}, "must be 'gelu', .* got 'silu'"),
    "a narrow norm": (
        lambda i: {"norm_weight": i["norm_weight"][1:]},
        r"norm_weight must be torch.float32 \(32,\) .*tokens \(2, 17, 8\) folded by 2 x 2.*\(31,\)",
    ),
    "a narrow bias": (lambda i: {"norm_bias": i["norm_bias"][1:]}, r"norm_bias .*\(32,\)"),
    "the other fold": (lambda i: {"ratio": 1.0}, r"norm_weight must be .*\(8,\).*by 1 x 1"),
    "a turned weight": (lambda i: {"weight1": i["weight1"].T}, r"weight1 must be .*\(32, 32\)"),
    "a number": (lambda i: {"weight1": i["weight1"][0, 0]}, r"weight1 must be .*\(1, 32\)"),
    "a short bias": (lambda i: {"bias1": i["bias1"][1:]}, r"bias1 must be .*\(24,\).*\(23,\)"),
    "a second width": (lambda i: {"weight2": i["weight2"][:, 1:]}, r"weight2 must be .*\(24, 24\)"),
    "a long bias": (lambda i: {"bias2": i["weight2"][0].repeat(2)}, r"bias2 .*\(24,\).*\(48,\)"),
    "two dtypes": (lambda i: {"weight2": i["weight2"].half()}, "weight2 must be torch.float32"),
    "two devices": (lambda i: {"bias1": i["bias1"].to("meta")}, "bias1 must be .* on meta"),
    "media too short": (
        lambda i: {"media": i["tokens"].new_zeros(7, 24)},
        r"media must be torch.float32 \(8, 24\) .* got torch.float32 \(7, 24\)",
    ),
    "embeds alone": (lambda i: place(rows=None), "embeds and rows go together"),
    "rows alone": (lambda i: place(embeds=None), "embeds and rows go together"),
    "narrow embeds": (lambda i: place(embeds=torch.zeros(9, 23)), r"\[..., 24\].*\(9, 23\)"),
    "turned embeds": (
        lambda i: place(embeds=torch.zeros(24, 9, device=DEVICE).T),
        r"must be contiguous floats .* of strides \(1, 9\)",
    ),
    "rows of fewer tiles": (
        lambda i: place(rows=torch.arange(4, device=DEVICE)),
        r"rows must be int64 \[8\] .*one for each image token, got torch.int64 \(4,\)",
    ),
    "rows as a mask": (
        lambda i: place(rows=torch.ones(2, 9, device=DEVICE).bool()),
        r"rows must be int64 \[8\] .* got torch.bool \(2, 9\)",
    ),
}
if DEVICE == "cpu":
    WRONG["rows outside"] = (
        lambda i: place(rows=torch.arange(8) + 11),
        "rows must lie in the 18 of embeds, got 11 to 18",
    )


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("project", [project_tiles, reference.project_tiles], ids=["op", "ref"])
def test_says_what_is_wrong_and_writes_nothing(case, project):
    change, message = WRONG[case]
    inputs = make_inputs()
    media = torch.zeros(8, 24, device=DEVICE)
    given = place() | {"media": media} | inputs | change(inputs)
    with pytest.raises(ValueError, match=f"^project_tiles: .*{message}"):
        project(**given)
    for written in (given["media"], given["embeds"]):
        assert written is None or not written.any()


@pytest.mark.parametrize("project", [project_tiles, reference.project_tiles], ids=["op", "ref"])
def test_media_exclude_gradients(project):
    for name in EVERY:
        inputs, media = make_inputs(grad=[name]), torch.zeros(8, 24, device=DEVICE)
        with pytest.raises(ValueError, match="media to be written exclude gradients"):
            project(**inputs, media=media)
        assert not media.any()
        with torch.no_grad():
            project(**inputs, media=media)
        assert media.any()
    words = torch.zeros(9, 24, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="media to be written exclude gradients"):
        project(**make_inputs(), media=media, **place(embeds=words * 1))


@pytest.mark.kernel
def test_says_what_a_kernel_cannot_do():
    inputs = make_inputs()
    turned = torch.stack([inputs["tokens"]] * 2, -1)[..., 0]
    for changes, message in (
        ({n: t.double() for n, t in inputs.items()}, "float64 has no kernel"),
        ({"tokens": turned}, "C must be contiguous, got strides"),
        ({"weight1": inputs["weight1"].T.contiguous().T}, "weights must be contiguous"),
        ({"media": torch.zeros(24, 8, device=DEVICE).T}, "d must be contiguous"),
    ):
        with pytest.raises(ValueError, match=f"^project_tiles: on a GPU .*{message}.*reference"):
            project_tiles(**inputs | changes)
    wide = make_inputs(T=1, side=1, n=1, C=65537, d=1)
    with pytest.raises(ValueError, match="must be at most 65536, got 131072"):
        project_tiles(**wide, ratio=1.0)
