"""DTensors that operations refuse: the errors name function, argument, placements and remedy."""

import re

import pytest
import torch
from rank_processes import run_ranks
from sharded_calls import (
    GRIDS,
    HEADS,
    MEMORY,
    PROMPTS,
    QUARTERS,
    ROWS,
    SUM,
    TOKENS,
    WHOLE,
    attended,
    changed,
    linear,
    place,
    projected,
    residual,
    rotary,
    table,
    tensor,
    tiles,
)

import comemo_kernels as ops

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """DTensor imports PyTorch's compiler, for 2 s: here, and not in every rank."""
    import torch._dynamo  # noqa: F401


REFUSALS = {
    "a placement without a rule": (
        "attend_spans",
        attended,
        {"q": HEADS},
        r"attend_spans: k must be a DTensor with Shard\(dim=1\) on dimension 0 \('ranks'\) of the"
        r" mesh, beside the other arguments, got placements \(Replicate\(\),\): redistribute it to"
        r" \[Shard\(dim=1\)\], or pass local tensors \(.to_local\(\)\)",
    ),
    "spans of all prompts": (
        "attend_spans",
        attended,
        PROMPTS | {"spans": WHOLE},
        r"attend_spans: spans must be a DTensor with Shard\(dim=0\) .* got placements \(Rep",
    ),
    "a memory that is split by tokens": (
        "attend_spans",
        attended,
        {"k": ROWS, "v": ROWS},
        r"attend_spans: k must be a DTensor with Replicate\(\) .* got placements \(Shard\(dim=0\)",
    ),
    "keys and values that a rank does not have both of": (
        "project_memory",
        projected,
        {"kv_weights": ROWS},
        r"project_memory: kv_weights\[0\] must be a DTensor with _StridedShard\(dim=0, .*=2\) on",
    ),
    "quarters of keys and values": (
        "project_memory",
        projected,
        {"kv_weights": QUARTERS},
        r"project_memory: kv_weights\[0\] must be a DTensor with _Str.*=2\) .* \(_Str.*=4\),\): re",
    ),
    "a maximum in place of a sum": (
        "gated_residual",
        residual,
        {"x": tensor.Partial("max"), "a": HEADS, "weight": TOKENS},
        r"gated_residual: x must be a DTensor with .* got placements \(Partial\(max\),\)",
    ),
    "a sum where terms do not add up": (
        "norm_linear",
        linear,
        {"x": SUM},
        r"norm_linear: x must be a DTensor with .* got placements \(Partial\(sum\),\): redist",
    ),
    "a weight that is split by its inputs": (
        "norm_linear",
        linear,
        {"weight": TOKENS},
        r"norm_linear: weight must be a DTensor with Shard\(dim=0\) .* \(Shard\(dim=1\),\)",
    ),
    "heads that cannot be split equally": (
        "apply_rotary",
        lambda: rotary(k=torch.randn(2, 4, 3, 16)),
        {"q": HEADS, "k": HEADS},
        "apply_rotary: dimension 2 of k must be a multiple of 2, the ranks that split it, got 3",
    ),
    "rows of other prompts": (  # one rank has as many of them as of q
        "attend_spans",
        lambda: attended(spans=torch.zeros(3, 1, 2).int()),
        PROMPTS,
        "attend_spans: dimension 0 of spans must be 2, like that of q, got 3",
    ),
    "grids by prompts": (
        "apply_rotary",
        lambda: rotary(positions=GRIDS),
        {"q": ROWS, "k": ROWS},
        r"apply_rotary: q must be a DTensor with .* got placements \(Shard\(dim=0\),\)",
    ),
    "writing in place": (
        "apply_rotary",
        lambda: rotary(inplace=True),
        {"q": HEADS, "k": HEADS},
        "apply_rotary: inplace must be False beside a DTensor, which is not written in place: pass",
    ),
    "a workspace": (
        "attend_spans",
        lambda: attended(workspace=ops.attention_workspace(*list(attended().values())[:2])),
        MEMORY,
        "attend_spans: workspace must be None beside a DTensor",
    ),
    "destinations": (
        "project_tiles",
        lambda: tiles() | {"embeds": torch.zeros(9, 8)},
        {"tokens": ROWS},
        "project_tiles: embeds must be None beside a DTensor",
    ),
    "an operation without a rule": (
        "fold_tiles",
        lambda: {"tokens": torch.zeros(2, 4, 4, 4), "ratio": 0.5},
        {"tokens": ROWS},
        r"fold_tiles: tokens must be a plain tensor, because fold_tiles has no rule for a DTensor,"
        r" got one with placements \(Shard\(dim=0\),\): pass tokens.to_local\(\)",
    ),
    "another kind of argument": (
        "norm_linear",
        lambda: linear() | {"weight": 3},
        {"x": ROWS},
        "norm_linear: weight must be a dense tensor with values, got 3",
    ),
}


