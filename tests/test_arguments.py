"""Odd arguments of public functions: a valid result, or a ValueError that changes nothing."""

import inspect
import random

import odd
import pytest
import torch
import valid_calls as valid
from conftest import DEVICE, INTERPRET
from odd import raised, refuses, same, state

import comemo_kernels as ops
from comemo_kernels import ImageGrids, ImageMemory, QueryRotation, reference

kernel = pytest.mark.kernel(reference=True)

EXPORTED = [getattr(ops, name) for name in ops.__all__]
# Of functions and modules, not of tensors.
OTHERS = {ops.capture, ops.is_plain, ops.is_untouched, ops.patch, ops.unpatch}
PUBLIC = [
    *(f for f in EXPORTED if inspect.isfunction(f) and f not in OTHERS),
    *(getattr(reference, name) for name in reference.__all__),
    ImageGrids.pack.__func__,
    ImageGrids.position_ids,
    ops.HostFlag.__init__,
    ops.HostFlag.post,
    ImageMemory.from_media.__func__,
    ImageMemory.allocate.__func__,
    ImageMemory.update,
    ImageMemory.reading,
    ImageMemory.rotation,
    ImageMemory.key_table,
    ImageMemory.repeat_interleave,
]
DRAWS = 10 if INTERPRET else 40


@kernel
@pytest.mark.parametrize("draws", [DRAWS, pytest.param(10 * DRAWS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", valid.CALLS)
def test_odd_arguments_give_a_result_or_a_value_error(name, draws, device):
    function, right = valid.CALLS[name](device)
    function(**right)
    draw = random.Random(name)
    for _ in range(draws):
        function, arguments = valid.CALLS[name](device)
        arg = draw.choice(list(arguments))
        thing = arguments[arg] = odd.odd_value(draw, arguments[arg])
        values = [*arguments.values(), getattr(function, "__self__", None)]
        before = state(*values)
        error = raised(function, arguments)
        told = f"{arg}={thing!r:.80}: {error!r}"
        if error is not None:
            assert isinstance(error, ValueError), told
            assert str(error).startswith(f"{name.split()[0]}: "), told
            assert same(before, state(*values)), f"changed by {told}"


def test_every_public_function_checks_types():
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
        ("norm_linear", {"eps": "x"}, "eps must be a 64-bit number, got 'x'"),
        (
            "build_memory",
            {"kv_weights": [torch.ones(32, 4, device=DEVICE), 3]},
            r"kv_weights\[1\] must be a dense tensor with values, got 3",
        ),
        (
            "rope_dhr_positions",
            {"grids": 7},
            r"grids must be a sequence, each part \(a 64-bit integer",
        ),
        ("capture", {"device": "nothing"}, "device must be a device, got 'nothing'"),
        ("memory_buffers", {"dtype": "float32"}, "dtype must be a torch.dtype, got 'float32'"),
        ("join_images", {"images": [ImageMemory(ids=3)]}, r"images\[0\].ids must be .*, got 3"),
    ],
)
def test_an_argument_of_a_wrong_type_is_named(name, change, told):
    function, right = valid.CALLS[name](DEVICE)
    refuses(function, right | change, told=told)
    assert raised(function, right | change).__cause__ is not None


def test_an_error_that_no_type_explains_is_unchanged(monkeypatch):
    _, right = valid.CALLS["norm_linear"]("cpu")
    error = RuntimeError("no memory left")

    def fail(*args):
        raise error

    monkeypatch.setattr(reference.fused_linear, "cpu_product", fail)
    assert raised(reference.norm_linear, right) is error
    with pytest.raises(TypeError, match=r"norm_linear\(\) missing 1 required"):
        ops.norm_linear(right["x"], right["norm_weight"])
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        ops.norm_linear(**right, epsilon=1)


# --- values ---


@pytest.mark.parametrize("name", valid.CALLS)
def test_tensors_without_dimensions_give_a_result_or_a_value_error(name, device):
    _, right = valid.CALLS[name](device)
    for argument, value in right.items():
        if isinstance(value, torch.Tensor):
            function, arguments = valid.CALLS[name](device)
            error = raised(function, arguments | {argument: value.new_zeros(())})
            assert error is None or isinstance(error, ValueError), f"{argument}: {error!r}"


@kernel
@pytest.mark.parametrize("way", ["one", "several", "published"])
@pytest.mark.parametrize("far", [-(2**31), 2**31 - 1, -(2**63), 2**63 - 1, 2**32 + 4, 2**32 + 260])
def test_a_query_beyond_the_table_is_nan(far, way, device):
    """The smallest integers have no absolute value, and the low 32 bits of a 64-bit id may be those
    of a near id."""
    right = valid.attended(device) | {"workspace": None}
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
    right = valid.built(device)
    right["ids"][1] = far
    ops.build_memory(**right)
    for keys, values in zip(right["keys"], right["values"], strict=True):
        assert keys[2:6].isnan().all((1, 2)).tolist() == [False, True, False, False]
        assert values.isfinite().all()
    memory = valid.memory(device)
    memory.ids[2] = far
    for angles in memory.key_table():
        assert angles.isnan().all(1).tolist() == [False] * 2 + [True] + [False] * 5


@kernel
@pytest.mark.parametrize("shape", [(1, 0, 2, 16), (0, 2, 2, 16), (1, 2, 0, 16)])
@pytest.mark.parametrize("rotated", [True, False])
def test_no_queries(shape, rotated, device):
    right = valid.attended(device)
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
        ([0, 2, 7], [0, 4, 8], "the samples of cu_seqlens_q must fit in 6 tokens"),
        ([], [], r"must be \[samples \+ 1\], int32 or int64"),
        ([0.0, 2, 5], [0, 4, 8], r"must be \[samples \+ 1\], int32 or int64"),
    ],
)
def test_cumulative_lengths_ascend_from_zero(first, second, told):
    given = {"cu_seqlens_q": torch.tensor(first), "cu_seqlens_k": torch.tensor(second)}
    refuses(ops.spans_from_cu_seqlens, given | {"tokens": 6}, told=f".*{told}")


