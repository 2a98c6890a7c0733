"""Models, prompts and comparisons for tests of the decode loop."""

import pytest
import torch
from harness import LOGITS
from small import make_model, make_prompts, place
from transformers.generation.streamers import BaseStreamer

import comemo_kernels as ops
from comemo import DecodeLoop

TOLD = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}


GREEDY = {"max_new_tokens": 7, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def _model():
    return make_model()


@pytest.fixture
def model(_model):
    before = dict(vars(_model.config))
    yield _model
    vars(_model.config).update(before)


@pytest.fixture
def loop(model):
    return DecodeLoop(model)


@pytest.fixture(params=[False, True], ids=["at once", "one step late"])
def ahead(request, monkeypatch):
    """Both ways to check for the end: synchronously, and one step late as on a GPU."""
    monkeypatch.setattr(ops, "runs_ahead", lambda _: request.param)
    return request.param


class Collected(BaseStreamer):
    """Collects tokens; raises at one of them if `fail_at` is given."""

    def __init__(self, fail_at=None):
        self.given, self.ended, self.fail_at = [], 0, fail_at

    @property
    def parts(self):
        return [value.tolist() for value in self.given]

    def put(self, value):
        self.given.append(value)
        if self.fail_at == len(self.given) - 1:  # the first part is the prompt
            raise InterruptedError

    def end(self):
        self.ended += 1


def poison(loop):
    """Fill the buffers with NaN wherever an earlier call wrote."""
    for step in loop._steps.values():
        step.buffers.fill_(float("nan"))
        held = () if step.arena is None else step.arena.memory.keys | step.arena.memory.values
        for tensor in (*(held[i] for i in held), step.logits):
            tensor.fill_(float("nan"))


def assert_same_cache(cache, wanted, tolerance=LOGITS):
    assert cache.get_seq_length() == wanted.get_seq_length()
    for mine, theirs in zip(cache.layers, wanted.layers, strict=True):
        assert mine.keys.shape == theirs.keys.shape
        assert (mine.keys - theirs.keys).abs().max() < tolerance
        assert (mine.values - theirs.values).abs().max() < tolerance


def assert_same(model, loop, batch, **options):
    """Compare one call with the loop to one without; returns the output of the first."""
    options = GREEDY | TOLD | options
    found = []
    for extra in ({}, {"decode_loop": loop}):
        torch.manual_seed(1)
        streamer = Collected()
        given = {n: v() if n == "past_key_values" else v for n, v in options.items()}
        found.append((model.generate(**batch, **given, **extra, streamer=streamer), streamer))
    (wanted, their), (ours, mine) = found
    assert torch.equal(ours.sequences, wanted.sequences)
    for name in ("logits", "scores"):
        assert len(ours[name]) == len(wanted[name])
        for one, other in zip(ours[name], wanted[name], strict=True):
            assert one.shape == other.shape
            assert one.dtype == torch.float32
            same = (one == other) | ((one - other).abs() < LOGITS)  # -inf, where left out
            assert same.all()
    assert_same_cache(ours.past_key_values, wanted.past_key_values)
    assert mine.parts == their.parts
    assert mine.ended == their.ended == 1
    return ours


def without_picture(model):
    """Two prompts; the second has no image."""
    batch = make_prompts(model)
    batch["input_ids"][1].clamp_(max=200)
    batch["pixel_values"], batch["tile_grid"] = batch["pixel_values"][:1], [(1, 1)]
    return batch


def one_prompt(model, grids):
    """A prompt with images of these grids; images of several tiles use fewer ids than tokens."""
    config = model.config
    tiles = [ops.image_tokens(grid, config.side) // config.tokens_per_tile for grid in grids]
    images = sum(tiles) * config.tokens_per_tile
    ids = torch.randint(10, 200, (1, images + 5))
    ids[:, 2 : 2 + images] = config.image_token_id
    side = config.vision_config.image_size[0]
    pixel_values = torch.randn(sum(tiles), 3, side, side)
    return place({"input_ids": ids, "pixel_values": pixel_values, "tile_grid": grids})


def wide_picture(model):
    return one_prompt(model, [(2, 1)])


def text(model, tokens=11):
    return place({"input_ids": torch.randint(10, 200, (2, tokens))})
