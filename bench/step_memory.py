"""Formulas for the memory of a training step of a mixin block: what it keeps, and its peak.

A block is the layer with the projection of its media. Inputs and weights do not count; gradients
do. `bench.saved` measures the same.
"""

from typing import NamedTuple

from bench.cases import HEAD_DIM, MixinSize
from bench.readings import Reading
from comemo_kernels.reference.fused_linear_gradient import FEW, PARTS


class Sizes(NamedTuple):
    """Sizes of a block and of a packed row."""

    tokens: int
    readers: int  # tokens whose sample has pictures
    memory: int  # image tokens
    width: int
    inner: int  # heads * head_dim
    wide: int  # inner width of the feed-forward network
    heads: int
    itemsize: int  # bytes of an element of activations, weights and gradients
    cpu: bool = False
    samples: int = 1

    @classmethod
    def of(cls, reading: Reading, size: MixinSize, itemsize: int, cpu: bool) -> "Sizes":
        """Sizes of a case."""
        return cls(
            tokens=reading.queries,
            readers=sum(count for count, grids in reading.samples if grids),
            memory=sum(reading.sizes),
            width=size.width,
            inner=size.heads * HEAD_DIM,
            wide=size.wide,
            heads=size.heads,
            itemsize=itemsize,
            cpu=cpu,
            samples=len(reading.samples),
        )

    @property
    def exact(self) -> int:
        """Bytes of a number in the precision of norms, rotations and log-sum-exps."""
        return max(4, self.itemsize)


class Kept(NamedTuple):
    """Rows that are kept or allocated for each token; of the memory for each image token.

    Rows of float32 are of float64 where the activations are.
    """

    narrow: int = 0  # rows of the layer's width
    inner: int = 0  # rows of all heads
    wide: int = 0  # rows of the feed-forward network
    exact: int = 0  # rows of the layer's width in float32
    copies: int = 0  # the same, which float32 activations do not need
    inner_exact: int = 0  # rows of all heads in float32
    inner_copies: int = 0  # the same, which float32 activations do not need
    scalars: int = 0  # float32
    per_head: int = 0  # float32 of each head
    angles: int = 0  # rows of a head's size

    def nbytes(self, rows: int, of: Sizes) -> int:
        """Bytes of so many tokens."""
        head_dim = of.inner // of.heads
        exact = self.exact + (self.copies if of.itemsize < of.exact else 0)
        rounded = self.narrow * of.width + self.inner * of.inner + self.wide * of.wide
        rounded += self.angles * head_dim
        inner = self.inner_exact + (self.inner_copies if of.itemsize < of.exact else 0)
        precise = exact * of.width + inner * of.inner + self.scalars
        precise += self.per_head * of.heads
        return rows * (rounded * of.itemsize + precise * of.exact)


class Way(NamedTuple):
    """What a way keeps, and what it allocates beside that in the three places of a peak."""

    attention: Kept  # of each token, until the attention's backward
    queries: Kept  # the same, unless no sample has pictures
    readers: Kept  # the same, of tokens whose sample has pictures
    network: Kept  # of each token, until the backward of the feed-forward network is done
    memory: Kept  # of each image token
    numbers: int = 0  # such as tanh of a gate
    joined: bool = False  # on a CPU, outputs of samples that are attended one by one
    # Backward of the feed-forward network, for each token, and for each of the tokens that it takes
    # at a time; and gradients of wide weights.
    network_work: Kept = Kept()
    part_work: Kept = Kept()
    wide_gradients: int = 1
    # Backward of the attention, for each token and image token; and gradients of five weights.
    attention_work: Kept = Kept()
    memory_work: Kept = Kept()
    # Forward of keys and values, for each image token.
    build_work: Kept = Kept()


def kept_bytes(way: Way, of: Sizes) -> int:
    """Bytes that a forward keeps for the backward, beside inputs and weights."""
    whole = way.network.nbytes(of.tokens, of) + _read_bytes(way, of)
    if way.joined and of.cpu and (of.samples > 1 or not of.memory):
        whole += of.tokens * of.inner * of.itemsize
    return whole + way.numbers * of.itemsize


def _read_bytes(way: Way, of: Sizes) -> int:
    read = way.attention.nbytes(of.tokens, of) + way.readers.nbytes(of.readers, of)
    read += way.queries.nbytes(of.tokens if of.memory else 0, of)
    return read + way.memory.nbytes(of.memory, of)


def peak_bytes(way: Way, of: Sizes, learning: bool = True) -> int:
    """Most bytes of a forward and backward beside inputs and weights.

    Args:
        way: what it keeps and allocates.
        of: sizes of the case.
        learning: count the gradients of the weights, too; without them it is activations alone.
    """
    gradient = of.wide * of.width * of.itemsize if learning else 0
    network = kept_bytes(way, of) + way.network_work.nbytes(of.tokens, of)
    part = min(of.tokens, max(FEW, -(-of.tokens // PARTS)))
    network += way.part_work.nbytes(part, of) + way.wide_gradients * gradient
    attention = _read_bytes(way, of) + way.attention_work.nbytes(of.tokens, of)
    attention += way.memory_work.nbytes(of.memory, of)
    attention += 3 * gradient + (of.inner * of.width * of.itemsize if learning else 0)
    build = way.memory.nbytes(of.memory, of) + way.build_work.nbytes(of.memory, of)
    return max(network, attention, build)


# Every intermediate. A norm keeps its input in float32, the factor of a row, rows without and with
# the weight; a rotation the angles; the attention q, k, the projected keys with v, out; a gate what
# it is multiplied with; the network both projections, the activation and the product.
PUBLISHED = Way(
    attention=Kept(narrow=2, copies=1, scalars=1, angles=2),
    queries=Kept(inner=1),
    readers=Kept(inner=1, per_head=1),
    network=Kept(narrow=4, exact=1, scalars=1, wide=4),
    memory=Kept(narrow=2, copies=1, scalars=1, angles=2, inner=3),
    numbers=2,
    joined=True,
    network_work=Kept(wide=2),
    attention_work=Kept(narrow=2, inner=2),
    memory_work=Kept(inner=2),
    build_work=Kept(inner=-1, inner_exact=4, inner_copies=1),
)
# `attend_gated` keeps q, out and the log-sum-exp, `gated_swiglu` its input and both projections,
# `project_memory` keys and values; norms and the activation are computed again. The network's
# backward takes some of the rows at a time, and holds for them the gradients of both projections,
# the product and its gradient.
CHEAP = Way(
    attention=Kept(inner=2, per_head=1),
    queries=Kept(),
    readers=Kept(),
    network=Kept(narrow=1, wide=2),
    memory=Kept(inner=2),
    network_work=Kept(narrow=2),
    part_work=Kept(narrow=2, wide=4),
    wide_gradients=3,
    attention_work=Kept(narrow=2, inner=3),
    memory_work=Kept(inner=3),
    build_work=Kept(inner=2),
)
# With `recompute="projections"` both projections are computed again.
PROJECTIONS = CHEAP._replace(network=Kept(narrow=1), part_work=CHEAP.part_work._replace(wide=6))


def ways(cpu: bool) -> dict[str, Way]:
    """The formulas by the names of `bench train`."""
    found = {"ours": CHEAP, "ours projections": PROJECTIONS, "published": PUBLISHED}
    if cpu:
        # PyTorch's operations need another product of the gradient, and the reference of the
        # attention computes the log-sum-exp again.
        for name in ("ours", "ours projections"):
            way = found[name]
            work = way.part_work._replace(wide=way.part_work.wide + 1)
            found[name] = way._replace(attention=Kept(inner=2), part_work=work)
    return found
