"""Processes that srun starts, and processes that are missing."""

import os
import time

import pytest
from rank_processes import free_port, run_ranks
from rank_runs import train_on
from train_runs import changed, entries_of, make_start, settings_of, weights_of

from comemo.parallel.environment import complete_environment, first_host
from comemo.train import ranks
from comemo.train.launchers import await_ranks
from comemo.train.recipe import train

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]

OF_SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
}
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5]", "node3"),
        ("node[07,09-12],login1", "node07"),
        ("gpu-a[001-004]-ib", "gpu-a001-ib"),
        ("rack2-node12,rack[3-4]-node1", "rack2-node12"),
    ],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_variables_of_srun():
    env = dict(OF_SRUN)
    complete_environment(env)
    found = {name: env[name] for name in OF_TORCHRUN}
    assert found == {
        "RANK": "11",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": "18456",
    }
    complete_environment(env)
    assert {name: env[name] for name in OF_TORCHRUN} == found
    env = OF_SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    complete_environment(env)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("10.0.0.1", "29500")


@pytest.mark.parametrize(
    "env",
    [
        {},
        OF_SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},  # torchrun under srun
        OF_SRUN | {"SLURM_STEP_NUM_TASKS": "1"},
        # the batch script itself, of a job of 16 tasks
        {"SLURM_JOB_ID": "123456", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_other_processes_are_left_alone(env):
    before = dict(env)
    complete_environment(env)
    assert env == before


def test_one_process_on_each_machine():
    """As of PyTorchJob. accelerate takes a process without LOCAL_RANK for the only one on GPUs."""
    env = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
    before = dict(env)
    complete_environment(env)
    assert env == before | {"LOCAL_RANK": "0"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    return folder


def as_of_srun(port):
    """In a fork: the variables of srun instead of those of torchrun."""
    for name, number in (("SLURM_PROCID", "RANK"), ("SLURM_STEP_NUM_TASKS", "WORLD_SIZE")):
        os.environ[name] = os.environ[number]
    for name in OF_TORCHRUN:
        os.environ.pop(name, None)
    os.environ |= {"SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": str(port)}


@pytest.mark.slow
def test_training_under_srun(start, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    whole = settings_of(start, tmp_path / "whole", steps=3)
    settings, port = settings_of(start, tmp_path / "run", steps=3), free_port()

    def call():
        from accelerate import PartialState

        as_of_srun(port)
        PartialState._reset_state()
        train(settings, [].append)
        return ranks.rank(), ranks.world_size(), os.environ["LOCAL_RANK"]

    train_on(1, whole, group=False)
    assert run_ranks(2, call, group=False) == [(0, 2, "0"), (1, 2, "0")]
    assert entries_of(tmp_path / "run") == pytest.approx(entries_of(tmp_path / "whole"), rel=1e-6)
    one, two = (weights_of(tmp_path / name / "model") for name in ("whole", "run"))
    assert not changed(one, two)


@pytest.mark.slow
def test_ranks_that_do_not_start_are_named():
    def call():
        if os.environ["RANK"] == "1":
            return ""
        begin = time.monotonic()
        with pytest.raises(RuntimeError) as caught:
            await_ranks(1.0)
        assert time.monotonic() - begin < 10
        return str(caught.value)

    first, _, third = run_ranks(3, call, group=False)
    for rank, text in ((0, first), (2, third)):
        assert text.startswith(f"rank {rank} of 3 waited at 127.0.0.1:")
        assert text.endswith("for ranks that did not start: 1")


@pytest.mark.slow
def test_a_first_rank_that_ends_while_others_wait_is_named():
    def call():
        if os.environ["RANK"] == "0":
            with pytest.raises(RuntimeError, match="did not start: 2"):
                await_ranks(0.1)
            return ""
        if os.environ["RANK"] == "2":
            return ""
        with pytest.raises(RuntimeError) as caught:
            await_ranks(30.0)
        return str(caught.value)

    _, text, _ = run_ranks(3, call, group=False)
    assert text.endswith("for others, and rank 0 has ended there")


def test_a_first_rank_that_does_not_start_is_named():
    def call():
        if os.environ["RANK"] == "0":
            return ""
        with pytest.raises(RuntimeError) as caught:
            await_ranks(1.0)
        return str(caught.value)

    _, text = run_ranks(2, call, group=False)
    assert text.startswith("rank 1 of 2: rank 0 is not at 127.0.0.1:")


def test_nothing_is_awaited_under_torchrun(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    await_ranks(0.1)
