"""Batch inference on several ranks: who answers what, ranks that are killed or fail, resuming."""

import os
from pathlib import Path

import pytest
import torch
from batches import QUESTIONS, answer, answer_as_rank, draw, dying, mixed_rows, read, write_requests
from rank_processes import run_ranks

from comemo import device
from comemo.batch import ranks
from comemo.batch.parts import RunFolder
from comemo.batch.ranks import Rank, read_rank
from comemo.batch.run import deal
from comemo.cli.arguments import shipped_checkpoint
from comemo.cli.checkpoints import load_checkpoint

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]
FEW = [{"question": q, "image": f"{i % 4}.png", "id": i} for i, q in enumerate(QUESTIONS * 3)]


@pytest.fixture(scope="module")
def nano():
    return load_checkpoint(shipped_checkpoint())


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def alone(nano, tmp_path_factory):
    """The answers of one process to FEW."""
    folder = tmp_path_factory.mktemp("alone")
    draw(folder)
    write_requests(folder, FEW)
    return answer(folder, nano)[1]


def test_any_number_of_ranks_gives_the_same_answers(nano, folder, alone):
    write_requests(folder, [*FEW[:5], "", *FEW[5:]])
    found = run_ranks(2, answer_as_rank, folder, nano, group=False)
    assert [summary.answered for summary, _ in found] == [12, 6]
    moved = [row | {"line": row["line"] + (row["line"] > 5)} for row in alone]
    assert read(folder / "answers.jsonl") == moved
    assert [p.name for p in folder.glob("answers*")] == ["answers.jsonl"]


def test_more_ranks_than_lines(nano, folder, alone):
    write_requests(folder, FEW[:2])
    found = run_ranks(4, answer_as_rank, folder, nano, group=False)
    assert [summary.answered for summary, _ in found] == [2, 1, 0, 0]
    assert read(folder / "answers.jsonl") == alone[:2]


@pytest.mark.parametrize("later", [1, 3])
def test_a_killed_rank_loses_the_answer_in_work_alone(nano, folder, alone, later):
    """It is named, the other finishes, and any number of ranks answers the rest."""
    write_requests(folder, FEW)
    told = []

    def work():
        rank = read_rank()
        if rank.index == 1:
            dying(nano[0], 3)
        summary, found = answer(folder, nano, rank, tell=told.append)
        return summary, found, told

    (summary, found, told), nothing = run_ranks(2, work, group=False, killed={1})
    assert nothing is None
    assert found is None  # no output
    assert (summary.answered, summary.failed, summary.missing) == (8, 0, 4)
    reason = "ended without a word (killed?), its first missing line is 6"
    assert (summary.faults, told) == ({1: reason}, [f"rank 1: {reason}"])

    def resume():
        calls = dying(nano[0], 0)
        return answer(folder, nano, read_rank())[0], len(calls)

    found = run_ranks(later, resume, group=False)
    assert sum(calls for _, calls in found) == 4
    assert max(calls for _, calls in found) == (4 if later == 1 else 2)  # the rest is dealt anew
    assert found[0][0].answered == 12
    assert read(folder / "answers.jsonl") == alone


def test_a_killed_first_rank(nano, folder, alone):
    write_requests(folder, FEW)

    def work():
        rank = read_rank()
        if rank.is_first:
            dying(nano[0], 2)
        return answer(folder, nano, rank)[0]

    nothing, summary = run_ranks(2, work, group=False, killed={0})
    assert (nothing, summary.answered) == (None, 6)
    assert (RunFolder(folder / "answers.jsonl").path / "plan.json").exists()
    calls = dying(nano[0], 0)
    try:
        assert answer(folder, nano)[1] == alone
    finally:
        del nano[0].generate
    assert len(calls) == 5


@pytest.mark.parametrize("broken", [0, 1])
def test_a_rank_that_fails_stops_no_other(nano, folder, alone, broken):
    write_requests(folder, FEW)

    def work():
        rank = read_rank()

        def fail(**_):
            raise RuntimeError("device-side assert")

        if rank.index == broken:
            nano[0].generate = fail
        try:
            return answer(folder, nano, rank)[0]
        except RuntimeError as error:
            return str(error)

    found = run_ranks(2, work, group=False)
    if broken == 0:
        assert found[0] == "device-side assert"
        assert found[1].answered == 6
    else:
        assert found[0].faults == found[1].faults == {1: "device-side assert"}
        assert (found[0].answered, found[0].missing) == (6, 6)
    assert read(folder / "answers.jsonl") is None
    assert answer(folder, nano)[1] == alone


