"""Several ranks of torch.distributed as forks of the test's process: no new start of Python."""

import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

ENDED = ".ended"  # of the file that marks the end of a rank, without a result or with one
PATIENCE = 60  # seconds of a test on quiet cores, at most


class RankFailed(AssertionError):
    """A rank raised or was killed; the message has its traceback."""


def free_port():
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_ranks(count, function, *args, patience=PATIENCE, group=True, killed=()):
    """Call `function(*args)` on each of `count` ranks, which are joined by gloo.

    Args:
        count: number of processes.
        function: may be a closure; its result can be pickled.
        args: of the function.
        patience: seconds until ranks that still run are killed, and the test fails.
        group: whether the process group is made; otherwise only the variables of torchrun are set.
        killed: ranks that may end without a result.

    Returns:
        The results in the order of the ranks; None for ranks in `killed` without one.

    Raises:
        RankFailed: a rank raised, was killed or took too long.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        pids = {}
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, count, port, Path(folder), function, args, group)
            pids[rank] = pid
        late = _wait(pids, Path(folder), time.monotonic() + patience)
        faults, results = [], []
        for rank in range(count):
            file = Path(folder) / str(rank)
            kind, value = pickle.loads(file.read_bytes()) if file.exists() else ("end", "no result")
            if rank in late:
                kind, value = "end", f"still ran after {patience} s"
            if kind != "result" and rank not in killed:
                faults.append(f"rank {rank}: {value}")
            results.append(value if kind == "result" else None)
        if faults:
            raise RankFailed("\n".join(faults))
        return results


def _wait(pids, folder, deadline):
    """Ranks that did not end in time, which are killed."""
    open_ranks, late = dict(pids), []
    while open_ranks:
        for rank, pid in list(open_ranks.items()):
            if os.waitpid(pid, os.WNOHANG)[0]:
                del open_ranks[rank]
                (folder / f"{rank}{ENDED}").touch()
        if open_ranks and time.monotonic() > deadline:
            late = list(open_ranks)
            for pid in open_ranks.values():
                os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)
    return late


def _has_ended(folder, rank):
    return (folder / str(rank)).exists() or (folder / f"{rank}{ENDED}").exists()


def _be_rank(rank, count, port, folder, function, args, group):
    """The life of a forked rank. It never returns to the test."""
    status = 1
    try:
        torch.set_num_threads(1)  # threads of the test's process do not exist here
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        if group:
            dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
            dist.barrier()  # or a rank that ends at once would break the connections of others
        found = pickle.dumps(("result", function(*args)))
        status = 0
    except BaseException:
        found = pickle.dumps(("error", traceback.format_exc()))
    try:
        partial = folder / f".{rank}"
        partial.write_bytes(found)
        partial.rename(folder / str(rank))
        if dist.is_initialized() and status == 0:
            if rank == 0:  # it has the store that others may be using
                others = range(1, count)
                while not all(_has_ended(folder, other) for other in others):
                    time.sleep(0.005)
            dist.destroy_process_group()
    finally:
        os._exit(status)
