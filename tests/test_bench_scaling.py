"""Formulas of distributed training: against counted bytes, real models and cases by hand."""

from collections import Counter

import pytest
import torch
from small import make_model
from timed import options_of

from bench import scaling
from bench.models import made_on
from bench.recipe_batch import draw_batch
from bench.scaling_measured import count_step, fit_link, on_ranks, pack_of, time_links
from bench.scaling_memory import Prompt, serving_memory, training_memory
from bench.scaling_plans import Links, Message, Plan
from bench.scaling_sizes import PARTS, Pack, Sizes, config_of, flops, make_units, total_flops
from bench.scaling_steps import messages, step
from comemo.conditional_generation import CoMemoForConditionalGeneration

PACK, PROMPT = Pack(), Prompt()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("forks"),
]


@pytest.fixture(scope="module")
def published():
    """Config, sizes and units by name."""
    found = {}
    for name in ("2B", "9B", "tiny"):
        config = config_of(name)
        found[name] = config, Sizes.of(config), make_units(config)
    return found


# --- sizes ---


@pytest.mark.parametrize("name", ["2B", "9B", "tiny"])
def test_parameters_by_part_are_those_of_the_model(name, published):
    config, of, units = published[name]
    with made_on("meta", torch.float32):
        whole = sum(p.numel() for p in CoMemoForConditionalGeneration(config).parameters())
    formula = of.parameters()
    assert sum(formula.values()) == whole
    for part in PARTS:
        assert sum(unit.elements(parts=[part]) for unit in units) == formula[part]
    assert len(units) == 1 + of.vision_layers + of.layers
    assert sum(any(w.part == "mixin" for w in u.weights) for u in units) == of.mixins


def test_sizes_that_were_published(published):
    assert round(sum(published["2B"][1].parameters().values()) / 1e9, 2) == 2.61
    assert round(sum(published["9B"][1].parameters().values()) / 1e9, 1) == 10.0
    mixin = published["2B"][1].mixin_linear * 6
    assert mixin == 6 * (4 * 2048 * 2048 + 3 * 2048 * 8192)


def test_flops_of_a_pack_by_hand(published):
    of, pack = published["2B"][1], Pack()
    head = 2 * pack.labels * 92553 * 2048
    frozen, trained = (flops(of, pack, stage) for stage in ("pretrain", "finetune"))
    assert trained["head"] == (head, 2 * head)
    assert frozen["head"] == (head, head)
    assert frozen["vision"].backward == 0
    assert trained["vision"].backward == pytest.approx(3 * trained["vision"].forward)
    without = total_flops(of, pack, "finetune", checkpointing=False)
    layers = sum(trained[part].forward for part in ("vision", "decoder", "mixin"))
    assert total_flops(of, pack, "finetune") - without == pytest.approx(layers)


def test_a_weight_of_one_row_is_whole_on_every_rank(published):
    rest = published["2B"][2][0]
    positions = next(w for w in rest.weights if w.shape == (1, 1025, 1024))
    assert positions.rows_of(1024) == positions.size
    assert rest.elements(1024) > rest.elements() + 1000 * positions.size


# --- messages ---


@pytest.fixture(scope="module")
def small():
    """A tiny config, its sizes and units, and a batch of three images in two samples."""
    config = make_model(vocab_size=512).config
    config.mixin_config.num_heads, config.image_token_id = 4, 500
    batch = draw_batch(config, 3 * config.tokens_per_tile + 40, 3, 2)
    return config, Sizes.of(config), make_units(config), batch


def assert_counted(small, plan, stage):
    config, of, units, batch = small
    wanted = messages(plan, units, of, pack_of(batch), stage, itemsize=4)
    nbytes, count = Counter(), Counter(message.kind for message in wanted)
    for message in wanted:
        nbytes[message.kind] += message.nbytes
    for found in on_ranks(plan.gpus, count_step, config, batch, stage, plan):
        assert found == (nbytes, count)


@pytest.mark.parametrize(
    ("plan", "stage"),
    [
        (Plan(2), "pretrain"),
        (Plan(2, zero=True), "finetune"),
        (Plan(2, shards=2), "pretrain"),
        (Plan(2, shards=2), "finetune"),
    ],
    ids=str,
)
def test_bytes_and_numbers_of_real_messages(small, plan, stage):
    assert_counted(small, plan, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "plan",
    [Plan(4, shards=2), Plan(2, tensor=2), Plan(4, shards=2, tensor=2), Plan(3, shards=3)],
    ids=lambda plan: plan.name,
)
def test_bytes_and_numbers_of_replicas_and_divided_layers(small, plan, stage):
    assert_counted(small, plan, stage)


def test_a_rank_that_fails_is_told():
    with pytest.raises(RuntimeError, match=r"rank 0 failed: (?s:.*)ZeroDivisionError"):
        on_ranks(2, lambda: 1 / 0)


# --- time ---


