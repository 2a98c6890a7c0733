"""Patched blocks of open_flamingo compute what they compute unpatched, gradients included."""

import pytest
import torch
from conftest import TRACED
from flamingo_models import VISUAL, WIDTH, assert_as_unpatched, helpers, make_block
from test_decode_graph import NothingRead
from torch import nn

import comemo_kernels
from comemo_kernels.patching.media import keep_while_alive

pytestmark = pytest.mark.usefixtures("one_thread")

# Tokens before any image, after one, after both, and in the third prompt after one too many.
LOCATIONS = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 0, 0]]).bool()


def features(dtype=torch.float32, samples=3, images=2):
    x, media = torch.randn(3, 6, WIDTH), torch.randn(samples, images, 5, VISUAL)
    return x.to(dtype), media.to(dtype)


@pytest.mark.parametrize("latest", [True, False], ids=["latest", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_visibility(latest, dtype):
    block = make_block(latest).to(dtype)
    for given in ((LOCATIONS, False), (LOCATIONS[:, :4], True), (None, True)):
        assert_as_unpatched(block, *features(dtype), *given)


@pytest.mark.parametrize("latest", [True, False], ids=["latest", "all"])
def test_prompts_that_share_their_images(latest):
    for locations in (LOCATIONS, LOCATIONS[:1]):
        assert_as_unpatched(make_block(latest), *features(samples=1), locations)


def test_a_scale_that_was_changed():
    block = make_block()
    block.attn.scale = 0.9
    assert_as_unpatched(block, *features(), LOCATIONS)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(amp):
    block, (x, media) = make_block(), features()

    def run():
        with torch.autocast("cpu", amp):
            out = block(x, media, media_locations=LOCATIONS)
        return [out, *torch.autograd.grad(out.sum(), list(block.parameters()))]

    wanted = run()
    with torch.no_grad():
        exact = block(x, media, media_locations=LOCATIONS)
    with comemo_kernels.patched(block):
        found = run()
    assert (found[0] - exact).abs().max() <= 2 * (wanted[0] - exact).abs().max()
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


def test_errors_are_those_of_the_model():
    block, (x, media) = make_block(), features()
    calls = [
        ((x, media), {"media_locations": LOCATIONS[:, :4]}),
        ((x, media), {}),
        ((x, media[:2]), {"media_locations": LOCATIONS}),
        ((x, media[:, :0]), {"media_locations": LOCATIONS}),
    ]
    for args, kwargs in calls:
        with pytest.raises(Exception) as wanted:  # noqa: PT011
            block(*args, **kwargs)
        with comemo_kernels.patched(block), pytest.raises(type(wanted.value)) as found:
            block(*args, **kwargs)
        assert str(found.value) == str(wanted.value)
        assert "forward" not in vars(block)


class Masked(helpers.MaskedCrossAttention):
    """The same names, another visibility."""

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        return super().forward(x, media, None, True)


class Older(helpers.MaskedCrossAttention):
    """Other arguments."""

    def forward(self, x, media, media_locations=None):
        return super().forward(x, media, media_locations)


class Scaled(helpers.GatedCrossAttentionBlock):
    """The same names, another residual."""

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        return 2 * super().forward(x, media, media_locations, use_cached_media)


@pytest.mark.parametrize("kind", [Masked, Older])
def test_lookalikes_are_left(kind):
    block = make_block()
    block.attn.__class__ = kind
    with pytest.raises(TypeError, match="open_flamingo"):
        comemo_kernels.patch(block)
    mixed = nn.ModuleList([block, make_block()])
    with comemo_kernels.patched(mixed) as patch:
        assert set(patch.report().replaced) == {"1.forward", "1.attn.forward"}
        assert {"0": "GatedCrossAttentionBlock", "0.attn": kind.__name__} == {
            path: reason.split()[0] for path, reason in patch.report().left.items()
        }


def test_the_attention_of_a_foreign_block_is_replaced():
    block = make_block()
    block.__class__ = Scaled
    x, media = features()
    with torch.no_grad():
        wanted = block(x, media, LOCATIONS)
        with comemo_kernels.patched(block) as patch:
            assert list(patch.report().replaced) == ["attn.forward"]
            torch.testing.assert_close(block(x, media, LOCATIONS), wanted)


def test_recognising_runs_no_code_of_the_instance_and_draws_no_numbers():
    block = make_block().to("meta")
    block.attn.register_forward_pre_hook(lambda *_: pytest.fail("the module was called"))
    state = torch.get_rng_state()
    with comemo_kernels.patched(block) as patch:
        assert len(patch.report().replaced) == 2
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@TRACED
def test_it_compiles_whole():
    block, (x, media) = make_block(), features()
    with torch.no_grad():
        wanted = block(x, media, LOCATIONS)
        with comemo_kernels.patched(block):
            compiled = torch.compile(block, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x, media, LOCATIONS), wanted)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("latest", "dtype"), [(True, torch.float32), (False, torch.float16)], ids=str
)
def test_on_kernels(device, latest, dtype):
    block, (x, media) = make_block(latest, dim=16).to(dtype), features(dtype)
    block, x, media, locations = (t.to(device) for t in (block, x, media, LOCATIONS))
    assert_as_unpatched(block, x, media, locations)
    with torch.no_grad(), comemo_kernels.patched(block), NothingRead():
        block(x, media, locations)
        block(x[:, :1], media, locations, True)


def test_results_of_the_inference_mode_and_of_autocast_are_kept_apart():
    owner, media = nn.Linear(2, 2, bias=False).requires_grad_(False), torch.randn(3, 2)

    def project():
        return keep_while_alive(media, owner, (owner.weight,), lambda: owner(media))

    with torch.inference_mode():
        assert project() is project()
        assert project().is_inference()
    assert not project().is_inference()
    assert project() is project()
    with torch.autocast("cpu", torch.bfloat16):
        assert project().dtype == torch.bfloat16
    assert project().dtype == torch.float32
