"""Odd arguments of what is public: a right answer or a ValueError in its name, nothing changed."""

import copy
import inspect
import random
import re

import odd
import pytest
import torch
from conftest import DEVICE, INTERPRET
from torch import Tensor

import comemo_kernels as ops
from comemo_kernels import ImageGrids, ImageMemory, MemoryScales, QueryRotation, reference

PUBLIC = [
    *(f for n in ops.__all__ if inspect.isfunction(f := getattr(ops, n)) and f is not ops.capture),
    *(getattr(reference, n) for n in reference.__all__),
    *(ImageGrids.pack.__func__, ImageGrids.position_ids, ops.HostFlag.__init__, ops.HostFlag.post),
    *(ImageMemory.from_media.__func__, ImageMemory.allocate.__func__, ImageMemory.update),
    *(ImageMemory.reading, ImageMemory.rotation, ImageMemory.key_table),
    ImageMemory.repeat_interleave,
]
kernel = pytest.mark.kernel(reference=True)
DRAWS = 10 if INTERPRET else 40


def bits(x: Tensor) -> Tensor | None:
    if x.layout != torch.strided or x.is_meta:
        return None
    x = x.detach()
    return x.new_empty(x.numel()).copy_(x.flatten()).view(torch.uint8)


def state(*values) -> list:
    """The tensors of values, their bits, and the sizes of a memory."""
    found = [t for value in values for t in odd.tensors(value)]
    told = [(0, str(v.sizes)) for v in values if isinstance(v, ImageMemory)]
    return [*told, *[(id(t), bits(t)) for t in found]]


def same(before: list, after: list) -> bool:
    return len(before) == len(after) and all(
        torch.equal(a[1], b[1]) if isinstance(a[1], Tensor) else a == b
        for a, b in zip(before, after, strict=True)
    )


def raised(function, arguments) -> Exception | None:
    try:
        function(**arguments)
    except Exception as error:
        return error
    return None


def refuses(function, arguments, name=None, told="") -> None:
    """It raises in its own name, and leaves everything as it was."""
    values = [*arguments.values(), getattr(function, "__self__", None)]
    kept = copy.copy(values)  # what is in the place of an argument
    before = state(*values)
    with pytest.raises(ValueError, match=f"^{re.escape(name or function.__qualname__)}: {told}"):
        function(**arguments)
    assert same(before, state(*kept)), "changed"


