"""Tile projection: both destinations, torch.compile, opcheck, autocast, CUDA graphs."""

import pytest
import torch
from conftest import DEVICE, DTYPES, GPU, TRACED
from harness import assert_matches, evaluate
from test_tiles import EVERY, make_inputs
from torch.library import opcheck

from comemo_kernels import capture, image_rows, project_tiles, reference

pytestmark = [pytest.mark.kernel(reference=True), pytest.mark.usefixtures("one_thread")]

# Prompts of two, no and one tile, padded on the left, with text before and after.
RAGGED = torch.zeros(3, 14, dtype=torch.bool)
RAGGED[0, 3:11] = RAGGED[2, 9:13] = True


# --- both destinations ---


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
    assert embeds._version > version, "autograd must see the write"


def test_parts_of_the_tiles_are_the_whole():
    """Tiles in rounds, for bounded memory: each round writes its rows of both."""
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
    """Of the sequence and of the media; zero for the words that image tokens replace."""
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
    """As on a GPU, where a check of rows would be a sync."""
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


# --- contract with torch ---


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    from comemo_kernels import tiles
    from comemo_kernels._gelu_gradient import gelu_gradient_op
    from comemo_kernels._unshuffle_norm import fold_norm_gradient_op

    operands = tuple(make_inputs(T=3, dtype=torch.float16, device=real_device).values())
    media, embeds = (torch.zeros(n, 24, device=real_device).half() for n in (12, 42))
    rows = image_rows(RAGGED.to(real_device), 12)
    for keep in (False, True):
        opcheck(tiles._project, (*operands, 2, False, 1e-5, keep))
    opcheck(tiles._project_, (media, embeds, rows, *operands, 2, True, 1e-5))
    opcheck(tiles._project_, (media, None, None, *operands, 2, False, 1e-5))
    _, normed, stats, before = tiles._project(*operands, 2, False, 1e-5, True)
    opcheck(gelu_gradient_op, (media, before))
    for flags in ((True, True), (False, True), (True, False)):
        inputs = (normed, *operands[:2], stats, 2, False, *flags)
        opcheck(fold_norm_gradient_op, inputs)


# The reference's checks of a raster's size take the compiler long where sizes are symbolic.
DYNAMIC = pytest.param(True, marks=() if GPU else pytest.mark.slow)


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
