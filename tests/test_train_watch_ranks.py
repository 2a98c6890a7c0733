"""A rank that raises, hangs, is killed or frozen ends all others, with one line that names it."""

import os
import signal
import socket
import time

import pytest
from rank_processes import run_ranks
from train_runs import make_start, settings_of

from comemo.cli.main import main
from comemo.train import ranks, watch_ranks
from comemo.train.config import write_settings
from comemo.train.data.loader import PackLoader
from comemo.train.recipe import train
from comemo.train.trainer import RecipeTrainer
from comemo.train.watch_ranks import Pace, is_told

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]

PACE = Pace(poll=0.05, beat=0.1, still=1.0, grace=1.0)
SLOW_END = 20  # seconds, at most, on busy cores
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch_ranks, "PACE", PACE)


def alone():
    """Forget what accelerate knows of the test's process."""
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


def outcome(call):
    """What a rank told, and what it raised: (lines, name of the type, message, whether told)."""
    told = []
    try:
        alone()
        call(told.append)
    except BaseException as error:
        return told, type(error).__name__, str(error), is_told(error)
    return told, None, "", False


def on_ranks(call, count=2, **options):
    """Outcomes of `call(tell)` on each rank; all must be there within seconds."""
    begin = time.monotonic()
    found = run_ranks(count, lambda: outcome(call), patience=SLOW_END, **options)
    assert time.monotonic() - begin < SLOW_END
    return found


def watched(body):
    """A function for `on_ranks`: the body within `watch_ranks`."""

    def call(tell):
        with watch_ranks.watch_ranks(tell) as work:
            work.begin("finetune")
            body()

    return call


def lines_of(found):
    """What the watch told, of all ranks."""
    return [line for told, *_ in found for line in told if line.startswith("comemo train: ")]


# --- training ---


def break_loader(monkeypatch):
    make = PackLoader._make_batch

    def broken(self, stream):
        if ranks.rank() == 1 and stream.given == 1:
            raise ValueError("data: pictures.jsonl:12: no answer")
        return make(self, stream)

    monkeypatch.setattr(PackLoader, "_make_batch", broken)


def break_forward(monkeypatch, action):
    compute = RecipeTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if ranks.rank() == 1 and self.state.global_step == 1:
            action()
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(RecipeTrainer, "compute_loss", broken)


def test_an_error_in_the_loader(start, tmp_path, monkeypatch):
    """The other rank waits in a gather."""
    break_loader(monkeypatch)
    settings = settings_of(start, tmp_path / "run")
    other, own = on_ranks(lambda tell: train(settings, tell))
    where = f"rank 1 of 2 ({HOST}), stage pretrain, step 2: ValueError at test_train_watch_ranks.py"
    assert own[1:] == ("ValueError", "data: pictures.jsonl:12: no answer", True)
    assert other[1] == "OtherRankFailed"
    assert other[3]
    (line,) = lines_of([other, own])
    assert line == f"comemo train: {other[2]}"
    assert other[2].startswith(where.replace("test_train_watch_ranks", "loader"))
    assert other[2].endswith(": data: pictures.jsonl:12: no answer")


def test_an_error_in_the_forward_pass(start, tmp_path, monkeypatch):
    """The other rank waits in a collective of the backward pass."""

    def fail():
        raise RuntimeError("out of everything")

    break_forward(monkeypatch, fail)
    settings = settings_of(start, tmp_path / "run")
    other, own = on_ranks(lambda tell: train(settings, tell))
    assert own[1:] == ("RuntimeError", "out of everything", True)
    assert other[1] == "OtherRankFailed"
    (line,) = lines_of([other, own])
    assert f"rank 1 of 2 ({HOST}), stage pretrain, step 2: data {start}/data.jsonl:" in line
    assert ": RuntimeError at trainer.py:" in line
    assert line.endswith(": out of everything")


def test_a_rank_that_is_killed(start, tmp_path, monkeypatch):
    break_forward(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    settings = settings_of(start, tmp_path / "run")
    other, own = on_ranks(lambda tell: train(settings, tell), killed=(1,))
    assert own is None
    (line,) = lines_of([other])
    assert f"rank 1 of 2 ({HOST}), stage pretrain, step " in line
    assert "no sign of life" in line
    assert other[3]


def test_the_command_tells_one_line(start, tmp_path, monkeypatch, capfd):
    break_loader(monkeypatch)
    write_settings(settings_of(start, tmp_path / "run"), tmp_path / "settings.yaml")

    def call():
        alone()
        return main(["train", str(tmp_path / "settings.yaml")])

    assert run_ranks(2, call, patience=SLOW_END) == [1, 1]
    err = capfd.readouterr().err
    assert err.count("pictures.jsonl:12") == 1
    assert "comemo: error" not in err
    # an error of all ranks has one line, too
    assert run_ranks(3, call, patience=SLOW_END) == [2, 2, 2]
    err = capfd.readouterr().err
    assert err.count("comemo: error: stages.pretrain.packs_per_step must be a multiple") == 1
    assert "got 2, which numbers of ranks divide: 1, 2" in err
