"""Messages of a training step, and its time, by formula, for each plan of `bench.scaling`.

What is assumed to overlap:

- Gradients that are all-reduced (ddp) overlap with the backward pass, all but the last bucket.
- Weights of a unit are gathered (fsdp) while the unit before it is computed, and its gradients
  reduced while the next one is differentiated. Both share the link. Replicas exchange gradients
  with those of the last pack.
- All-reduces of tensor parallelism, and the broadcasts of ZeRO-1, overlap with nothing.

Not in the formulas: ranks that wait for the slowest, reading data, checkpoints, other traffic.
"""

import itertools
import math
from typing import NamedTuple

from bench.scaling_plans import Links, Message, Plan
from bench.scaling_sizes import TRAINED, Flops, Pack, Sizes, Unit, flops

BUCKET = 25 * 2**20  # bytes of DDP's buckets of gradients
# Of an update, per trained weight: the norm reads 4 bytes, clipping 4 + 4, AdamW 16 + 12.
UPDATE_BYTES = 40
DIVIDED = ("decoder", "mixin")  # parts that tensor parallelism divides


class Call(NamedTuple):
    """A unit, and what belongs to it in each pass."""

    unit: Unit
    gathers: tuple[Message, ...] = ()
    backward: bool = True  # whether a backward pass goes through it
    again: bool = True  # whether it is gathered in the backward pass, too
    reduces: tuple[Message, ...] = ()


def make_calls(
    plan: Plan, units: list[Unit], stage: str, itemsize: int = 2, last_pack: bool = True
) -> list[Call]:
    """Calls of units in the order of a forward pass, with the messages of fsdp.

    A call gathers the unit's weights, once more in the backward pass, and reduces the gradients of
    its trained weights: each padded to a multiple of the ranks in its first dimension. The unit
    "rest" stays gathered. Of a frozen vision tower the last layer is gathered again, because FSDP
    gathers one unit ahead. With tensor parallelism a rank gathers its part of a decoder layer, and
    all of the other units.

    Args:
        plan: checked.
        units: of `make_units`.
        stage: "pretrain" or "finetune".
        itemsize: bytes of a gathered weight; gradients are reduced in float32.
        last_pack: of a step; only then replicas exchange gradients.
    """
    trained = TRAINED[stage]
    calls: list[Call] = []
    last = max(i for i, unit in enumerate(units) if unit.kind == "vision")
    for i, unit in enumerate(units):
        gathers, reduces = [], []
        ranks, stride = plan.ranks_of(unit)
        nbytes = unit.elements(ranks, plan.tensor)
        learnt = unit.elements(ranks, plan.tensor, trained)
        if ranks > 1:
            gathers.append(Message("all_gather", itemsize * nbytes, ranks, stride))
        if learnt and ranks > 1:
            reduces.append(Message("reduce_scatter", 4 * learnt, ranks, stride))
        if learnt and plan.replicas > 1 and last_pack:
            between = plan.shards * plan.tensor
            reduces.append(Message("all_reduce", 4 * learnt / ranks, plan.replicas, between))
        frozen = unit.kind == "vision" and "vision" not in trained
        calls.append(
            Call(
                unit,
                tuple(gathers),
                backward=not frozen,
                again=unit.kind != "rest" and (i == last or not frozen),
                reduces=tuple(reduces),
            )
        )
    return calls


def messages(
    plan: Plan,
    units: list[Unit],
    of: Sizes,
    pack: Pack,
    stage: str,
    itemsize: int = 2,
    last_pack: bool = True,
) -> list[Message]:
    """All messages of a step of one pack, without those of the gradients' norm.

    ddp: gradients in float32, in buckets. ZeRO-1: also a broadcast of each trained weight.
    fsdp: see `make_calls`. Tensor parallelism: see `tensor_messages`.

    Args:
        plan, units, of, pack, stage: as in `step`.
        itemsize: bytes of a gathered weight and of an element of activations.
        last_pack: of a step, see `make_calls`.
    """
    found = tensor_messages(plan, of, pack, stage, itemsize)
    if plan.shards * plan.tensor > 1:
        for call in make_calls(plan, units, stage, itemsize, last_pack):
            found += call.gathers * (1 + call.again)
            found += call.reduces if call.backward else ()
        return found
    if plan.gpus > 1:
        found += _gradients(plan, units, stage)
    return found


def _gradients(plan: Plan, units: list[Unit], stage: str) -> list[Message]:
    """Buckets of ddp, and ZeRO-1's broadcasts of the weights."""
    sizes = [w.size for unit in units for w in unit.weights if w.part in TRAINED[stage]]
    nbytes = 4 * sum(sizes)
    count = max(1, math.ceil(nbytes / BUCKET))
    found = [Message("all_reduce", nbytes / count, plan.gpus)] * count
    if plan.zero:
        found += [Message("broadcast", 4 * size, plan.gpus) for size in sizes]
    return found


