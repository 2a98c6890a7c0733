"""A rank that raises, hangs, is killed or frozen ends all others, with one line that names it."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
from conftest import SLOW
from rank_processes import run_ranks
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from train_runs import make_start, settings_of

from comemo.cli.main import main
from comemo.train import ranks, watch_ranks
from comemo.train.config import write_settings
from comemo.train.data.loader import PackLoader
from comemo.train.rank_faults import describe_error
from comemo.train.recipe import train
from comemo.train.trainer import RecipeTrainer
from comemo.train.watch_ranks import Pace, is_told

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]

SLOW_END = 20  # seconds, at most, on busy cores
PACE = Pace(poll=0.05, beat=0.1, still=SLOW_END, grace=1.0)
IMPATIENT = replace(PACE, still=1.0)
HOST = socket.gethostname()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch_ranks, "PACE", PACE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate would give ranks more


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


def break_forward(monkeypatch, action, which=1):
    compute = RecipeTrainer.compute_loss

    def broken(self, *args, **kwargs):
        if ranks.rank() == which and self.state.global_step == 1:
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


@pytest.mark.slow
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
    assert other[1] == "OtherRankFailed" or other[3]
    (line,) = lines_of([other])
    killed, told = (f"rank {rank} of 2 ({HOST}), stage pretrain" for rank in (1, 0))
    assert line.startswith(f"comemo train: {killed}")
    assert "no answer and no sign of life: killed, or its machine does not run" in line
    assert line.endswith(f"; told by {told}, step 2")


@pytest.mark.slow
def test_the_first_rank_is_killed(start, tmp_path, monkeypatch):
    """The store goes with it."""
    break_forward(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL), which=0)
    settings = settings_of(start, tmp_path / "run")
    _, other = on_ranks(lambda tell: train(settings, tell), killed=(0,))
    (line,) = lines_of([other])
    assert line.startswith(f"comemo train: rank 1 of 2 ({HOST}), stage pretrain, step 2: the first")
    assert other[1:] == ("OtherRankFailed", line.removeprefix("comemo train: "), True)


@pytest.mark.slow
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
    assert "divide: 1, 2\n" in err


# --- the watch alone ---


def test_a_rank_that_does_not_wait_for_others_is_ended(tmp_path):
    """As one that hangs in NCCL: its main thread gets no exception."""

    def body():
        if ranks.rank() == 1:
            raise OSError("no such file")
        time.sleep(2 * SLOW_END)

    other, own = on_ranks(watched(body), killed=(0,))
    assert other is None
    assert own[1:] == ("OSError", "no such file", True)
    (line,) = lines_of([own])
    assert line.endswith(": no such file")


def stop_or_kill(tmp_path, which, number, monkeypatch):
    """Rank `which` sends itself a signal; what the other one told, or was told by its thread."""
    monkeypatch.setattr(watch_ranks, "PACE", IMPATIENT)
    told, pid = tmp_path / "told", tmp_path / "pid"

    def call(tell):
        def tell_file(line):
            told.write_text(line)
            os.kill(int(pid.read_text()), signal.SIGKILL)  # also if it is stopped

        with watch_ranks.watch_ranks(tell_file) as work:
            work.begin("finetune")
            if ranks.rank() == which:
                pid.write_text(str(os.getpid()))
                time.sleep(3 * PACE.beat)
                os.kill(os.getpid(), number)
            time.sleep(2 * SLOW_END)

    on_ranks(call, killed=(0, 1))
    return told.read_text()


def test_a_rank_that_stands_still(tmp_path, monkeypatch):
    line = stop_or_kill(tmp_path, 1, signal.SIGSTOP, monkeypatch)
    assert line.startswith(f"comemo train: rank 1 of 2 ({HOST}), stage finetune: no sign of life")
    assert line.endswith(f"told by rank 0 of 2 ({HOST}), stage finetune")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=SLOW)])
def test_the_rank_that_has_the_store_is_gone(tmp_path, number, monkeypatch):
    line = stop_or_kill(tmp_path, 0, number, monkeypatch)
    where = f"comemo train: rank 1 of 2 ({HOST}), stage finetune: the first rank or the launcher"
    assert line.startswith(where)
    assert ("no answer for" in line) == (number == signal.SIGSTOP)


@pytest.mark.parametrize("late", [0, 1])
def test_ranks_may_end_one_after_the_other(late):
    def body():
        if ranks.rank() == late:
            time.sleep(5 * PACE.beat)

    assert on_ranks(watched(body)) == [([], None, "", False)] * 2


@pytest.mark.slow
def test_ctrl_c_on_one_rank_ends_all(start, tmp_path, monkeypatch):
    break_forward(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    settings = settings_of(start, tmp_path / "run")

    def call(tell):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        train(settings, tell)

    found = on_ranks(call)
    assert [name for _, name, *_ in found] == ["KeyboardInterrupt"] * 2
    assert lines_of(found) == []


def test_ctrl_c_is_status_130_where_a_rank_hangs():
    def call(tell):
        def end(status):
            tell(f"status {status}")
            time.sleep(PACE.grace)
            exit_(status)

        exit_ = os._exit
        if ranks.rank() == 0:
            watch_ranks.os._exit = end
        with watch_ranks.watch_ranks(tell):
            if ranks.rank() == 1:
                raise KeyboardInterrupt
            time.sleep(3 * PACE.grace)

    hung, own = on_ranks(call, killed=(0,))
    assert hung is None or hung[0] == ["status 130"]
    assert own[:2] == ([], "KeyboardInterrupt")


def test_an_error_of_all_ranks_is_told_once():
    def body():
        raise ValueError("the same")

    found = on_ranks(watched(body), 3)
    assert [(name, text, told) for _, name, text, told in found] == [
        ("ValueError", "the same", True)
    ] * 3
    assert len(lines_of(found)) == 1


def test_an_error_of_the_first_rank_is_told_by_it():
    def body():
        def fail():
            raise ValueError("the same")

        ranks.on_first(fail)

    found = on_ranks(watched(body))
    assert found == [([], "ValueError", "the same", False)] * 2


def test_what_was_told_is_in_the_summary_of_torchrun(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))

    def body():
        if ranks.rank() == 1:
            raise ValueError("wrong")
        dist.barrier()

    other, _ = on_ranks(watched(body))
    failure = ProcessFailure(1, 0, 1, str(tmp_path / "error.json"))
    assert failure.message["message"] == other[2]
    assert other[2] in ChildFailedError("comemo", {1: failure}).format_msg()


def test_without_a_store_nothing_is_watched(tmp_path):
    def call(tell):
        where = f"file://{tmp_path}/store"
        dist.init_process_group("gloo", init_method=where, rank=ranks_before(), world_size=2)
        with watch_ranks.watch_ranks(tell):
            threads = [thread.name for thread in threading.enumerate()]
            assert "rank-watch" not in threads
            raise ValueError("alone")

    found = on_ranks(call, group=False)
    assert found == [([], "ValueError", "alone", False)] * 2


def ranks_before():
    return int(os.environ["RANK"])


def test_a_trace_becomes_one_line():
    try:
        raise RuntimeError(f"data: a.jsonl:3: {'Traceback (most recent call last):'}\n  x\nOops: y")
    except RuntimeError as error:
        text = describe_error(error)
    assert text.startswith("RuntimeError at test_train_watch_ranks.py:")
    assert text.endswith(": data: a.jsonl:3: Oops: y")
