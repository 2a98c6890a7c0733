"""Tensors to write are checked before anything is written: an error changes nothing."""

import pytest
import torch
import valid_calls as valid
from odd import refuses

import comemo_kernels as ops
from comemo_kernels import MemoryScales

kernel = pytest.mark.kernel(reference=True)


def leaf(x):
    return x.clone().requires_grad_()


def without_grad(x):
    learnt = leaf(x) * 1
    with torch.no_grad():
        return learnt[...]


def inferred(x):
    with torch.inference_mode():
        return x.clone()


UNWRITABLE = {
    "a leaf": leaf,
    "a view of a leaf": lambda x: leaf(x)[...],
    "one of several views": lambda x: (leaf(x) * 1)[None].unbind(0)[0],
    "made without grad": without_grad,
    "an inference tensor": inferred,
    "expanded": lambda x: x[:1].expand(x.shape),
    "sparse": lambda x: x.to_sparse(),
}


@kernel
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_a_rotation_that_cannot_write_k_does_not_write_q(kind, device):
    right = valid.rotated(device)
    for name in ("q", "k"):
        x = right[name].expand(2, *right[name].shape[1:]) if kind == "expanded" else right[name]
        more = {} if kind != "expanded" else {"q": right["q"].repeat(2, 1, 1, 1)}
        more |= {"k": right["k"].repeat(2, 1, 1, 1)} if kind == "expanded" else {}
        more |= {"positions": right["positions"].repeat(2, 1)} if kind == "expanded" else {}
        refuses(ops.apply_rotary, right | more | {name: UNWRITABLE[kind](x)}, told=f".*{name}")
    refuses(ops.apply_rotary, right | {"k": right["q"]}, told="k, .* at the same address as q")


@kernel
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_unwritable_tensors_raise_before_anything_is_written(kind, device):
    """Keys, values and scales of a memory; media and embeddings."""
    if kind in ("an inference tensor", "expanded", "sparse"):
        right = valid.built(device) if kind == "sparse" else valid.built_in_float8(device)
        for name in ("keys", "values"):
            held = [right[name][0], UNWRITABLE[kind](right[name][1])]
            refuses(ops.build_memory, right | {name: held}, told=f".*{name}")
        right = valid.built(device)
        refuses(
            ops.build_memory,
            right | {"values": right["keys"]},
            told=".* at the same address as keys",
        )
    right = valid.projected(device)
    for name in ("media", "embeds"):
        if kind != "expanded":
            refuses(ops.project_tiles, right | {name: UNWRITABLE[kind](right[name])}, told=".*")


def test_an_unwritable_workspace_raises_before_anything_is_written():
    right = valid.attended("cpu")
    for part in ("out", "lse"):
        for kind in ("a leaf", "an inference tensor", "sparse"):
            room = right["workspace"]
            room = room._replace(**{part: UNWRITABLE[kind](getattr(room, part))})
            refuses(ops.attend_spans, right | {"workspace": room}, told=f"workspace.{part}")


@kernel
@pytest.mark.parametrize("bias", [2**31, -1, 2**63, 1.5, None])
@pytest.mark.parametrize("stored", [torch.float32, valid.FLOAT8])
def test_an_invalid_bias_changes_no_memory(bias, stored, device):
    right = valid.appended(device, valid.memory(device, stored))
    refuses(ops.append_images, right | {"biases": [3, bias]}, told=r"biases\[1\] must be")
    ops.append_images(**right)
    assert right["memory"].biases.tolist() == [[3, 9, 3, 9]]


@kernel
def test_images_of_float8_do_not_share_a_tile(device):
    right = valid.appended(device, valid.memory(device, valid.FLOAT8))
    for sizes in ([6, 2], [2, 2, 2, 2], [1, 7]):
        more = {"sizes": sizes, "biases": None}
        refuses(ops.append_images, right | more, told="images of a float8 memory must be whole")


@kernel
@pytest.mark.parametrize("tile", [0, -4, 1.5])
def test_an_invalid_tile_raises(tile, device):
    right = valid.built_in_float8(device)
    scales = [scale._replace(tile=tile) for scale in right["scales"]]
    refuses(ops.build_memory, right | {"scales": scales}, told="the tile of scales must be")
    right = valid.attended_in_float8(device)
    scales = MemoryScales(*right["scales"][:2], tile)
    refuses(ops.attend_spans, right | {"scales": scales}, told="scales.tile must be")
    memory = valid.memory(device, valid.FLOAT8)
    memory.scales = {n: s._replace(tile=tile) for n, s in memory.scales.items()}
    refuses(ops.append_images, valid.appended(device, memory), told="the tile of the memory must")
    refuses(ops.split_images, {"memory": memory}, told="the tile of a memory must")
    refuses(ops.join_images, {"images": [memory]}, told="the tile of a memory must")
