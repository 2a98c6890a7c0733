"""Plans of `bench.scaling`, links of a machine, and the time of one message, by formula."""

import math
from typing import NamedTuple

from bench.scaling_sizes import Sizes, Unit

# Ways in which NCCL sends ("Simple", "LL128", "LL"): share of the bandwidth, and microseconds of a
# collective, of a hop within a node and of one between nodes. NCCL predicts the times of its rings
# by these numbers, see its `src/graph/tuning.cc`, and takes the fastest way.
PROTOCOLS = ((1.0, 8.4, 3.4, 14.0), (0.92, 14.0, 1.9, 4.0), (0.25, 6.6, 0.6, 2.7))


class Links(NamedTuple):
    """Bandwidths in bytes per second and direction of a GPU.

    Of datasheets, not measured: NVLink of an H100 or H200 has 900 GB/s in both directions together;
    one adapter of 400 Gb/s for each GPU.
    """

    per_node: int = 8
    within: float = 450e9
    between: float = 50e9
    memory: float = 4.26e12  # of a GPU's own memory, measured by a copy on an H200


class Plan(NamedTuple):
    """How ranks divide the work.

    Groups of `tensor` neighbours read the same pack. `shards` of these groups hold a copy of the
    weights together; 1 is ddp. `zero` divides the optimizer's state of ddp (ZeRO-1).
    """

    gpus: int
    shards: int = 1
    tensor: int = 1
    zero: bool = False

    @property
    def readers(self) -> int:
        """Groups that read different packs."""
        return self.gpus // self.tensor

    @property
    def replicas(self) -> int:
        """Copies of the weights."""
        return self.readers // self.shards

    def ranks_of(self, unit: Unit) -> tuple[int, int]:
        """Ranks that divide a unit with fsdp, and how far they are from each other."""
        if unit.kind == "decoder":
            return self.shards, self.tensor
        return self.shards * self.tensor, 1

    @property
    def name(self) -> str:
        """As in the settings of a run."""
        if self.gpus == 1:
            return "one GPU"
        if self.shards == self.tensor == 1:
            return "ddp, shard_optimizer" if self.zero else "ddp"
        words = ["fsdp"]
        words += [f"replicas {self.replicas}"] if self.replicas > 1 else []
        words += [f"tensor {self.tensor}"] if self.tensor > 1 else []
        return ", ".join(words)

    def check(self, of: Sizes) -> None:
        """Raise ValueError unless the numbers divide each other and the model's heads."""
        if min(self[:3]) < 1 or self.gpus % (self.shards * self.tensor):
            raise ValueError(
                "Plan: gpus must be a multiple of shards * tensor, got"
                f" {self.gpus}, {self.shards} and {self.tensor}"
            )
        if self.zero and (self.shards > 1 or self.tensor > 1):
            raise ValueError("Plan: zero must be without shards and tensor")
        check_tensor("Plan", self.tensor, of)


def check_tensor(verb: str, tensor: int, of: Sizes) -> None:
    """Raise ValueError unless `tensor` divides all heads."""
    if any(heads % tensor for heads in (of.heads, of.kv_heads, of.mixin_heads)):
        raise ValueError(
            f"{verb}: tensor must divide {of.heads} heads, {of.kv_heads} key-value heads and"
            f" {of.mixin_heads} mixin heads, got {tensor}"
        )


class Message(NamedTuple):
    """A collective of `ranks` ranks, each `stride` after the other; `nbytes` of the whole tensor.

    The whole is what a rank has after a gather, and before a reduction.
    """

    kind: str  # "all_reduce", "all_gather", "reduce_scatter" or "broadcast"
    nbytes: float
    ranks: int
    stride: int = 1

    @property
    def wire(self) -> float:
        """Bytes that a rank sends in a ring: 2 (n - 1) / n of an all-reduce, else (n - 1) / n.

        Of a broadcast the last rank sends nothing: the mean of all ranks.
        """
        passes = 2 if self.kind == "all_reduce" else 1
        return passes * (self.ranks - 1) / self.ranks * self.nbytes

    def seconds(self, links: Links) -> float:
        """Bytes on the wire / bandwidth + latencies, of the fastest of `PROTOCOLS`.

        Between nodes the members of a node use one adapter each. A ring of n ranks on k nodes has
        n - 1 hops, k - 1 of them between nodes, twice for an all-reduce. A tree, which only
        all-reduces have, has 2 (n / k - 1) hops within nodes and 2 log2 k between them. Of a
        broadcast one hop counts, because the next broadcast follows it around the ring.
        """
        if self.ranks == 1:
            return 0.0
        together = min(self.ranks, max(1, links.per_node // self.stride))
        nodes = math.ceil(self.ranks / together)
        bandwidth = links.within if nodes == 1 else min(links.within, together * links.between)
        hops = [(self.ranks - nodes, nodes - 1)]
        if self.kind == "broadcast":
            hops = [(1, 0) if nodes == 1 else (0, 1)]
        elif self.kind == "all_reduce":
            hops = [(2 * (self.ranks - nodes), 2 * (nodes - 1))]
            hops.append((2 * (together - 1), 2 * math.ceil(math.log2(nodes))))
        return min(
            self.wire / bandwidth / share + 1e-6 * (base + near * inner + far * outer)
            for share, base, inner, outer in PROTOCOLS
            for near, far in hops
        )