def message(verb, args):
    try:
        getattr(ops, verb)(**args)
    except ValueError as error:
        return str(error)
    return "no error"


def refuse():
    """The error of each case, with DTensors of these placements; then of some other mixtures."""
    mesh = tensor.init_device_mesh("cpu", (2,), mesh_dim_names=("ranks",))
    other = tensor.init_device_mesh("cpu", (2, 1))
    told = {}
    torch.manual_seed(0)
    for name, (verb, make, places, _) in REFUSALS.items():

        def set_place(path, x, places=places):
            return place(x, mesh, (places.get(path, WHOLE),))

        told[name] = message(verb, {n: changed(n, x, set_place) for n, x in make().items()})
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    ours = place(x, mesh, (ROWS,))
    told["plain"] = message("norm_linear", {"x": ours, "norm_weight": None, "weight": weight})
    right = rotary(k=None)
    q, cos = place(right["q"], mesh, (HEADS,)), right["cos"].requires_grad_()
    told["learns"] = message("apply_rotary", right | {"q": q, "cos": cos})
    right = attended(rotation=None)
    places = {"q": (ROWS,), "k": (WHOLE,), "v": (WHOLE,)}
    split = {name: place(right[name], mesh, held) for name, held in places.items()}
    told["spans"] = message("attend_spans", right | split)
    split = place(weight, other, (ROWS, WHOLE))
    told["mesh"] = message("norm_linear", {"x": ours, "norm_weight": None, "weight": split})
    cos, sin = (place(t, mesh, (WHOLE,)) for t in table())
    right = attended()
    right["rotation"] = right["rotation"]._replace(cos=cos, sin=sin)
    told["rotation"] = message("attend_spans", right)
    memory = ops.ImageMemory(keys={3: place(torch.zeros(4, 2, 16), mesh, (TOKENS,))})
    told["memory"] = message("split_images", {"memory": memory})
    return told


@pytest.fixture(scope="module")
def refused():
    first, second = run_ranks(2, refuse)
    assert first == second
    return first


@pytest.mark.parametrize("name", REFUSALS)
def test_what_has_no_rule_is_refused_by_name(name, refused):
    assert re.match(REFUSALS[name][-1], refused[name]), refused[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("plain", "norm_linear: weight must be a DTensor like x, which has placements .*Shard"),
        ("learns", "apply_rotary: cos must be a DTensor like q, .* a plain tensor: distribute it"),
        ("spans", r"attend_spans: spans must be a DTensor with Shard.*=0\) .* taken for whole: re"),
        (
            "mesh",
            r"norm_linear: weight must be on the mesh of x, .*, got placements \(Shard.* on D",
        ),
        ("rotation", "attend_spans: q must be a DTensor like rotation.cos, .* got a plain tensor"),
        ("memory", r"split_images: memory.keys\[3\] must be a plain tensor, because split_images"),
    ],
)
def test_mixtures_are_refused(name, told, refused):
    assert re.match(told, refused[name]), refused[name]
