"""The attention kernel: configurations, splits, static buffers, its contract with torch."""

import math

import pytest
import torch
from attention_inputs import assert_repeats, make_inputs, ways
from conftest import DEVICE, GPU, INTERPRET, SLOW, TRACED

pytest.importorskip("triton")

import triton
import triton.language as tl

from comemo_kernels import QueryRotation, attend_spans, attention_workspace, capture, reference

pytestmark = pytest.mark.kernel(reference=True)

if INTERPRET or GPU:
    from comemo_kernels import attention
    from comemo_kernels._blocks_attention import share_of


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, *(pytest.param(n, marks=SLOW) for n in (9, 70))])
def test_every_configuration_and_split(rows):
    inputs, rest = make_inputs(rows, 1, 2, 1, 32, 400, "prompt", (0, 256, 300))
    inputs = {n: t if n == "spans" or t is None else t.half() for n, t in inputs.items()}
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    wanted = reference.attend_spans(**inputs, rotation=rotation)
    kernel = attention._kernel_for(torch.float16, 2 * rows)
    # Early launches do nothing in the interpreter.
    hidden = {"EARLY"} if INTERPRET else set()
    distinct = {str({n: v for n, v in c.items() if n not in hidden}): c for c in kernel.configs}
    for config in distinct.values():
        with kernel.using(config):
            for splits in (1, 3, 64) if rows == 1 else (1, 7):
                workspace = attention_workspace(inputs["q"], inputs["k"], splits)
                for tensor in workspace[:-1]:
                    tensor.fill_(math.nan) if splits > 1 else None
                for _ in range(2):  # the workspace can be used again
                    out = attend_spans(**inputs, rotation=rotation, workspace=workspace)
                    assert out is workspace.out
                    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=2e-3)
                assert not workspace.counts.any()


