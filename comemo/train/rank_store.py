"""What ranks tell each other beside their collectives: signs of life, and why one of them failed.

It goes through the key-value store that the ranks met at, by a connection of its own: a store
answers one thread at a time, and a rank may be waiting in it.
"""

import json
import socket
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from comemo.train import ranks

NOBODY = -1  # the rank of a fault that no rank has
NAMED = 8  # ranks of a message
DONE = "done"  # instead of a sign of life
STORE_FAULTS = (RuntimeError, OSError, ValueError)  # of a store that does not answer
_FAULT = "fault"
_ROUNDTRIP_KEYS = 256  # keys that are asked for at once


@dataclass(frozen=True)
class Fault:
    """Why all ranks end.

    Attributes:
        text: one line; empty for Ctrl-C, of which the first rank tells itself.
        rank, host: of the rank that tells it, or `NOBODY` and "".
    """

    text: str
    rank: int
    host: str


class RankStore:
    """The store, as one rank uses it. Every method may raise one of `STORE_FAULTS`.

    Args:
        store: a connection of its own, with names that only this run has.

    Attributes:
        rank, ranks: index of this rank, number of all.
        host: name of its machine.
    """

    def __init__(self, store: Any) -> None:
        self.rank, self.ranks, self.host = ranks.rank(), ranks.world_size(), socket.gethostname()
        self._store, self._shown = store, 0

    @staticmethod
    def connect(timeout: float) -> "RankStore | None":
        """Connect to the store of the process group. All ranks must call.

        Args:
            timeout: seconds for each answer.

        Returns:
            None on all ranks if one of them cannot: their group has no TCPStore.
        """
        token, own = ranks.from_first(uuid.uuid4().hex), None
        known, wait = _store_of_group(), timedelta(seconds=timeout)
        with suppress(*STORE_FAULTS, AttributeError):
            store = dist.TCPStore(known.host, known.port, timeout=wait, wait_for_workers=False)
            own = RankStore(dist.PrefixStore(f"comemo/{token}", store))
            own.show_sign("")
        return own if all(ranks.gather(own is not None)) else None

    # --- signs of life ---

    def show_sign(self, place: str) -> None:
        """Show that this rank lives, and where it is, such as ", stage finetune, step 7"."""
        self._shown += 1
        self._store.set(_sign_of(self.rank), json.dumps([self._shown, self.host, place]))

    def show_end(self) -> None:
        """This rank has ended, well or not: its sign stands still from now on."""
        self._store.set(_sign_of(self.rank), DONE)

    def sign(self, rank: int) -> str:
        """The last sign of a rank, another one each time; `DONE` at the end."""
        return self._store.get(_sign_of(rank)).decode()

    def signs(self) -> dict[int, str]:
        """The last sign of each other rank that has not ended."""
        keys, found = [_sign_of(rank) for rank in range(self.ranks)], list[bytes]()
        for start in range(0, self.ranks, _ROUNDTRIP_KEYS):
            found += self._store.multi_get(keys[start : start + _ROUNDTRIP_KEYS])
        signs = {rank: sign.decode() for rank, sign in enumerate(found)}
        return {r: s for r, s in signs.items() if s != DONE and r != self.rank}

    def name_still(self, before: dict[int, str]) -> str:
        """The ranks whose sign is that of `before`; empty if there is none.

        Args:
            before: what `signs` returned some time ago.

        Returns:
            Such as "rank 3 of 8 (node2), stage finetune, step 7".
        """
        still = [rank for rank, sign in self.signs().items() if sign == before.get(rank)]
        named = []
        for rank in still[:NAMED]:
            _, host, place = json.loads(before[rank])
            named.append(f"rank {rank} of {self.ranks} ({host}){place}")
        more = f" and {len(still) - NAMED} more" if len(still) > NAMED else ""
        return "; ".join(named) + more

    # --- faults ---

    def publish(self, fault: Fault) -> Fault:
        """Tell all ranks why they end. The first one to publish counts, and is returned."""
        found = self._store.compare_set(_FAULT, "", json.dumps(asdict(fault)))
        return Fault(**json.loads(found))

    def fault(self) -> Fault | None:
        """What a rank has published."""
        if not self._store.check([_FAULT]):
            return None
        return Fault(**json.loads(self._store.get(_FAULT)))

    def count(self, key: str, more: int = 0) -> int:
        """The number of ranks that have counted themselves under a name."""
        return self._store.add(key, more)


def _store_of_group() -> Any:
    """The store under all prefixes; None if torch does not give it away."""
    try:
        store: Any = dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError):
        return None
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def _sign_of(rank: int) -> str:
    return f"sign/{rank}"