def test_ranks_that_do_not_begin(nano, folder):
    write_requests(folder, FEW[:2])
    summary, found = answer(folder, nano, Rank(0, 2), patience=0.3)
    assert (summary.missing, summary.faults) == (1, {1: "did not begin within 0.3 s"})
    assert found is None
    with pytest.raises(OSError, match=r"rank 1 found no first rank within 0\.3 s"):
        answer(folder, nano, Rank(1, 2), patience=0.3)


def test_ranks_that_differ(nano, folder):
    write_requests(folder, FEW[:4])
    settings = ({}, {"seed": 1})

    def work():
        rank = read_rank()
        try:
            return answer(folder, nano, rank, **settings[rank.index], patience=1)[0].missing
        except ValueError as error:
            return str(error)

    missing, said = run_ranks(2, work, group=False)
    assert missing == 2
    assert "rank 1 and the first rank differ in their model or options" in said or (
        "holds answers of another model" in said  # the first was fast
    )


@pytest.mark.slow
def test_two_runs_at_once_are_refused(nano, folder):
    write_requests(folder, FEW)
    runs = RunFolder(folder / "answers.jsonl")
    with runs.join(0), pytest.raises(OSError, match=r"another run writes .*answers\.jsonl"):
        answer(folder, nano)
    with runs.join(3):
        with pytest.raises(OSError, match="rank 3 of another run writes"):
            answer(folder, nano)
        summary, _ = answer(folder, nano, name="other.jsonl")
    assert summary.missing == 0
    with runs.join(0):
        runs.write_plan("", "", [[], []])
        with pytest.raises(ValueError, match="differ in their number of ranks"):
            answer(folder, nano, Rank(2, 4))
    assert answer(folder, nano)[0].missing == 0


def test_lines_about_one_picture_stay_together(nano, folder, monkeypatch):
    """In fours here, because each rank gets several groups."""
    rows = [{"question": q, "image": f"{i // 4}.png"} for i, q in enumerate(QUESTIONS * 4)]
    write_requests(folder, [*rows, "{", {"question": "a"}, {"question": "b"}])
    dealt = []
    monkeypatch.setattr(RunFolder, "write_plan", lambda _, *plan: dealt.append(plan[2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(folder, nano, Rank(0, 2))
    lines = [[1, 2, 3], [4], [5, 6, 7], [8], [9, 10, 11], [12], [13, 14, 15], [16]]
    wanted = deal([*lines, [17], [18], [19]], 2)
    assert dealt == [wanted]
    assert sorted(map(len, wanted)) == [9, 10]


def test_ranks_by_the_variables_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert read_rank() == Rank() == Rank(0, 1, 0, None)
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(ValueError, match=r"^read_rank: wanted RANK and WORLD_SIZE"):
        read_rank()
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read_rank() == Rank(5, 8, 5, None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert read_rank() == Rank(5, 8, 1, 4)
    for name, value in (("RANK", "8"), ("LOCAL_RANK", "-1"), ("WORLD_SIZE", "x")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            with pytest.raises(ValueError, match=r"^read_rank: "):
                read_rank()


def test_each_rank_has_its_own_gpu_and_its_part_of_the_cores(monkeypatch):
    chosen, threads = [], []
    monkeypatch.setattr(device, "parse_device", lambda name: torch.device(name or "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    devices = [str(device.device_of_rank(i)) for i in range(3)]
    assert devices == ["cuda:0", "cuda:1", "cuda:0"] == [str(place) for place in chosen]
    assert str(device.device_of_rank(0, "cuda:1")) == "cuda:1"
    assert str(device.device_of_rank(1, "cpu")) == "cpu"
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)), raising=False)
    for local_count in (4, 16, 1, None):
        ranks.share_threads(Rank(0, 16, 0, local_count))
    assert threads == [2, 1]


def test_a_torn_write_of_the_output_leaves_the_parts(nano, folder, alone, monkeypatch):
    write_requests(folder, FEW)
    with monkeypatch.context() as context:
        context.setattr(os, "replace", fail_on(folder / "answers.jsonl"))
        with pytest.raises(OSError, match="disk"):
            answer(folder, nano)
    assert [p.name for p in folder.glob("answers*")] == ["answers.jsonl.parts"]
    assert answer(folder, None)[1] == alone  # without a model


def fail_on(path):
    replace = os.replace

    def fail(old, new):
        if Path(new) == path:
            raise OSError("the disk is full")
        replace(old, new)

    return fail


@pytest.mark.slow
def test_mixed_requests_on_three_ranks_in_batches(nano, folder):
    write_requests(folder, mixed_rows())
    wanted = answer(folder, nano, name="alone.jsonl", batch=1)[1]
    run_ranks(3, lambda: answer_as_rank(folder, nano, batch=4), group=False)
    assert read(folder / "answers.jsonl") == wanted
