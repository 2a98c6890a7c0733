"""In which order replicas are asked."""

import random
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256


def order_replicas(
    names: Sequence[str],
    picture: str | None,
    loads: Mapping[str, int],
    avoid: Collection[str] = (),
) -> list[str]:
    """Names of replicas, those that should answer first.

    Each picture has its own first and second replica (rendezvous hashing): whoever computes them
    finds the same ones, and a replica that comes or goes changes those of few pictures. The others
    follow by load, as all do without a picture.

    Args:
        names: of the replicas.
        picture: digest of a picture; None for none.
        loads: requests of each replica.
        avoid: names of replicas that come last.
    """
    order = sorted(names, key=lambda name: (loads.get(name, 0), random.random()))
    if picture is not None:
        own = sorted(names, key=lambda name: sha256(f"{picture} {name}".encode()).digest())[:2]
        order = [*own, *(name for name in order if name not in own)]
    return sorted(order, key=lambda name: name in avoid)
