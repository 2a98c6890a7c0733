"""Launchers that start one process for each rank, and what they tell it by its environment.

torchrun and `accelerate launch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT,
PyTorchJob all but LOCAL_RANK. Slurm's srun says the same by other names.
"""

import os
import re
from collections.abc import MutableMapping
from datetime import timedelta

from torch import distributed as dist

from comemo.train import ranks

FIRST_PORT, PORTS = 15_000, 10_000  # of the address where ranks meet, by the number of the job
JOIN_SECONDS = 600.0  # for all processes to start
_KEPT: list[dist.TCPStore] = []  # its server is that of the group, too, while this process lives


def complete_environment(environment: MutableMapping[str, str] | None = None) -> None:
    """Set the variables of torchrun in a process that was started as one of several without it.

    What is set stays. srun: the variables of its tasks are translated. A batch script itself has
    SLURM_PROCID, too, but no number of tasks of a step: it is one process. RANK and WORLD_SIZE
    without LOCAL_RANK, as of PyTorchJob: one process on each machine.

    Args:
        environment: None for that of this process.
    """
    env = os.environ if environment is None else environment
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in env and "SLURM_PROCID" in env and tasks != "1":
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], tasks
        env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")))
        job = re.sub(r"\D", "", env.get("SLURM_JOB_ID", "")) or "0"
        env.setdefault("MASTER_PORT", str(FIRST_PORT + int(job) % PORTS))
    elif "RANK" in env and env.get("WORLD_SIZE", "1") != "1":
        env.setdefault("LOCAL_RANK", "0")


def first_host(nodes: str) -> str:
    """The first name of a list of Slurm, such as node03 of "node[03-05,9],login1"."""
    match = re.match(r"([^,\[]*)(?:\[([^\],-]*)[^\]]*\])?([^,]*)", nodes)
    return "".join(part or "" for part in match.groups()) if match else nodes


def await_ranks(seconds: float = JOIN_SECONDS) -> None:
    """Wait until all ranks have started, before the group is made, whose time limit is hours.

    torchrun does so itself: then nothing is done.

    Args:
        seconds: for all to start.

    Raises:
        RuntimeError: ranks that did not start; the message has their numbers.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return
    rank, count = int(env["RANK"]), int(env["WORLD_SIZE"])
    where = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
    try:
        store = dist.TCPStore(
            env["MASTER_ADDR"],
            int(env["MASTER_PORT"]),
            is_master=rank == 0,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        raise RuntimeError(f"rank {rank} of {count}: rank 0 is not at {where}: {error}") from error
    _KEPT.append(store)
    store.set(f"comemo/here/{rank}", "")
    keys = [f"comemo/here/{other}" for other in range(count)]
    try:
        # The first rank, which has the store, is the last to give up.
        store.wait(keys, timedelta(seconds=seconds if rank else seconds + 2))
    except RuntimeError as error:
        text = f"rank {rank} of {count} {_why_alone(store, keys, where)}"
        raise ranks.on_all(RuntimeError(text)) from error


def _why_alone(store: dist.TCPStore, keys: list[str], where: str) -> str:
    """Which ranks did not start, as the end of a message."""
    try:
        missing = [other for other, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return f"waited at {where} for others, and rank 0 has ended there"
    shown = ", ".join(map(str, missing[:16])) + (" ..." if len(missing) > 16 else "")
    return f"waited at {where} for ranks that did not start: {shown}"