def test_seconds_of_messages_by_hand():
    links = Links(within=100e9, between=10e9)
    large = Message("all_gather", 8e12, 8)
    assert large.wire == 7e12
    assert large.seconds(links) == pytest.approx(70, rel=1e-5)
    # 16 ranks on two nodes share 8 adapters; 4 that are in different nodes have one each.
    assert Message("all_reduce", 16e12, 16).seconds(links) == pytest.approx(30e12 / 80e9, rel=1e-5)
    assert Message("all_reduce", 4e12, 4, 8).seconds(links) == pytest.approx(6e12 / 10e9, rel=1e-5)
    # A byte within a node: the base and 14 hops of "LL".
    short = Message("all_reduce", 1, 8).seconds(links)
    assert short == pytest.approx(6.6e-6 + 14 * 0.6e-6, rel=1e-3)
    assert Message("all_reduce", 1e9, 1).seconds(links) == 0
    # A ring of 1,024 ranks has 127 hops between nodes.
    ring = Message("all_gather", 1, 1024).seconds(links)
    assert ring == pytest.approx(6.6e-6 + 896 * 0.6e-6 + 127 * 2.7e-6, rel=1e-3)


def test_without_a_link_that_waits_a_step_is_computing_and_updating(published):
    _, of, units = published["2B"]
    swift = Links(within=1e30, between=1e30)
    for plan in (Plan(1), Plan(8), Plan(8, shards=8)):
        found = step(plan, units, of, Pack(), "finetune", 1.104, 3, swift)
        alone = step(Plan(1), units, of, Pack(), "finetune", 1.104, 1, swift)
        assert alone.seconds == pytest.approx(1.104)
        assert found.compute == pytest.approx(3 * alone.compute)
        assert found.exposed < 0.02  # latencies
        assert found.update == pytest.approx(alone.update / plan.shards, rel=1e-9)


def test_slow_links_are_exposed(published):
    _, of, units = published["2B"]
    slow = Links(within=1e9, between=1e9)
    whole = 4 * sum(of.parameters().values())
    found = step(Plan(8), units, of, Pack(), "finetune", 1.104, 1, slow)
    backward = found.compute * 0.75  # about: four parts, of which the forward pass is one
    assert found.exposed == pytest.approx(2 * 7 / 8 * whole / 1e9 - backward, rel=0.02)
    found = step(Plan(8, shards=8), units, of, Pack(), "finetune", 1.104, 1, slow)
    # All gathered twice in bfloat16, but the rest once, and reduced in float32.
    assert found.exposed + found.compute > 7 / 8 * (2 * 2 + 4 - 0.4) * whole / 4 / 1e9


def test_replicas_exchange_gradients_once_a_step(published):
    _, of, units = published["2B"]

    def wire(plan, packs):
        return step(plan, units, of, Pack(), "finetune", 1.104, packs, Links()).wire

    one, four = (wire(Plan(16, shards=8), packs) for packs in (1, 4))
    within = wire(Plan(8, shards=8), 1)  # what each pack needs
    assert four == pytest.approx(one + 3 * within)
    assert one > within


def test_time_grows_with_slower_links_and_more_nodes(published):
    _, of, units = published["2B"]

    def seconds(plan, **speeds):
        return step(plan, units, of, Pack(), "finetune", 1.104, 1, Links(**speeds)).seconds

    for plan in (Plan(64, zero=True), Plan(64, shards=64), Plan(64, shards=8)):
        times = [seconds(plan, between=speed) for speed in (100e9, 10e9, 1e9)]
        assert times == sorted(times)
        assert times[0] < times[2]
    for shape in ({}, {"zero": True}):
        times = [seconds(Plan(gpus, **shape)) for gpus in (8, 64, 1024)]
        assert times == sorted(times)
    assert seconds(Plan(1024, shards=8)) < seconds(Plan(1024, shards=1024))


def test_plans_that_do_not_fit_are_refused(published):
    of, units = published["2B"][1:]
    for plan in (Plan(8, shards=3), Plan(0), Plan(8, shards=2, zero=True), Plan(16, tensor=16)):
        with pytest.raises(ValueError, match=r"^Plan: "):
            plan.check(of)
    with pytest.raises(ValueError, match=r"^step: alone must exceed an update"):
        step(Plan(1), units, of, Pack(), "finetune", 1e-6, 1, Links())


# --- memory ---


def test_peak_that_was_measured(published):
    """A step of 2B on an H200 peaked at 44.7 GiB, see bench/results/h200/bench-b19f164."""
    found = training_memory(Plan(1), published["2B"][2], published["2B"][1], Pack(), "finetune")
    assert found.total / 2**30 == pytest.approx(44.706, rel=0.03)