def test_samples_may_be_empty_or_shorter_than_a_row():
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
def test_invalid_angles_raise(change, told):
    refuses(ops.rotary_table, valid.angles("cpu") | change, told=told)


def test_invalid_ratios_and_sides_raise():
    tokens = valid.floats(1, 2, 2, 4)
    for ratio in (1e-320, 0.0, float("nan"), float("inf"), -0.5):
        refuses(ops.fold_tiles, {"tokens": tokens, "ratio": ratio}, told="ratio must be 1 over")
    refuses(ops.fold_tiles, {"tokens": tokens[0]}, told=r"tokens must be \[T, h, w, C\]")
    for grid, side in (((2**31, 1), 16), ((1, 1), 2**31), ((1.5, 1), 16), ((1, True, 1), 16)):
        for verb in (ops.image_tokens, ops.image_position_ids):
            refuses(verb, {"grid": grid, "side": side}, told="(grid|side|an image) must")


@kernel
def test_an_invalid_table_of_grids_raises(device):
    """A kernel would read outside the table."""
    right = valid.rotated_by_grids(device)
    for table in (right["positions"].table.long(), right["positions"].table[:, :3]):
        broken = ImageGrids(table, side=1, end=2)
        refuses(ops.apply_rotary, right | {"positions": broken}, told="the table of ImageGrids")


@kernel
def test_a_table_that_requires_grad_gets_its_gradient_or_raises(device):
    right = valid.rotated(device) | {"inplace": False}
    right["cos"].requires_grad_()
    if INTERPRET or device == "cuda":
        refuses(ops.apply_rotary, right, told="on a GPU cos and sin must not require grad")
    else:
        assert ops.apply_rotary(**right)[0].requires_grad
