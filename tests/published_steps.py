"""The patched published model with fused decode steps: fixtures and comparisons."""

import contextlib
import copy

import pytest
import torch
import virtual_gpu
from conftest import GPU, SLOW
from patching import prompt_of, tiny_published, unchanged
from transformers import LogitsProcessorList

import comemo_kernels as ops
from bench.published_model.chat_model import repair_generate
from comemo_kernels.patching import published_decode
from comemo_kernels.patching.published_decode import Decoding

TOKENS = 11
GREEDY = {
    "max_new_tokens": TOKENS,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
}


@pytest.fixture
def made(monkeypatch):
    """The `Decoding` of each call of the patched `generate`; steps are fused on a CPU, too."""
    found: list[Decoding] = []

    def spy(self, room, init=Decoding.__init__):
        init(self, room)
        found.append(self)

    monkeypatch.setattr(Decoding, "__init__", spy)
    monkeypatch.setattr(published_decode, "DEVICES", {"cpu", "cuda"})
    return found


@pytest.fixture(params=["gpu", pytest.param("cpu", marks=SLOW)])
def place(request, virtual):
    """A device: the CPU, or a GPU, real or virtual, where steps are captured and replayed."""
    with contextlib.ExitStack() as stack:
        if request.param == "gpu" and not virtual and not GPU:
            stack.enter_context(virtual_gpu.present())
        yield "cuda" if request.param == "gpu" else "cpu"


@pytest.fixture
def model():
    return tiny_published()


def generate(model, *grids, **options):
    inputs = {name: t.to(model.device) for name, t in prompt_of(*grids).items()}
    if "processor" in options:
        options["logits_processor"] = LogitsProcessorList([options.pop("processor")()])
    torch.manual_seed(4)
    return model.generate(**inputs, **(GREEDY | options))


def assert_same(ours, wanted):
    assert torch.equal(ours.sequences, wanted.sequences)
    for one, other in zip(ours.scores, wanted.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-4)


def cache_of(output):
    """Also of releases that call it by another name."""
    return output.cache if "cache" in output else output.past_key_values


def compare(model, *grids, **options):
    """Generate with steps, and compare with the model as it was."""
    published = generate(repair_generate(copy.deepcopy(model)), *grids, **options)
    with unchanged(model), ops.patched(model):
        ours = generate(model, *grids, **options)
    assert_same(ours, published)
    return ours
