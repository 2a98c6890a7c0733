"""The benchmark of training: cases, rows, wrong gradients, and the memory of a step by formula."""

import sys
import types

import pytest
import torch
from conftest import SLOW
from test_bench_tuning import Nothing
from timed import COPY, GEMM, clock, rows_of

import comemo_kernels as ops
from bench import cases, published, saved, step_memory, steps, train
from bench.cases import HEAD_DIM, MixinSize
from bench.packs import PACKS, SMALL_PACKS, TILES, dense_of, draw_pack
from bench.train_attention import AttentionStep
from bench.train_block import BlockStep
from bench.ways import Clock, Limits

pytestmark = pytest.mark.usefixtures("made_up_limits", "one_thread")

# --- cases ---


@pytest.mark.parametrize("name", PACKS)
def test_packs_have_the_sizes_of_their_names(name):
    pack, (tokens, samples, pictures) = PACKS[name], name.split("_")
    counts = [count for count, _ in pack.samples]
    assert sum(counts) == pack.queries == 1024 * int(tokens[:-1])
    assert len(counts) == int(samples)
    assert min(counts) > 0
    assert len(counts) == 1 or len(set(counts)) > 1
    images = [len(grids) for _, grids in pack.samples]
    tiles = sum(pack.sizes) // 256
    if pictures == "one":
        assert set(images) == {1}
        assert tiles <= max(TILES, len(counts))
    elif pictures == "many":
        assert tiles == TILES
        assert max(images) > 1
    else:
        assert not sum(images)
    assert pack == draw_pack(pack.queries, len(counts), pictures)


@pytest.mark.parametrize("name", [name for name, pack in PACKS.items() if pack.pairs])
def test_a_dense_case_has_as_many_pairs(name):
    dense = dense_of(PACKS[name])
    assert len(dense.samples) == len(dense.grids) == 1
    assert abs(dense.pairs - PACKS[name].pairs) <= sum(dense.sizes)
    assert dense.queries == pytest.approx(PACKS[name].queries, rel=0.35)


def test_blocks_of_queries_straddle_samples():
    for pack in (PACKS["4k_8_one"], PACKS["16k_64_many"]):
        ends = torch.tensor([count for count, _ in pack.samples]).cumsum(0)[:-1]
        assert (ends % 64 != 0).all() or (ends % 64 != 0).sum() > 0.9 * len(ends)


# --- rows ---

TINY = ("--sizes", "tiny", "--no-compile")


def test_rows():
    rows, failed = rows_of(train, *TINY, "--cases", "96_8_many", "96_1_one", "96_8_none")
    assert not failed
    packed, alone = {"ours", "published"}, {"ours", "published", "sdpa flash"}
    block = {"ours", "ours projections", "published"}
    wanted = {(f"{case} tiny", "block"): block for case in ("96_8_many", "96_1_one", "96_8_none")}
    for kind in ("attention", "attention backward"):
        wanted |= {("96_8_many tiny", kind): packed, ("96_1_one tiny", kind): alone}
        wanted |= {(f"{case} dense tiny", kind): alone for case in ("96_8_many", "96_1_one")}
    wanted |= {(f"{case} tiny", "build"): packed for case in ("96_8_many", "96_1_one")}
    found: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        found.setdefault((row["case"], row["pass"]), set()).add(row["way"])
    assert found == wanted
    rates = {(row["case"], row["pass"], row["way"]): row["tflop_s"] for row in rows}
    pairs, inner = SMALL_PACKS["96_8_many"].pairs, 2 * HEAD_DIM
    for row in rows:
        flops = {"attention": 3.5, "attention backward": 2.5}.get(row["pass"], 0) * 4 * inner
        if flops and row["case"] == "96_8_many tiny":
            assert row["tflop_s"] == pytest.approx(flops * pairs / row["us"] / 1e6)
            dense = rates["96_8_many dense tiny", row["pass"], row["way"]]
            assert row["of_dense"] == pytest.approx(row["tflop_s"] / dense)
        if row["pass"] == "block":
            assert row["predicted_saved_mib"] == pytest.approx(row["saved_mib"])
            assert row["extra_mib"] > row["saved_mib"]


@pytest.mark.slow
def test_compiled_ways_are_right():
    rows, failed = rows_of(train, "--sizes", "tiny", "--cases", "96_8_many", "--rounds", "1")
    assert not failed
    compiled = {(row["case"], row["pass"]) for row in rows if row["way"] == "compile"}
    kinds = {"attention", "attention backward", "block", "build"}
    assert compiled == {("96_8_many tiny", kind) for kind in kinds}


