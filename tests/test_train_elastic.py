"""A node of a run leaves and comes back: real torchrun agents on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from rank_processes import free_port
from train_runs import changed, entries_of, make_start, settings_of, weights_of

from comemo.train.checkpoints import step_of
from comemo.train.config import write_settings

pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.no_virtual_gpu("Trainer places by its own rules"),
]
# Otherwise torch 2.13 gives a node that comes back no address: others keep that of the first round.
TO_COME_BACK = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
STEPS, PATIENCE = 300, 240  # long enough for a node to come back; seconds


class Node:
    """A torchrun agent with one worker, as of one machine of two."""

    def __init__(self, settings: Path, port: int, log: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2"]
        command += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-id", "run"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        command += ["--rdzv-conf", "last_call_timeout=5", "--local-addr", "127.0.0.1"]
        command += ["-m", "comemo", "train", str(settings)]
        environment = ENVIRONMENT | TO_COME_BACK
        self.log = log
        with log.open("a") as out:
            self.agent = subprocess.Popen(command, env=environment, stdout=out, stderr=out)

    def kill(self) -> None:
        """As a machine that loses its power."""
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children")
        with suppress(OSError):
            for pid in (self.agent.pid, *map(int, children.read_text().split())):
                os.kill(pid, signal.SIGKILL)
        self.agent.wait()

    def wait_until(self, there) -> None:
        deadline = time.monotonic() + PATIENCE
        while not there():
            assert self.agent.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)


def answers(port):
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def find_steps(output):
    """Of all checkpoints."""
    return sorted(step_of(folder) for folder in (output / "pretrain").glob("checkpoint-*"))


def ranks_of(checkpoint):
    """Number of ranks that wrote a checkpoint."""
    return len(torch.load(checkpoint / "data.pt", weights_only=True))


@pytest.mark.slow
def test_a_node_leaves_and_comes_back(tmp_path):
    make_start(tmp_path)
    whole, output = tmp_path / "whole", tmp_path / "run"
    settings = settings_of(tmp_path, whole, steps=STEPS, save_every=STEPS)
    write_settings(settings, tmp_path / "whole.yaml")
    command = [sys.executable, "-m", "comemo", "train", str(tmp_path / "whole.yaml")]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    settings = settings_of(tmp_path, output, steps=STEPS, save_every=5, keep=STEPS)
    write_settings(settings, tmp_path / "settings.yaml")
    port, logs = free_port(), [tmp_path / "first.log", tmp_path / "second.log"]
    nodes = [first := Node(tmp_path / "settings.yaml", port, logs[0])]
    try:
        first.wait_until(lambda: answers(port))  # so it has the store of the rendezvous
        nodes.append(second := Node(tmp_path / "settings.yaml", port, logs[1]))
        first.wait_until((output / "pretrain" / "checkpoint-5").exists)
        second.kill()
        newest = find_steps(output)[-1]
        first.wait_until(lambda: find_steps(output)[-1] > newest)  # the first goes on alone
        nodes.append(second := Node(tmp_path / "settings.yaml", port, logs[1]))
        assert first.agent.wait(PATIENCE) == 0, logs[0].read_text()
        assert second.agent.wait(PATIENCE) == 0, logs[1].read_text()
    finally:
        for node in nodes:
            node.kill()
    counts = [ranks_of(output / "pretrain" / f"checkpoint-{s}") for s in range(5, STEPS + 1, 5)]
    changes = [n for i, n in enumerate(counts) if i == 0 or n != counts[i - 1]]
    assert changes == [2, 1, 2], logs[0].read_text()
    assert "comemo train: rank 1 of 2" in "".join(log.read_text() for log in logs)
    # Text alone has another rounding where ranks must wait for each other's gradients.
    assert entries_of(output) == pytest.approx(entries_of(whole), rel=1e-6)
    assert not changed(weights_of(whole / "model"), weights_of(output / "model"))
