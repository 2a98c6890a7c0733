"""In which order replicas are asked."""

import random
from collections.abc import Sequence
from hashlib import sha256


def order_replicas(
    names: Sequence[str], picture: str | None, avoid: Sequence[str]
) -> list[list[str]]:
    """Groups of replicas, those that should answer first; within a group the idlest one answers.

    Each picture has its own order (rendezvous hashing): whoever computes it finds the same one, and
    a replica that comes or goes changes the first place of few pictures. Without a picture two
    are drawn.

    Args:
        names: of the replicas.
        picture: digest of a picture; None for none.
        avoid: names of replicas that come last.
    """
    wanted = [name for name in names if name not in avoid]
    rest = [name for name in names if name in avoid]
    if picture is None:
        random.shuffle(wanted)
        groups = [wanted[:2], wanted[2:], rest]
    else:
        wanted.sort(key=lambda name: sha256(f"{picture} {name}".encode()).digest())
        groups = [wanted[:1], wanted[1:2], wanted[2:], rest]
    return [group for group in groups if group]