def test_nominal_work_of_a_block():
    """Products three times, attention 3.5 times."""
    pack, (d, inner, wide) = SMALL_PACKS["96_1_one"], (64, 2 * HEAD_DIM, 96)
    work = BlockStep("tiny", pack, clock()).work()
    products = 96 * (2 * d * inner + 3 * d * wide) + 768 * d * 2 * inner
    assert work.flops == 3 * 2 * products + 3.5 * 4 * pack.pairs * inner
    limit = Limits(GEMM, COPY).us(work)
    assert limit == pytest.approx(1e6 * max(work.flops / GEMM, work.moved / COPY))


def wrong_gradient(right):
    """Attention whose gradient of the keys is half as large; its output is right."""

    def attend(q, k, *others, **options):
        return right(q, (k + k.detach()) / 2, *others, **options)

    return attend


def test_a_wrong_gradient_of_ours_is_not_timed_and_the_next_case_is(monkeypatch, capsys):
    monkeypatch.setattr(ops, "attend_spans", wrong_gradient(ops.attend_spans))
    rows, failed = rows_of(train, *TINY, "--cases", "96_8_many", "96_8_none")
    assert failed
    assert {row["case"] for row in rows} == {"96_8_none tiny"}
    assert "ours is not timed: relative error 5.0e-01" in capsys.readouterr().err
    gated = ops.attend_gated
    monkeypatch.setattr(
        ops, "attend_gated", lambda x, q, k, *o: gated(x, q, (k + k.detach()) / 2, *o)
    )
    assert rows_of(train, *TINY, "--cases", "96_8_many", "--passes", "block") == ([], True)


def test_a_wrong_gradient_of_another_way_is_left_out(monkeypatch, capsys):
    right = published.attend
    monkeypatch.setattr(
        published, "attend", lambda q, k, v, mask=None: right(q, k, (v + v.detach()) / 2, mask)
    )
    words = ("--cases", "96_8_many", "--passes", "attention")
    rows, failed = rows_of(train, *TINY, *words)
    assert not failed
    assert {row["way"] for row in rows} == {"ours"}
    assert "published is not timed" in capsys.readouterr().out


def test_an_error_is_of_the_largest_element_and_zeros_must_be_zeros():
    x = torch.tensor([4.0, 2.0, 0.0])
    assert steps.largest_error([x + 1, x], [x, x]) == pytest.approx(0.25)
    assert steps.largest_error([x[2:]], [x[2:]]) == 0
    assert steps.largest_error([x[2:] + 1e-9], [x[2:]]) == float("inf")
    assert not steps.largest_error([x, x * float("nan"), x], [x, x, x]) <= 1


def test_build_rows(monkeypatch):
    words = (*TINY, "--cases", "96_8_one", "--passes", "build")
    rows, failed = rows_of(train, *words)
    assert not failed
    assert [row["way"] for row in rows] == ["ours", "published"]
    assert {row["pass"] for row in rows} == {"build"}
    outputs = 2 * 2 * 2 * HEAD_DIM
    for row in rows:
        flops = 3 * 2 * 8 * 256 * 64 * outputs
        assert row["tflop_s"] == pytest.approx(flops / row["us"] / 1e6)
    right = ops.project_memory
    monkeypatch.setattr(
        ops, "project_memory", lambda media, *x, **y: right((media + media.detach()) / 2, *x, **y)
    )
    assert rows_of(train, *words) == ([], True)


# --- tuning ---


