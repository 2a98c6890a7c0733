"""What `comemo_kernels.nn` refuses: a ValueError names the argument, and nothing is changed."""

import dataclasses
import random

import odd
import pytest
import torch
from nn_layers import B, N, make_layer, make_memory, prompts, randoms

from comemo_kernels import ImageMemory
from comemo_kernels.nn import fill_memory

OTHER = {0: torch.ones(16, 2, 16)}  # of a layer with other heads


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_heads": 0}, "num_heads must be an integer from 1"),
        ({"head_dim": 15}, "head_dim must be even, got 15"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_heads 4, got 3"),
        ({"shared_norm": True}, "media_dim must be dim 64 with shared_norm, got 48"),
        ({"recompute": "all"}, "recompute must be 'cheap' or 'projections', got 'all'"),
        ({"layer_idx": -1}, "layer_idx must be an integer from 0"),
    ],
)
def test_invalid_settings_are_refused(change, told):
    with pytest.raises(ValueError, match=f"GatedCrossAttention: {told}"):
        make_layer("cpu", **change)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.ones(2, 64)}, r"x must be floats \[B, N, 64\], got torch.float32 \(2, 64\)"),
        ({"x": None}, r"x must be floats \[B, N, 64\], got NoneType"),
        ({"x": torch.ones(2, 20, 60)}, r"x must be floats \[B, N, 64\], got .* \(2, 20, 60\)"),
        ({"media": torch.ones(3, 4, 48)}, r"media must be .* \[2, M, media_dim\] .* \(3, 4, 48\)"),
        ({"media": torch.ones(2, 4, 40)}, r"media must be floats \[M, 48\], got .* \(8, 40\)"),
        ({"media": [1]}, "media must be an ImageMemory, .* got list"),
        ({"positions": None}, "positions must be given for a memory with a table"),
        ({"media": torch.ones(2, 4, 48)}, "positions must .* got .* without a table"),
        ({"media": {"spans": None}}, "spans must be given"),
        ({"media": {"ids": None}}, "with media and a table must have the ids"),
        ({"media": {"keys": OTHER, "values": OTHER}}, r"keys of layer 0 must be \[M, 4, 16\], got"),
        ({"media": {"media": None}}, "must hold keys of layer 0, or media to build them from"),
        ({"media": {"table": (torch.ones(9, 4),) * 2}}, r"table .* must be \[P, 16/2\]"),
        ({"active": torch.ones(2, 20, dtype=torch.bool)}, r"active must be bool \(2, 1, 1\) or"),
        ({"positions": torch.ones(2, 20)}, "rotation.positions must be int32 or int64"),
        ({"spans": torch.zeros(2, 3, 2).long()}, "spans must be int32 or int64"),
        ({"x": torch.ones(2, 20, 64).double()}, "float64"),
    ],
)
def test_invalid_arguments_are_refused(change, told):
    layer, media = make_layer("cpu"), randoms(16, 48, device="cpu")
    given = {"x": randoms(B, N, 64, device="cpu"), "positions": prompts("cpu")[0]}
    given["media"] = make_memory(media)
    if isinstance(change.get("media"), dict):
        change = {"media": dataclasses.replace(given["media"], **change["media"])}
    with pytest.raises(ValueError, match=told):
        layer(**given | change)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ([], "layers must be GatedCrossAttention modules"),
        ([make_layer("cpu"), make_layer("cpu")], "each of another layer_idx"),
        ([torch.nn.Linear(2, 2)], "layers must be GatedCrossAttention modules"),
        ([3], r"layers must be GatedCrossAttention modules.*got \['int'\]"),
    ],
    ids=["none", "twice", "other", "no"],
)
def test_invalid_layers_are_refused(layers, told):
    memory = make_memory(randoms(16, 48, device="cpu"))
    with pytest.raises(ValueError, match=f"fill_memory: .*{told}"):
        fill_memory(layers, memory)
    with pytest.raises(ValueError, match="fill_memory: memory must have media"):
        fill_memory([make_layer("cpu")], ImageMemory())


def test_an_interrupted_filling_leaves_the_memory_as_it_was():
    memory = make_memory(randoms(16, 48, device="cpu"))
    wide = make_layer("cpu", layer_idx=1, media_dim=40)
    with pytest.raises(ValueError, match=r"fill_memory: media must be floats \[M, 40\], got"):
        fill_memory([make_layer("cpu"), wide], memory)
    assert memory.keys == memory.values == {}


CALLS = {
    "forward": lambda layer, x, media, memory: (
        layer.forward,
        {"x": x, "media": media, "spans": memory.spans, "active": None},
    ),
    "forward with a memory": lambda layer, x, media, memory: (
        layer.forward,
        {"x": x, "media": memory, "positions": prompts("cpu")[0]},
    ),
    "filling": lambda layer, x, media, memory: (
        fill_memory,
        {"layers": [layer], "memory": memory},
    ),
}


@pytest.mark.no_virtual_gpu("the same checks")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("draws", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_odd_arguments_give_a_result_or_a_value_error(name, draws):
    layer, draw = make_layer("cpu").requires_grad_(False), random.Random(name)
    x, media = randoms(B, N, 64, device="cpu"), randoms(16, 48, device="cpu")
    for _ in range(draws):
        function, arguments = CALLS[name](layer, x, media, make_memory(media))
        arg = draw.choice(list(arguments))
        thing = arguments[arg] = odd.odd_value(draw, arguments[arg])
        before = odd.state(*arguments.values())
        error = odd.raised(function, arguments)
        told = f"{arg}={thing!r:.80}: {error!r}"
        if error is not None:
            assert isinstance(error, ValueError), told
            assert str(error).startswith(f"{function.__qualname__}: "), told
            assert odd.same(before, odd.state(*arguments.values())), f"changed by {told}"
