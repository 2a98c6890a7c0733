"""Position ids of images and prompts: recorded values, laws, the kernel, and errors."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import TRACED
from harness import assert_matches, recorded
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import comemo_kernels as ops
from comemo_kernels import TEXT, ImageGrids, reference

pytestmark = pytest.mark.kernel(reference=True)

GRIDS = st.tuples(st.integers(0, 7), st.integers(0, 7))
ORDERS = st.sampled_from(["row", "column"])


# --- one image ---


def test_every_recorded_image_has_its_ids(golden):
    for key, ids in recorded(golden, "subimage_indices.safetensors").items():
        grid, bias = key.split("_b")
        cols, rows = map(int, grid.split("x"))
        ours = ops.image_position_ids((cols, rows), 16, "column", int(bias))
        assert torch.equal(ours, ids.long()), key


def test_every_recorded_sum_of_ids(golden):
    for row in json.loads((golden / "subimage_indices.json").read_text()):
        ids = ops.image_position_ids((row["x"], row["y"]), 16, "column", row["position_bias"])
        found = (len(ids), int(ids.sum()), int(ids.min()), int(ids.max()))
        assert found == (row["n"], row["sum"], row["min"], row["max"]), row


@given(grid=GRIDS, side=st.integers(1, 20), order=ORDERS)
def test_ids_stay_in_the_thumbnail(grid, side, order):
    ids = ops.image_position_ids(grid, side, order, bias=5)
    assert len(ids) == ops.image_tokens(grid, side)
    assert ids.min() == 5
    assert ids.max() == 5 + side * side - 1
    assert torch.equal(ids[-side * side :], 5 + torch.arange(side * side))


@given(cols=st.integers(1, 7), rows=st.integers(1, 7))
def test_row_order_is_the_geometric_place(cols, rows):
    ids = ops.image_position_ids((cols, rows), 16, thumbnail=False).view(rows, cols, 16, 16)
    y, x = ids // 16, ids % 16
    image = y.permute(0, 2, 1, 3).reshape(rows * 16, cols * 16)
    assert (image.diff(dim=0) >= 0).all()
    assert (image.diff(dim=1) == 0).all()  # one thumbnail row along each raster row
    across = x.permute(0, 2, 1, 3).reshape(rows * 16, cols * 16)
    assert (across.diff(dim=1) >= 0).all()
    assert (across.diff(dim=0) == 0).all()


@given(cols=st.integers(1, 7), rows=st.integers(1, 7))
def test_column_order_permutes_tiles(cols, rows):
    if cols * rows == 1:
        return
    grid = (cols, rows)
    row = ops.image_position_ids(grid, 16, "row", thumbnail=False).view(rows, cols, 256)
    column = ops.image_position_ids(grid, 16, "column", thumbnail=False).view(cols, rows, 256)
    assert torch.equal(row.transpose(0, 1), column)


# --- prompts ---


def test_every_recorded_prompt_has_its_ids(golden, device):
    tensors = recorded(golden, "chat_positions.safetensors")
    for name, case in json.loads((golden / "chat_positions.json").read_text()).items():
        prompt, rule = name.rsplit("/", 1)
        input_ids = tensors[f"{prompt}/input_ids"].long().reshape(1, -1)
        image = input_ids == 593
        if rule == "dhr":
            mask = torch.ones_like(input_ids)
            ids = ops.rope_dhr_positions(
                image.to(device), mask.to(device), [tuple(g) for g in case["ratios"]], 16, "column"
            ).cpu()
        else:
            ids = torch.arange(input_ids.shape[1])[None]
        assert torch.equal(ids[0], tensors[f"{name}/position_ids"].long().reshape(-1)), name
        media = tensors[f"{name}/media_position_ids"].long().reshape(-1)
        assert torch.equal(ids[image], media), name


@st.composite
def batches(draw):
    """Prompts of text and images, padded on both sides, with the arguments for their images."""
    side, thumbnail = draw(st.sampled_from([1, 2, 3])), draw(st.booleans())
    prompts = draw(st.lists(st.lists(st.one_of(GRIDS, st.integers(0, 9)), max_size=5), max_size=4))
    grids, rows = [], []
    for parts in prompts:
        row = [1] * draw(st.integers(0, 3))  # 1 text, 2 image, 0 padding
        for part in parts:
            if isinstance(part, tuple):
                grids.append(part)
                row += [2] * ops.image_tokens(part, side, thumbnail)
            else:
                row += [1] * part
        rows.append([0] * draw(st.integers(0, 5)) + row)
    width = max([len(row) for row in rows], default=0) + draw(st.integers(0, 3))
    kinds = torch.tensor([row + [0] * (width - len(row)) for row in rows]).view(len(rows), width)
    return {
        "image_mask": kinds == 2,
        "attention_mask": (kinds > 0).to(draw(st.sampled_from([torch.bool, torch.int64]))),
        "grids": grids,
        "side": side,
        "tile_order": draw(ORDERS),
        "thumbnail": thumbnail,
    }


def to(device, inputs):
    return {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}


@given(inputs=batches())
def test_prompts_match_a_count_token_by_token(device, inputs):
    grids, wanted = iter(inputs["grids"]), []
    rule = {name: inputs[name] for name in ("side", "tile_order", "thumbnail")}
    for images, attended in zip(
        inputs["image_mask"].tolist(), inputs["attention_mask"].tolist(), strict=True
    ):
        count, ahead, row = 0, [], []
        for image, text in zip(images, attended, strict=True):
            if image and not ahead:
                ahead = ops.image_position_ids(next(grids), bias=count, **rule).tolist()
                count += inputs["side"] ** 2
            row.append(ahead.pop(0) if image else count if text else 0)
            count += bool(text and not image)
        wanted.append(row)
    ours = ops.rope_dhr_positions(**to(device, inputs)).cpu()
    assert torch.equal(ours, torch.tensor(wanted, dtype=torch.int64).view(ours.shape))


@pytest.mark.kernel
@given(inputs=batches(), strided=st.booleans())
def test_kernel_matches_reference(device, inputs, strided):
    if strided:
        masks = {
            name: inputs[name].t().contiguous().t() for name in ("image_mask", "attention_mask")
        }
        inputs = inputs | masks
    assert_matches(ops.rope_dhr_positions, reference.rope_dhr_positions, to(device, inputs))


@given(pads=st.lists(st.integers(0, 9), min_size=1, max_size=4), grid=GRIDS)
def test_a_padded_prompt_has_the_ids_it_has_alone(device, pads, grid):
    prompt = F.pad(torch.ones(1, ops.image_tokens(grid, 4), dtype=torch.bool), (3, 2)).to(device)
    alone = ops.rope_dhr_positions(prompt, torch.ones_like(prompt), [grid], 4)
    width = prompt.shape[1]
    for pad in pads:  # on the left
        padded, mask = (F.pad(t, (pad, 0)) for t in (prompt, torch.ones_like(prompt)))
        batch, masks = torch.cat([padded, padded]), torch.cat([mask, mask])
        ids = ops.rope_dhr_positions(batch, masks, [grid, grid], 4)
        assert torch.equal(ids[:, -width:], alone.expand(2, -1))


def test_blocks_carry_their_counts(device):
    """Images cross the borders of blocks, in prompts of several blocks."""
    grids = [(4, 3), (1, 1), (3, 2), (6, 2)]
    kinds = [[0] * 700 + [2] * 3328 + [1] * 900 + [2] * 256, [1] * 50 + [2] * 1792 + [2] * 3328]
    width = max(map(len, kinds))
    kinds = torch.tensor([[0] * (width - len(row)) + row for row in kinds], device=device)
    inputs = {"image_mask": kinds == 2, "attention_mask": kinds > 0, "grids": grids}
    ours, wanted = (x.rope_dhr_positions(**inputs) for x in (ops, reference))
    assert torch.equal(ours, wanted)
    listed = torch.tensor(grids)
    assert torch.equal(ops.rope_dhr_positions(**inputs | {"grids": listed}), wanted)


# --- grids in a sequence ---


@given(
    parts=st.lists(st.tuples(st.one_of(GRIDS, st.just(TEXT)), st.integers(0, 5)), max_size=5),
    side=st.integers(1, 3),
    order=ORDERS,
    thumbnail=st.booleans(),
)
def test_grids_number_a_sequence(parts, side, order, thumbnail):
    wanted, grids, offsets, biases = [0, 1], [], [], []
    count = 2
    for grid, text in parts:
        grids.append(grid)
        offsets.append(len(wanted))
        if grid == TEXT:
            count = 7
            biases.append(count)
        else:
            biases.append(count)
            wanted += ops.image_position_ids(grid, side, order, count, thumbnail).tolist()
            count += side * side
        wanted += range(count, count + text)
        count += text
    packed = ImageGrids.pack(grids, offsets, biases, side, order, thumbnail)
    assert packed.position_ids(len(wanted)).tolist() == wanted


def test_grids_of_an_image_memory_are_concatenated():
    packed = ImageGrids.pack([(2, 1), (1, 1), (0, 0)], side=2)
    assert packed.table.tolist() == [[0, 0, 2, 1], [12, 0, 1, 1], [16, 0, 0, 0]]
    assert packed.end == 20
    ids = torch.cat([ops.image_position_ids(grid, 2) for grid in ((2, 1), (1, 1), (0, 0))])
    assert torch.equal(packed.position_ids(20), ids)


def test_invalid_grids_raise():
    with pytest.raises(ValueError, match="2 grids need as many offsets and biases, got 1 and 2"):
        ImageGrids.pack([(1, 1), (1, 1)], offsets=[0])
    with pytest.raises(ValueError, match=r"image 1 must start at 260 or later.* got offset 4"):
        ImageGrids.pack([(1, 1), (1, 1)], offsets=[4, 4])
    with pytest.raises(ValueError, match="bias of at least 0, got offset 0 and bias -1"):
        ImageGrids.pack([(1, 1)], biases=[-1])
    with pytest.raises(ValueError, match=r"grid must be .* got \(-1, 2\)"):
        ImageGrids.pack([(-1, 2)])
    with pytest.raises(ValueError, match="tile_order"):
        ImageGrids.pack([], tile_order="diagonal")
    with pytest.raises(ValueError, match="end at token 256 overrun a sequence of 255"):
        ImageGrids.pack([(1, 1)]).position_ids(255)


# --- contract and errors ---


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    from comemo_kernels.positions import _rope_dhr

    mask = torch.ones(2, 12, dtype=torch.bool, device=real_device)
    grids = ImageGrids.pack([(2, 1), (2, 1)], side=2, device=real_device)
    opcheck(_rope_dhr, (mask, mask.long(), grids.table, grids.end, 2, True, True))


@TRACED
def test_compiles_whole_without_validation(real_device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ops.rope_dhr_positions, fullgraph=True, backend=counter)
    for text in (3, 4, 5, 6):
        image = F.pad(torch.ones(1, 12, dtype=torch.bool), (text, 2)).to(real_device)
        arguments = (image, torch.ones_like(image), [(2, 1)], 2)
        ours = compiled(*arguments, validate=False)
        assert torch.equal(ours, ops.rope_dhr_positions(*arguments))
    assert counter.frame_count <= 2


def test_invalid_prompts_raise(device):
    image = torch.ones(1, 64, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match="1 grids of 80 image tokens for prompts that hold 64"):
        ops.rope_dhr_positions(image, image, [(4, 1)], 4)
    with pytest.raises(ValueError, match="0 grids of 0 image tokens for prompts that hold 64"):
        ops.rope_dhr_positions(image, image, [], 4)
    with pytest.raises(ValueError, match="1 grids of 16 image tokens for prompts that hold 64"):
        ops.rope_dhr_positions(image, image, [(1, 1)], 4)
    with pytest.raises(ValueError, match="1 grids of 16 image tokens for prompts that hold 0"):
        ops.rope_dhr_positions(~image, image, [(1, 1)], 4)
    with pytest.raises(ValueError, match="1 grids of 16 image tokens for prompts that hold 0"):
        ops.rope_dhr_positions(image[:0], image[:0], [(1, 1)], 4)
    torn = torch.tensor([[True] * 16 + [False] + [True] * 16], device=device)
    with pytest.raises(ValueError, match=r"one run of image tokens.* prompts \[0\] with split"):
        ops.rope_dhr_positions(torn, torn, [(2, 1)], 4, thumbnail=False)
    over = torch.ones(2, 16, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"prompts \[1\] with split ones, grids \[\[2, 1\]\]"):
        ops.rope_dhr_positions(over, over, [(2, 1)], 4, thumbnail=False)
    with pytest.raises(ValueError, match="tile_order"):
        ops.rope_dhr_positions(image, image, [(2, 2)], 4, "diagonal", thumbnail=False)
    with pytest.raises(ValueError, match=r"one shape.*\(1, 64\).*\(1, 3\)"):
        ops.rope_dhr_positions(image, image[:, :3], [], 4)
    with pytest.raises(ValueError, match=r"first of bool, got torch.int64"):
        ops.rope_dhr_positions(image.long(), image, [], 4)
    with pytest.raises(ValueError, match="tile_order"):
        ops.image_position_ids((1, 2), tile_order="diagonal")
    with pytest.raises(ValueError, match="rope_dhr_positions: grid must be"):
        ops.rope_dhr_positions(image, image, [(-1, 2)], 4)
    for grids in ((2, 2), [(1, 1, 1)]):  # a grid outside a list; a grid of three numbers
        with pytest.raises(ValueError, match=r"rope_dhr_positions: grid must be \(cols, rows\)"):
            ops.rope_dhr_positions(image, image, grids, 4)
    with pytest.raises(ValueError, match="grid must be"):
        ops.image_tokens((-1, 2))
