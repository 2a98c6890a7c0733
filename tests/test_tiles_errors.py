"""Tile projection: every error, before anything is written."""

import pytest
import torch
from conftest import DEVICE
from test_tiles import EVERY, make_inputs

from comemo_kernels import project_tiles, reference

pytestmark = [pytest.mark.kernel(reference=True), pytest.mark.usefixtures("one_thread")]


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