@kernel
@pytest.mark.parametrize("draws", [DRAWS, pytest.param(10 * DRAWS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", odd.RIGHT)
def test_odd_arguments_are_answered_or_refused(name, draws, device):
    function, right = odd.RIGHT[name](device)
    function(**right)
    draw = random.Random(name)
    for _ in range(draws):
        function, arguments = odd.RIGHT[name](device)
        arg = draw.choice(list(arguments))
        thing = arguments[arg] = odd.odd_thing(draw, arguments[arg])
        values = [*arguments.values(), getattr(function, "__self__", None)]
        before = state(*values)
        error = raised(function, arguments)
        told = f"{arg}={thing!r:.80}: {error!r}"
        if error is not None:
            assert isinstance(error, ValueError), told
            assert str(error).startswith(f"{name.split()[0]}: "), told
            assert same(before, state(*values)), f"changed by {told}"


def test_everything_public_tells_types():
    for function in PUBLIC:
        inner = function.__wrapped__
        assert inspect.signature(function) == inspect.signature(inner)
        assert function.__doc__ == inner.__doc__


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("apply_rotary", {"q": None}, "q must be a dense tensor with values, got None"),
        ("apply_rotary", {"inplace": [1], "cos": "x"}, "cos must be a dense tensor .*, got 'x'"),
        ("apply_rotary by grids", {"cos": 3}, "cos must be .*, got 3"),
        ("norm_linear", {"weight": [1.0]}, "weight must be a dense tensor .*, got list"),
        ("norm_linear", {"eps": "x"}, "eps must be a number of 64 bits, got 'x'"),
        (
            "build_memory",
            {"kv_weights": [torch.ones(32, 4, device=DEVICE), 3]},
            r"kv_weights\[1\] must be a dense tensor with values, got 3",
        ),
        ("rope_dhr_positions", {"grids": 7}, r"grids must be a sequence, each part \(an integer"),
        ("capture", {"device": "nothing"}, "device must be a device, got 'nothing'"),
        ("memory_buffers", {"dtype": "float32"}, "dtype must be a torch.dtype, got 'float32'"),
        ("join_images", {"images": [ImageMemory(ids=3)]}, r"images\[0\].ids must be .*, got 3"),
    ],
)
def test_an_argument_of_another_type_is_named(name, change, told):
    function, right = odd.RIGHT[name](DEVICE)
    refuses(function, right | change, told=told)
    assert raised(function, right | change).__cause__ is not None


def test_an_error_that_no_type_explains_comes_as_it_is(monkeypatch):
    _, right = odd.RIGHT["norm_linear"]("cpu")
    error = RuntimeError("no memory left")

    def fail(*args):
        raise error

    monkeypatch.setattr(reference.fused_linear, "product", fail)
    assert raised(reference.norm_linear, right) is error
    with pytest.raises(TypeError, match=r"norm_linear\(\) missing 1 required"):
        ops.norm_linear(right["x"], right["norm_weight"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        ops.norm_linear(**right, epsilon=1)


# --- what is written is looked at before anything is ---


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
def test_a_rotation_that_cannot_write_k_leaves_q(kind, device):
    right = odd.rotated(device)
    for name in ("q", "k"):
        x = right[name].expand(2, *right[name].shape[1:]) if kind == "expanded" else right[name]
        more = {} if kind != "expanded" else {"q": right["q"].repeat(2, 1, 1, 1)}
        more |= {"k": right["k"].repeat(2, 1, 1, 1)} if kind == "expanded" else {}
        more |= {"positions": right["positions"].repeat(2, 1)} if kind == "expanded" else {}
        refuses(ops.apply_rotary, right | more | {name: UNWRITABLE[kind](x)}, told=f".*{name}")
    refuses(ops.apply_rotary, right | {"k": right["q"]}, told="k, .* begins where q does")


@kernel
@pytest.mark.parametrize("kind", UNWRITABLE)
def test_what_cannot_be_written_is_refused_before_anything_is(kind, device):
    """Keys, values and scales of a memory; media and embeddings."""
    if kind in ("an inference tensor", "expanded", "sparse"):
        right = odd.built(device) if kind == "sparse" else odd.built_in_float8(device)
        for name in ("keys", "values"):
            held = [right[name][0], UNWRITABLE[kind](right[name][1])]
            refuses(ops.build_memory, right | {name: held}, told=f".*{name}")
        right = odd.built(device)
        refuses(ops.build_memory, right | {"values": right["keys"]}, told=".* begins where keys")
    right = odd.projected(device)
    for name in ("media", "embeds"):
        if kind != "expanded":
            refuses(ops.project_tiles, right | {name: UNWRITABLE[kind](right[name])}, told=".*")


def test_a_workspace_of_gradients_is_refused_before_anything_is_written():
    right = odd.attended("cpu")
    for part in ("out", "lse"):
        for kind in ("a leaf", "an inference tensor", "sparse"):
            room = right["workspace"]
            room = room._replace(**{part: UNWRITABLE[kind](getattr(room, part))})
            refuses(ops.attend_spans, right | {"workspace": room}, told=f"workspace.{part}")


@kernel
@pytest.mark.parametrize("bias", [2**31, -1, 2**63, 1.5, None])
@pytest.mark.parametrize("stored", [torch.float32, odd.FLOAT8])
def test_a_bias_that_is_none_changes_no_memory(bias, stored, device):
    right = odd.appended(device, odd.memory(device, stored))
    refuses(ops.append_images, right | {"biases": [3, bias]}, told=r"biases\[1\] must be")
    ops.append_images(**right)
    assert right["memory"].biases.tolist() == [[3, 9, 3, 9]]


@kernel
def test_images_of_float8_do_not_share_a_tile(device):
    right = odd.appended(device, odd.memory(device, odd.FLOAT8))
    for sizes in ([6, 2], [2, 2, 2, 2], [1, 7]):
        more = {"sizes": sizes, "biases": None}
        refuses(ops.append_images, right | more, told="images of a float8 memory must be whole")


@kernel
@pytest.mark.parametrize("tile", [0, -4, 1.5])
def test_a_tile_of_nothing_is_refused(tile, device):
    right = odd.built_in_float8(device)
    scales = [scale._replace(tile=tile) for scale in right["scales"]]
    refuses(ops.build_memory, right | {"scales": scales}, told="the tile of scales must be")
    right = odd.attended_in_float8(device)
    scales = MemoryScales(*right["scales"][:2], tile)
    refuses(ops.attend_spans, right | {"scales": scales}, told="scales.tile must be")
    memory = odd.memory(device, odd.FLOAT8)
    memory.scales = {n: s._replace(tile=tile) for n, s in memory.scales.items()}
    refuses(ops.append_images, odd.appended(device, memory), told="the tile of the memory must")
    refuses(ops.split_images, {"memory": memory}, told="the tile of a memory must")
    refuses(ops.join_images, {"images": [memory]}, told="the tile of a memory must")


# --- values ---


@kernel
@pytest.mark.parametrize("way", ["one", "several", "published"])
@pytest.mark.parametrize("far", [-(2**31), 2**31 - 1, -(2**63), 2**63 - 1, 2**32 + 4, 2**32 + 260])
def test_a_query_beyond_the_table_is_nan(far, way, device):
    """The least integers have no absolute value, and 32 bits of a wider id may be those of a near
    one."""
    right = odd.attended(device) | {"workspace": None}
    cos, sin, _, starts, biases = right["rotation"]
    for dtype in (torch.int32, torch.int64):
        if dtype == torch.int32 and not -(2**31) <= far < 2**31:
            continue
        images = {"one": 1, "several": 2, "published": 0}[way]
        rotation = QueryRotation(cos, sin, torch.tensor([[far, 5]], dtype=dtype, device=device))
        if images:
            rotation = rotation._replace(starts=starts[:images], biases=biases[:, :images] + 4)
        for op in (ops.attend_spans, reference.attend_spans):
            out, lse = op(**right | {"rotation": rotation})
            assert out[:, 0].isnan().all()
            assert lse[:, 0].isnan().all()
            assert out[:, 1].isfinite().all()


@kernel
@pytest.mark.parametrize("far", [-(2**31), 2**31 - 1])
def test_a_key_beyond_the_table_is_nan(far, device):
    right = odd.built(device)
    right["ids"][1] = far
    ops.build_memory(**right)
    for keys, values in zip(right["keys"], right["values"], strict=True):
        assert keys[2:6].isnan().all((1, 2)).tolist() == [False, True, False, False]
        assert values.isfinite().all()
    memory = odd.memory(device)
    memory.ids[2] = far
    for angles in memory.key_table():
        assert angles.isnan().all(1).tolist() == [False] * 2 + [True] + [False] * 5


@kernel
@pytest.mark.parametrize("shape", [(1, 0, 2, 16), (0, 2, 2, 16), (1, 2, 0, 16)])
@pytest.mark.parametrize("rotated", [True, False])
def test_no_query_reads_nothing(shape, rotated, device):
    right = odd.attended(device)
    rotation = right["rotation"]._replace(positions=torch.zeros(shape[:2], device=device).long())
    spans = torch.tensor([[[0, 8]]], device=device).expand(shape[0], 1, 2)
    right |= {"q": torch.zeros(shape, device=device), "spans": spans, "workspace": None}
    right["rotation"] = rotation._replace(biases=rotation.biases) if rotated else None
    for op in (ops.attend_spans, reference.attend_spans):
        out, lse = op(**right)
        assert (out.shape, lse.shape) == (shape, shape[:3])
        assert op(**right | {"return_lse": False}).shape == shape


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ([1, 2, 5], [0, 4, 8], "cu_seqlens_q must ascend from 0, got"),
        ([0, 2, 5], [2, 4, 8], "cu_seqlens_k must ascend from 0, got"),
        ([0, 4, 2], [0, 4, 8], "cu_seqlens_q must ascend"),
        ([0, 2, 5], [0, 4, 3], "cu_seqlens_k must ascend"),
        ([0, 2, 7], [0, 4, 8], "the samples of cu_seqlens_q must lie in 6 tokens"),
        ([], [], r"must be \[samples \+ 1\], int32 or int64"),
        ([0.0, 2, 5], [0, 4, 8], r"must be \[samples \+ 1\], int32 or int64"),
    ],
)
def test_cumulative_lengths_ascend_from_nothing(first, second, told):
    given = {"cu_seqlens_q": torch.tensor(first), "cu_seqlens_k": torch.tensor(second)}
    refuses(ops.spans_from_cu_seqlens, given | {"tokens": 6}, told=f".*{told}")


def test_samples_may_be_empty_and_need_not_fill_a_row():
    bounds = torch.tensor([0, 2, 2, 4]), torch.tensor([0, 3, 5, 5])
    spans = ops.spans_from_cu_seqlens(*bounds, 6)
    assert spans.tolist() == [[[0, 3]] * 2 + [[5, 5]] * 4]
    assert ops.spans_from_cu_seqlens(*(b[:1] for b in bounds), 2).tolist() == [[[0, 0]] * 2]


@pytest.mark.parametrize("last", [[4, 1], [-1, 4], [1.0, 4.0]])
def test_last_tokens_ascend(last):
    given = {"last_tokens": torch.tensor(last), "sizes": [4, 4], "tokens": 6}
    refuses(ops.spans_from_images, given, told="last_tokens must")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dim": 2}, "dim must be an integer from 4"),
        ({"dim": 7}, "dim must be even"),
        ({"dim": 0, "factor": None}, "dim must be an integer from 2"),
        ({"max_length": 0}, "max_length, which factor needs, must be an integer from 1"),
        ({"theta": 0.0}, "theta must be positive"),
        ({"theta": -1e4}, "theta must be positive"),
        ({"factor": float("nan")}, "factor must be positive"),
        ({"length": torch.tensor([1, 2, 3])}, r"length must be \[2\], one for each prompt"),
        ({"length": None}, "factor needs the length of each prompt"),
        ({"position_ids": torch.arange(6)}, r"position_ids must be \[B, N\]"),
    ],
)
def test_angles_that_are_none_are_refused(change, told):
    refuses(ops.rotary_table, odd.angles("cpu") | change, told=told)