def test_memory_of_plans_by_hand(published):
    _, of, units = published["2B"]
    count = sum(of.parameters().values())

    def held(plan, stage="finetune", pack=PACK):
        return training_memory(plan, units, of, pack, stage)

    alone, ddp, zero, fsdp = map(held, (Plan(1), Plan(8), Plan(8, zero=True), Plan(8, shards=8)))
    assert (alone.weights, alone.gradients, alone.moments) == (4 * count, 4 * count, 8 * count)
    assert ddp == alone
    assert zero.moments == count
    for name in ("weights", "gradients", "moments"):
        assert getattr(fsdp, name) == pytest.approx(getattr(alone, name) / 8, rel=0.01)
    # The optimizer cannot divide the embeddings.
    assert held(Plan(64, zero=True)).moments == 8 * 92553 * 2048
    assert held(Plan(8, shards=4, tensor=2)).total < fsdp.total + 1e9
    assert held(Plan(8, shards=8), pack=Pack(4096, 12)).activations < fsdp.activations / 2
    trained = sum(of.parameters()[part] for part in ("projector", "mixin"))
    frozen = held(Plan(1), "pretrain")
    assert frozen.moments == 8 * trained
    linear = sum(w.size for u in units for w in u.weights if w.linear and w.part != "mixin")
    assert 4 * count - 2 * linear <= frozen.weights < 4 * count - 1.9 * (linear - of.fold * 4096)


def test_memory_of_serving(published):
    config, of, units = published["2B"]

    def held(tensor, stages, prompt=PROMPT):
        return serving_memory(config, units, prompt, tensor, stages, 4e12)

    alone = held(1, 1)
    assert alone.weights == 2 * (sum(of.parameters().values()) - 2048)  # all but the final norm
    assert alone.cache == 2 * 2 * 8192 * 24 * 1024
    assert alone.memory == 2 * 13 * 256 * (2 * 6 * 2048 + 2048)
    for tensor in (2, 4, 8):
        divided = held(tensor, 1)
        assert divided.cache == alone.cache / tensor
        assert divided.token_seconds < alone.token_seconds
        assert alone.weights / tensor < divided.weights < alone.weights
    assert held(1, 2).token_seconds == pytest.approx(alone.token_seconds)
    totals = [held(1, stages).total for stages in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
    for tensor, stages in ((3, 1), (16, 1), (1, 25), (1, 0)):
        with pytest.raises(ValueError, match=r"^serving_memory: "):
            held(tensor, stages)


# --- command ---


@pytest.mark.parametrize("table", ["memory", "steps", "serving"])
def test_tables(table):
    rows = list(scaling.run(options_of(scaling, "--table", table, "--gpus", "1", "64")))
    assert len(rows) > 6
    assert all(row["total_gb"] > 1 for row in rows if "total_gb" in row)
    assert all(0 < row["efficiency"] < 1.1 for row in rows if table == "steps")


def test_weak_and_strong_scaling(capsys):
    words = ("--gpus", "1", "8", "2048")
    strong = list(scaling.run(options_of(scaling, *words)))
    assert {row["packs"] for row in strong} == {1024}
    assert "2048 readers do not divide 1024" in capsys.readouterr().out
    weak = list(scaling.run(options_of(scaling, *words, "--packs-per-gpu", "2")))
    assert {row["packs"] / row["gpus"] for row in weak} == {2}
    assert weak[0]["efficiency"] == strong[0]["efficiency"] == pytest.approx(1)
    assert strong[1]["step_s"] == pytest.approx(strong[0]["step_s"] / 8, rel=0.01)


def test_links_are_fitted_and_timed():
    points = [(Message("all_gather", n, 2), 1e-4 + n / 2 / 1e9) for n in (1e3, 1e5, 1e7)]
    link = fit_link(points)
    assert (link.latency, link.bandwidth) == pytest.approx((1e-4, 1e9))
    assert link.error < 1e-9
    assert link.seconds(points[1][0]) == pytest.approx(points[1][1])
    with pytest.raises(ValueError, match="at least 2"):
        fit_link(points[:1])
    with pytest.raises(ValueError, match="take longer"):
        fit_link([(message, 1 / message.nbytes) for message, _ in points])
    timed = on_ranks(2, time_links, [4096, 2**20], 2)[0]
    assert [message.nbytes for message, _ in timed] == [4096] * 4 + [2**20] * 4
    assert all(seconds > 0 for _, seconds in timed)


@pytest.mark.slow
def test_check_table(small, monkeypatch):
    monkeypatch.setattr(scaling, "config_of", lambda name: small[0])
    monkeypatch.setattr(scaling, "LINK_SIZES", (4096, 2**22))
    rows = list(scaling.run(options_of(scaling, "--table", "check", "--repeats", "1")))
    links, (alone, *plans) = rows[:-4], rows[-4:]
    assert len(links) == 4 * 2 + 4
    assert alone["measured_s"] > 0
    assert [row["check"] for row in plans] == ["ddp", "ddp, shard_optimizer", "fsdp"]
    for row in plans:
        assert row["counted_mb"] == row["formula_mb"] > 1
        assert 0 < row["low_s"] < row["high_s"]
        assert row["measured_s"] > 0