@pytest.mark.kernel
def test_shapes_determine_the_splits():
    """Every multiprocessor has work, and each split has at least two key blocks."""

    def splits(B, N, H, M):
        q = torch.empty(B, N, H, 128, dtype=torch.float16, device=DEVICE)
        return attention._choose_splits(q, torch.empty(M, H, 128, device=DEVICE))

    sms = attention.multiprocessors(torch.empty(0, device=DEVICE).get_device())
    assert splits(1, 1, 16, 3328) == {132: 13}.get(sms, splits(1, 1, 16, 3328)), (
        "52 blocks, 16 slots"
    )
    assert splits(1, 1, 16, 3328) <= min(2 * sms // 16, 26)
    assert splits(1, 1, 16, 256) == 2
    assert splits(1, 8192, 16, 13312) == 1
    assert splits(1, 300, 16, 13312) == sms // 48
    assert splits(1, 1, 1, 2**20) == attention.MAX_SPLITS


@triton.jit
def share_keys(bounds_ptr, low, high, num_splits, BLOCK: tl.constexpr):
    split = tl.program_id(0)
    first, last = share_of(low, high, split, num_splits, BLOCK)
    tl.store(bounds_ptr + 2 * split, first)
    tl.store(bounds_ptr + 2 * split + 1, last)


@pytest.mark.kernel
@pytest.mark.skipif(not (GPU or INTERPRET), reason="needs the interpreter or a GPU")
@pytest.mark.parametrize(
    ("low", "high", "splits"),
    [(0, 3328, 13), (0, 3328, 16), (70, 200, 3), (5, 6, 4), (9, 9, 2), (40, 0, 3), (0, 64, 1)],
)
def test_splits_get_whole_blocks_evenly(low, high, splits):
    bounds = torch.full((splits, 2), -1, dtype=torch.int32, device=DEVICE)
    share_keys[(splits, 1, 1)](bounds, low, high, splits, BLOCK=64)
    shares = [range(first, last) for first, last in bounds.tolist()]
    assert [key for share in shares for key in share] == list(range(low, high))
    blocks = [-(-len(share) // 64) for share in shares]
    assert max(blocks) - min(blocks) <= 1
    assert all(len(share) % 64 == 0 or share.stop == high for share in shares)


# --- operator ---


@pytest.mark.kernel
@TRACED
def test_operator_contract(real_device):
    for starts in (None, (0, 32)):
        inputs, rest = make_inputs(starts=starts, dtype=torch.float16, device=real_device)
        rotation = [inputs["cos"], inputs["sin"]]
        rotation += [rest[n] if starts else None for n in ("positions", "starts", "biases")]
        arguments = [inputs[n] for n in ("q", "k", "v", "spans")] + [*rotation, None, None, 1]
        torch.library.opcheck(attention.attend_op, arguments)
        workspace = attention_workspace(inputs["q"], inputs["k"], 2)
        torch.library.opcheck(attention._attend_, [*workspace, *arguments])


@pytest.mark.kernel
def test_a_written_workspace_gets_a_new_version():
    inputs, rest = make_inputs()
    workspace = attention_workspace(inputs["q"], inputs["k"])
    before = workspace.out._version
    ways(rest, workspace=workspace)[0](**inputs)
    assert workspace.out._version > before


@TRACED
def test_compiles_whole_for_any_length(real_device):
    counted = []

    def backend(graph, _):
        counted.append(graph)
        return graph.forward

    compiled = torch.compile(ways_compiled, fullgraph=True, backend=backend, dynamic=True)
    for N, M in ((3, 64), (5, 96), (9, 70), (4, 33)):
        inputs, rest = make_inputs(2, N, 2, 1, 16, M, "prompt", (0, 32), device=real_device)
        arguments = (*inputs.values(), *rest.values())
        torch.testing.assert_close(compiled(*arguments), ways_compiled(*arguments))
    assert len(counted) == 1


def ways_compiled(q, k, v, spans, cos, sin, positions, starts, biases):
    return attend_spans(q, k, v, spans, QueryRotation(cos, sin, positions, starts, biases))


# --- on a GPU ---


@pytest.mark.gpu
def test_a_captured_step_replays_with_other_lengths():
    """A CUDA graph of a decode step needs a fixed grid, no allocation and no sync."""
    inputs, rest = make_inputs(2, 1, 16, 16, 128, 2048, "prompt", (0, 1024), dtype=torch.bfloat16)
    workspace = attention_workspace(inputs["q"], inputs["k"])
    attend = ways(rest, workspace=workspace)[0]
    attend(**inputs)
    # From the first graph on torch holds two words for random numbers.
    kept = capture(lambda: inputs["spans"].add_(0), DEVICE)
    held = torch.cuda.memory_allocated()
    replay = capture(lambda: attend(**inputs), DEVICE)
    assert torch.cuda.memory_allocated() == held
    for spans in ([[0, 1024], [1024, 2048]], [[0, 256], [0, 0]], [[512, 513], [100, 2000]]):
        inputs["spans"].copy_(torch.tensor(spans, device=DEVICE)[:, None])
        rest["positions"].add_(1)
        workspace.out.fill_(math.nan)
        replay()
        replayed = workspace.out.clone()
        assert torch.equal(replayed, attend(**inputs))
        torch.testing.assert_close(replayed, ways(rest)[1](**inputs), atol=2e-2, rtol=2e-2)
    kept()


@pytest.mark.gpu
def test_the_same_bits_every_time():
    """Every configuration, 1,000 times; the fused ones most of all."""
    for B in (1, 8):
        inputs, rest = make_inputs(B, 1, 16, 16, 128, 3328, "prompt", (0,), dtype=torch.bfloat16)
        kernel = attention._kernel_for(torch.bfloat16, B)
        for config in kernel.configs:
            with kernel.using(config):
                workspace = attention_workspace(inputs["q"], inputs["k"])
                attend = ways(rest, workspace=workspace)[0]
                first = attend(**inputs).clone()
                torch.testing.assert_close(first, ways(rest)[1](**inputs), atol=2e-2, rtol=2e-2)
                same = torch.ones((), dtype=torch.bool, device=DEVICE)
                for _ in range(1000):
                    workspace.out.fill_(math.nan)
                    same &= (attend(**inputs) == first).all()
                assert same, config


@pytest.mark.gpu
def test_a_decode_step_gives_the_same_bits():
    """Every configuration: some rely on the order of memory accesses or of launches."""
    inputs, rest = make_inputs(
        1, 1, 16, 16, 128, 3328, "prompt", (0,), P=4096, dtype=torch.bfloat16
    )
    inputs["spans"][:] = torch.tensor([0, 3328])
    rotation = QueryRotation(inputs.pop("cos"), inputs.pop("sin"), **rest)
    plain = attend_spans(**inputs, rotation=rotation)
    for config in attention.attend_one.configs:
        with attention.attend_one.using(config):
            room = attention_workspace(inputs["q"], inputs["k"])
            assert_repeats(
                lambda room=room: attend_spans(**inputs, rotation=rotation, workspace=room), plain
            )