def test_ratios_and_sides_beyond_reason_are_refused():
    tokens = odd.floats(1, 2, 2, 4)
    for ratio in (1e-320, 0.0, float("nan"), float("inf"), -0.5):
        refuses(ops.fold_tiles, {"tokens": tokens, "ratio": ratio}, told="ratio must be 1 over")
    refuses(ops.fold_tiles, {"tokens": tokens[0]}, told=r"tokens must be \[T, h, w, C\]")
    for grid, side in (((2**31, 1), 16), ((1, 1), 2**31), ((1.5, 1), 16), ((1, True, 1), 16)):
        for verb in (ops.image_tokens, ops.image_position_ids):
            refuses(verb, {"grid": grid, "side": side}, told="(grid|side|an image) must")


@kernel
def test_a_broken_table_of_grids_is_refused(device):
    """A kernel would read whatever lies there."""
    right = odd.rotated_by_grids(device)
    for table in (right["positions"].table.long(), right["positions"].table[:, :3]):
        broken = ImageGrids(table, side=1, end=2)
        refuses(ops.apply_rotary, right | {"positions": broken}, told="the table of ImageGrids")


@kernel
def test_a_table_that_learns_is_not_forgotten(device):
    right = odd.rotated(device) | {"inplace": False}
    right["cos"].requires_grad_()
    if INTERPRET or device == "cuda":
        refuses(ops.apply_rotary, right, told="on a GPU cos and sin must not require grad")
    else:
        assert ops.apply_rotary(**right)[0].requires_grad
