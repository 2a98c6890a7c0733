"""Ranks that were started without torchrun: wait until all of them are there."""

import os
from datetime import timedelta

from torch import distributed as dist

from comemo.train import ranks

JOIN_SECONDS = 600.0  # for all processes to start
_KEPT: list[dist.TCPStore] = []  # its server is that of the group, too, while this process lives


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