def test_every_configuration_of_the_backward_is_timed(monkeypatch, capsys):
    kernel, unused = Nothing(), Nothing()
    right = ops.attend_spans
    monkeypatch.setattr(train, "gradient_kernels", lambda: {"keys": kernel, "wide": unused})

    class Launches(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            kernel.launch()
            return dx

    monkeypatch.setattr(ops, "attend_spans", lambda q, *given: right(Launches.apply(q), *given))
    rows = list(train.TrainBench(clock()).tune("tiny", "96_8_many"))
    assert [(row["kernel"], row["config"], row["first"]) for row in rows] == [
        ("keys", "M 1 warps 4", True),
        ("keys", "M 2 warps 8", False),
    ]
    assert "not timed" not in capsys.readouterr().out
    monkeypatch.setattr(train, "gradient_kernels", dict)
    assert list(train.TrainBench(clock()).tune("tiny", "96_8_many")) == []
    assert "there are no kernels of a backward" in capsys.readouterr().out


def test_kernels_of_the_backward_are_found_by_the_name_of_their_file(monkeypatch):
    kernel = Nothing()
    module = types.ModuleType("comemo_kernels._attend_gradient_test")
    module.some_kernel, module.number = kernel, 3
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found = train.pkgutil.iter_modules
    monkeypatch.setattr(
        train.pkgutil,
        "iter_modules",
        lambda path: [*found(path), types.SimpleNamespace(name="_attend_gradient_test")],
    )
    assert train.gradient_kernels()["some_kernel"] is kernel


# --- memory ---


def test_saved_tensors_are_counted_by_storage():
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(4, requires_grad=True)

    def forward():
        y = x * weight  # keeps both
        return y[:1] * y[1:2] * y.exp()  # y once, its exponential, the first product

    assert saved.saved_bytes(forward, [x, weight]) == 4 * (12 + 12 + 4)
    assert saved.saved_bytes(forward, []) == 4 * (12 + 12 + 4 + 12 + 4)
    assert saved.allocated(lambda: torch.ones(1000) + torch.ones(1000)) == 12000


WIDER = MixinSize(width=128, heads=2, layers=2, wide=1024)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)])
@pytest.mark.parametrize("case", ["96_1_one", "96_8_one", "96_8_many", "96_8_none", "1k_8_one"])
def test_what_a_step_keeps_is_predicted(case, dtype, monkeypatch):
    monkeypatch.setitem(cases.MIXINS, "wider", WIDER)
    pack = SMALL_PACKS[case]
    inputs = BlockStep("wider", pack, Clock("cpu", dtype, Limits(GEMM, COPY), 1))
    sizes = step_memory.Sizes.of(pack, WIDER, dtype.itemsize, cpu=True)
    for name, step in inputs.steps(compiled=False).items():
        way = step_memory.ways(cpu=True)[name]
        kept = saved.saved_bytes(step.outputs, inputs.given)
        assert step_memory.kept_bytes(way, sizes) == kept, name
        most = saved.allocated(step.run)
        # The attention's gradient on a CPU allocates blocks of constant size, which small cases
        # do not fill, in float32.
        if (case, dtype) == ("1k_8_one", torch.float32) or name == "published":
            assert step_memory.peak_bytes(way, sizes) == pytest.approx(most, rel=0.1), name


@pytest.mark.parametrize("size", ["2B", "9B"])
def test_the_wanted_block_keeps_less_than_half(size):
    for case in ("16k_1_many", "16k_8_many", "16k_64_one", "4k_8_one"):
        sizes = step_memory.Sizes.of(PACKS[case], cases.MIXINS[size], 2, cpu=False)
        published, cheap, least = (
            step_memory.kept_bytes(way, sizes)
            for way in (step_memory.PUBLISHED, step_memory.CHEAP, step_memory.PROJECTIONS)
        )
        assert least < 0.5 * cheap < 0.25 * published


@pytest.mark.parametrize("size", ["2B", "9B"])
def test_the_peak_of_a_block_is_less_than_half(size):
    """Of activations; the gradients of the weights are the same."""
    for case in ("16k_1_many", "16k_8_many", "16k_64_one", "4k_8_one"):
        sizes = step_memory.Sizes.of(PACKS[case], cases.MIXINS[size], 2, cpu=False)
        published, cheap, least = (
            step_memory.peak_bytes(way, sizes, learning=False)
            for way in (step_memory.PUBLISHED, step_memory.CHEAP, step_memory.PROJECTIONS)
        )
        assert least < cheap < 0.5 * published


def test_attention_on_a_whole_row_is_each_sample_on_its_own():
    """The truth of a pack: gradients of one sample do not depend on the others."""
    pack = SMALL_PACKS["96_8_one"]
    inputs = AttentionStep("tiny", "c", pack, clock())
    step = inputs.steps(compiled=False)["ours"]
    _, dq, dk, _ = step.run()
    count, length = pack.samples[0][0], pack.lengths[0]
    step.cotangents[0][:, count:] = 0
    _, own, of_keys, _ = step.run()
    torch.testing.assert_close(own[:, :count], dq[:, :count])
    assert not own[:, count:].any()
    torch.testing.assert_close(of_keys[:length], dk[:length])
    assert not of_keys[length:].any()