def tensor_messages(
    plan: Plan, of: Sizes, pack: Pack, stage: str, itemsize: int = 2
) -> list[Message]:
    """Messages of tensor parallelism, all-reduces but for one.

    Of [N, d], for each decoder and mixin layer: two in the forward pass, two when it is computed
    again, except the last of a decoder layer, and two in the backward pass. For each mixin layer
    one of the media's gradient [M, d]. Gradients of trained norms and gates. Without drop path the
    ranks divide the tiles, and gather the media.

    Args:
        plan, of, pack, stage: as in `step`.
        itemsize: bytes of an element of activations.
    """
    if plan.tensor == 1:
        return []
    trained = TRAINED[stage]
    media = pack.tiles * of.tile
    norms = 2 * (of.layers * ("decoder" in trained) + of.mixins * ("mixin" in trained))
    sizes = [itemsize * pack.tokens * of.width] * (5 * of.layers + 6 * of.mixins)
    sizes += [itemsize * media * of.width] * of.mixins + [itemsize * of.width] * norms
    sizes += [itemsize] * (2 * of.mixins * ("mixin" in trained))
    found = [Message("all_reduce", nbytes, plan.tensor) for nbytes in sizes]
    if pack.tiles and not pack.drop_path:
        rows = plan.tensor * pack.tiles_of(plan.tensor) * of.tile
        found.append(Message("all_gather", itemsize * rows * of.width, plan.tensor))
    return found


class Step(NamedTuple):
    """Seconds of a step: computing, of all packs, waiting for messages, updating weights."""

    compute: float
    exposed: float
    update: float
    wire: float  # bytes that a rank sends

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.update


def update_seconds(plan: Plan, units: list[Unit], stage: str, links: Links) -> float:
    """Bytes of a rank's trained weights, gradients and moments / bandwidth of its memory."""
    count = sum(unit.elements(parts=TRAINED[stage]) for unit in units)
    share = plan.gpus if plan.zero else plan.shards * plan.tensor
    return UPDATE_BYTES * count / share / links.memory


def step(
    plan: Plan,
    units: list[Unit],
    of: Sizes,
    pack: Pack,
    stage: str,
    alone: float,
    packs: int,
    links: Links,
) -> Step:
    """Time of a step by formula.

    Args:
        plan: of the ranks.
        units: of `make_units`.
        of, pack: sizes.
        stage: "pretrain" or "finetune".
        alone: seconds of a step of one pack on one GPU, measured, its update included.
        packs: that each group reads one after the other in a step.
        links: of the machine.

    Returns:
        A `Step`. The time of a pack is divided among the parts of the model as their FLOPs are;
        tensor parallelism divides that of decoder and mixin layers, and of tiles without drop path.

    Raises:
        ValueError: a plan that does not fit, or `alone` shorter than an update.
    """
    plan.check(of)
    one = alone - update_seconds(Plan(1), units, stage, links)
    if one <= 0 or packs < 1:
        raise ValueError(f"step: alone must exceed an update and packs 0, got {alone}, {packs}")
    work = flops(of, pack, stage)
    rate = sum(map(sum, work.values())) / one
    shares = dict.fromkeys(DIVIDED, 1 / plan.tensor)
    if pack.tiles:
        shares |= dict.fromkeys(("vision", "projector"), pack.tiles_of(plan.tensor) / pack.tiles)
    seconds = {
        part: Flops(*(shares.get(part, 1.0) * x / rate for x in both))
        for part, both in work.items()
    }
    compute = sum(map(sum, seconds.values()))
    sent = messages(plan, units, of, pack, stage)
    exposed = packs * sum(m.seconds(links) for m in tensor_messages(plan, of, pack, stage))
    if plan.shards * plan.tensor > 1:
        exposed += _pipeline(make_calls(plan, units, stage), seconds, of, links) - packs * compute
        before = make_calls(plan, units, stage, last_pack=False)
        exposed += (packs - 1) * _pipeline(before, seconds, of, links)
        earlier = messages(plan, units, of, pack, stage, last_pack=False)
        wire = sum(m.wire for m in sent) + (packs - 1) * sum(m.wire for m in earlier)
    else:
        wire = sum(m.wire for m in sent)  # once, after the last pack
        reduces = [m.seconds(links) for m in sent if m.kind == "all_reduce"]
        behind = sum(reduces) - sum(s.backward for s in seconds.values())
        exposed += max(behind, reduces[-1] if reduces else 0.0)
        exposed += sum(m.seconds(links) for m in sent if m.kind == "broadcast")
    update = update_seconds(plan, units, stage, links)
    return Step(packs * compute, exposed, update, wire)


def _pipeline(calls: list[Call], seconds: dict[str, Flops], of: Sizes, links: Links) -> float:
    """Seconds of a pack: in each pass a call is computed while the next one is gathered.

    forward: gather_1 + sum max(forward_i, gather_{i+1}); backward: gather_n +
    sum max(backward_i, gather_{i-1} + reduce_{i+1}) + reduce_1.
    """
    gathers = [sum(m.seconds(links) for m in call.gathers) for call in calls]
    forwards = [_seconds_of(call, seconds, of, 0) for call in calls]
    total = gathers[0]
    for work, after in itertools.zip_longest(forwards, gathers[1:], fillvalue=0.0):
        total += max(work, after)
    back = [call for call in reversed(calls) if call.backward]
    again = [sum(m.seconds(links) for m in call.gathers) * call.again for call in back]
    waiting = 0.0  # the gradients of the call before
    total += again[0]
    for call, after in zip(back, [*again[1:], 0.0], strict=True):
        total += max(_seconds_of(call, seconds, of, 1), after + waiting)
        waiting = sum(m.seconds(links) for m in call.reduces)
    return total + waiting


def _seconds_of(call: Call, seconds: dict[str, Flops], of: Sizes, turn: int) -> float:
    """Seconds of a call in the forward (0) or backward (1) pass."""
    counts = {"vision": of.vision_layers, "decoder": of.layers, "mixin": of.mixins}
    parts = {weight.part for weight in call.unit.weights}
    if call.unit.kind == "rest":
        parts -= set(counts)
    return sum(seconds[part][turn] / counts.get(part, 1) for part in parts)
