"""What a kernel's main loop asks of a Hopper multiprocessor, counted in its machine code.

A pass of the loop is counted by kinds of instructions and compared with what a multiprocessor does
in a cycle: the resource that takes the most cycles binds. This is a bound like a roofline, not a
forecast: it knows no latencies, bank conflicts or waits. Use it to argue about a change before it
is measured.

Assumptions: predicated instructions run. Each thread reads its own global memory, except for small
tensors, and its own shared memory, except for FFMA, whose operands a warp shares. A branch is
skipped unless it holds tensor-core instructions or asynchronous copies. A loop that the compiler
unrolled is one pass.
"""

import functools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from comemo_kernels import aot_sass
from comemo_kernels.aot_sass import (
    KINDS,
    Instruction,
    Product,
    kind_of,
    label_of,
    product_of,
    width_of,
)
from comemo_kernels.aot_traffic import Traffic

# Of H100 SXM and H200, which have the same multiprocessor. Cycles are at 1.755 GHz, the clock of
# GEMMs under load; the datasheets' 989 TFLOP/s are at 1.83.
CLOCK = 1.755e9
PROCESSORS = 132
SCHEDULERS = 4  # warp instructions a cycle (Hopper tuning guide)
# Dense FLOP a cycle by warp groups, from the datasheets; 949 TFLOP/s in all, of which GEMMs of
# random data reach 790. Single warps (mma.sync) reach 62 % of it: measured, arXiv:2402.13499.
TENSOR = {8: 8192, 16: 4096, 32: 2048}  # by bits of an element
TENSOR_64 = 256  # float64, by single warps
SINGLE_WARP = 0.62
SHARED = 128  # bytes a cycle; a shuffle takes a cycle too (CUDA guide: 32 results)
# Results a cycle (CUDA guide, arithmetic throughput). Conversions to and from integers run there
# (Nsight Compute's guide, pipeline XU). So do, as an assumption, those of one float to another,
# except for instructions on pairs such as F2FP.
SPECIAL = 16
_SPECIAL = re.compile(r"MUFU|F2F|F2I|I2F|FRND")
PORT = 64  # bytes a cycle from L2 to a multiprocessor; assumed to be A100's
# Bytes a second from L2, measured with reads that share nothing (chipsandcheese.com, H100 PCIe).
# Blocks that read the same lines at about the same time get more: printed, not part of the bound.
L2 = 5.5e12
MEMORY = {"H100": 3.0e12, "H200": 4.3e12}  # bytes a second, measured copies


@dataclass(frozen=True)
class Loop:
    """What one pass needs; a kernel without a loop is one pass."""

    part: str  # "loop", "loop 1 of 2" or "whole"
    warps: int  # of a block that run it
    instructions: int  # of each of these warps
    behind: int  # more of them, in branches that the pass does not take
    kinds: dict[str, int]  # instructions by KINDS
    names: dict[str, int]  # by `label_of`
    flops: int  # of all warps: of tensor cores, or of FFMA if these are a third of the loop
    tensor_cycles: float  # of a multiprocessor, for all warps
    special: int  # instructions of each warp for the special function units
    shared_bytes: int  # read and written by all warps, tensor cores and copies; a shuffle is 128
    global_bytes: int  # that all warps load and store
    memory_bytes: int  # of these, those not from L2
    grouped: bool  # tensor-core instructions are of warp groups

    def per(self, flops: float) -> float:
        """Instructions of a warp for so many FLOP of its block."""
        return self.instructions * flops / self.flops


def count_loops(
    kernel: Any, small: frozenset[str] = frozenset(), cached: frozenset[str] = frozenset()
) -> list[Loop]:
    """The main loop of a compiled kernel for sm_90.

    The main loop is the innermost one with tensor-core instructions; without any, the one that
    moves most bytes of memory; without that, the whole kernel is counted. Several loops with
    tensor-core instructions, as of masked keys and others, all count. Bytes of the pointers in
    `small` do not count unless there are no others; those in `cached` come from L2, because all
    blocks read them.
    """
    code, labels = aot_sass.parse(aot_sass.disassemble(kernel))
    blocks = aot_sass.find_blocks(code, labels)
    traffic = Traffic(kernel, code, small)
    count = functools.partial(_count, traffic, cached)
    heavy = any(kind_of(i) == "tensor" for i in code)

    def weigh(i: Instruction) -> tuple[int, ...]:
        product, asynchronous = product_of(i), kind_of(i) == "copy"
        moved = traffic.bytes_of(i) if asynchronous or not heavy else 0
        return (product.flops if product else 0, moved, -1)

    everything = aot_sass.whole(blocks, weigh)
    loops, warps = aot_sass.find_loops(blocks, weigh), kernel.metadata.num_warps
    products = _innermost([x for x in loops if any(map(product_of, x.code))])
    if products:
        names = [f"loop {n + 1} of {len(products)}" for n in range(len(products))]
        names = names if len(products) > 1 else ["loop"]
        return [count(name, x, warps) for name, x in zip(names, products, strict=True)]
    moving = [x for x in loops if any(map(traffic.bytes_of, x.code))]
    counted = [count("loop", x, warps) for x in _innermost(moving)]
    main = max(counted, key=lambda x: (x.memory_bytes, x.global_bytes), default=None)
    return [main or count("whole", everything, warps)]


def _innermost(loops: list[aot_sass.Loop]) -> list[aot_sass.Loop]:
    return [x for x in loops if not any(y.blocks < x.blocks for y in loops)]


def _shared_bytes(i: Instruction, fused: bool) -> int:
    """Bytes of shared memory of a warp; less than 32 bits a thread take a cycle too."""
    if product := product_of(i):
        return product.shared
    if fused and i.stem == "LDS":
        return SHARED
    by_thread = kind_of(i) == "shared" or (kind_of(i) == "copy" and i.stem == "LDGSTS")
    return 4 * max(32, width_of(i)) if by_thread else 0


def _tensor_cycles(product: Product) -> float:
    """Cycles of a multiprocessor's four tensor cores, for one warp."""
    rate = TENSOR.get(product.bits, TENSOR_64 / SINGLE_WARP)
    return product.flops / (rate if product.grouped else rate * SINGLE_WARP)


def _count(
    traffic: Traffic, cached: frozenset[str], part: str, loop: aot_sass.Loop, warps: int
) -> Loop:
    def by_memory(i: Instruction) -> int:
        """Bytes of a warp that come from device memory."""
        return 0 if traffic.lies_in(i, cached) else traffic.bytes_of(i)

    products = [product for product in map(product_of, loop.code) if product]
    flops = warps * sum(product.flops for product in products)
    fused = sum(i.stem == "FFMA" for i in loop.code)
    by_fused = not products and 3 * fused >= len(loop.code)
    by_warp = sum(_shared_bytes(i, by_fused) for i in loop.code)
    box = sum(map(traffic.box_of, loop.code))
    kinds = Counter(map(kind_of, loop.code))
    return Loop(
        part=part,
        warps=warps,
        instructions=len(loop.code),
        behind=len(loop.aside),
        kinds={kind: kinds[kind] for kind in KINDS},
        names=dict(Counter(filter(None, map(label_of, loop.code)))),
        flops=flops or warps * 64 * fused * by_fused,
        tensor_cycles=warps * sum(map(_tensor_cycles, products)),
        special=sum(_SPECIAL.fullmatch(i.stem) is not None for i in loop.code),
        shared_bytes=warps * by_warp + box,
        global_bytes=warps * sum(traffic.bytes_of(i) - traffic.box_of(i) for i in loop.code) + box,
        memory_bytes=warps * sum(by_memory(i) - traffic.box_of(i) for i in loop.code) + box,
        grouped=any(product.grouped for product in products),
    )


@dataclass(frozen=True)
class Bounds:
    """The least cycles of a pass of all resident blocks of a multiprocessor, and what binds."""

    cycles: dict[str, float]  # by resource; "L2", or a card's memory
    limit: str  # the peak of such a loop: "tensor", "float" or "memory"
    binding: dict[str, str]  # by card: the resource that takes the most cycles
    following: dict[str, str]  # the resource that takes the second most, in percent of these
    share: dict[str, float]  # of the limit
    tflops: dict[str, float]  # 10^12 FLOP a second, of all multiprocessors
    apart: float  # share of the limit if tensor cores are idle while others are issued
    through_l2: float  # share of the limit if L2 gives L2 bytes a second


def find_bounds(loops: list[Loop], blocks: int) -> Bounds:
    """Bounds of loops that pass together, in `blocks` resident blocks.

    The limit of loops with tensor-core instructions of warp groups is the tensor cores, and FFMA
    that of loops of FFMA that L2 can feed; their global memory counts by a multiprocessor's port to
    L2, because blocks of a GEMM read the same lines. The limit of all others is device memory. A
    block that does not fit is counted as if it did.
    """

    def add(count: Callable[[Loop], float]) -> float:
        return max(1, blocks) * sum(map(count, loops))

    moved, flops = add(lambda x: x.global_bytes), add(lambda x: x.flops)
    second = PROCESSORS * CLOCK  # cycles of all multiprocessors
    cycles = {
        "issue": add(lambda x: x.warps * x.instructions) / SCHEDULERS,
        "tensor": add(lambda x: x.tensor_cycles),
        "shared": add(lambda x: x.shared_bytes) / SHARED,
        "special": add(lambda x: x.warps * x.special) * 32 / SPECIAL,
        "port": moved / PORT,
        "float": 0 if add(lambda x: x.tensor_cycles) else flops / (2 * 32 * SCHEDULERS),
    }
    cycles_l2 = moved / (L2 / second)
    limit = "float" if cycles["float"] > cycles_l2 else "memory"
    limit = "tensor" if any(x.grouped for x in loops) else limit
    held_by = add(lambda x: x.memory_bytes)
    from_memory = {card: held_by / (rate / second) for card, rate in MEMORY.items()}
    binding, following, share, tflops = {}, {}, {}, {}
    for card, slow in from_memory.items():
        taken = cycles | ({"memory": slow} if limit == "memory" else {})
        first, next_one = sorted(taken, key=taken.__getitem__, reverse=True)[:2]
        binding[card], most = first, taken[first]
        following[card] = f"{next_one} {taken[next_one] / most:.0%}"
        share[card], tflops[card] = taken[limit] / most, flops / most * second / 1e12
    held, inside = cycles.get(limit, 0.0), max(cycles.values())
    cycles |= {"L2": cycles_l2, **from_memory}
    return Bounds(
        cycles,
        limit,
        binding,
        following,
        share,
        tflops,
        apart=held / (held + max(cycles["issue"], cycles["special"])),
        through_l2=held / max(cycles["L2"], inside),
    )


class Counted(NamedTuple):
    """A case as it was compiled."""

    kernel: str
    case: str
    config: str
    registers: int  # of a thread
    shared: int  # bytes of a block
    blocks: int  # that fit a multiprocessor
    loops: list[Loop]


_OF_CARD = ("cycles", "binding", "next", "share", "tflops")
COLUMNS = tuple(
    f"""
    kernel case config part warps registers shared blocks instructions behind
    {" ".join(f"n_{kind}" for kind in KINDS)} flops
    global_bytes memory_bytes shared_bytes names limit
    cycles_issue cycles_tensor cycles_shared cycles_special cycles_port cycles_L2
    {" ".join(f"{name}_{card}" for card in MEMORY for name in _OF_CARD)}
    apart through_l2
    """.split()
)


def table_rows(found: Counted) -> list[dict[str, Any]]:
    """Rows by COLUMNS, one for each loop."""
    rows = []
    head: dict[str, Any] = dict(zip(COLUMNS[:3], found[:3], strict=True))
    head |= {"registers": found.registers, "shared": found.shared, "blocks": found.blocks}
    for loop in found.loops:
        row = head | {name: getattr(loop, name) for name in COLUMNS if hasattr(loop, name)}
        row |= {f"n_{kind}": count for kind, count in loop.kinds.items()}
        row["names"] = "; ".join(f"{count} {name}" for name, count in loop.names.items())
        rows.append(row | _bound_columns([loop], found.blocks))
    return rows


def _bound_columns(loops: list[Loop], blocks: int) -> dict[str, Any]:
    bounds = find_bounds(loops, blocks)
    row: dict[str, Any] = {f"cycles_{name}": round(n) for name, n in bounds.cycles.items()}
    for card in MEMORY:
        row[f"binding_{card}"] = bounds.binding[card]
        row[f"next_{card}"] = bounds.following[card]
        row[f"share_{card}"] = round(bounds.share[card], 3)
        row[f"tflops_{card}"] = round(bounds.tflops[card], 1)
    row |= {"apart": round(bounds.apart, 3), "through_l2": round(bounds.through_l2, 3)}
    if bounds.limit == "memory":  # these do not apply to it
        row["apart"] = row["through_l2"] = ""
    return {name: row[name] for name in COLUMNS if name in row} | {"limit": bounds.limit}


def describe(row: dict[str, Any]) -> str:
    """A row of the table, as lines of text."""
    lines = [" | ".join(row[name] for name in ("kernel", "case", "config", "part"))]
    if "warps" in row:
        lines.append(
            f"{row['instructions']} instructions, {row['behind']} more in branches, of"
            f" {row['warps']} warps; {row['registers']} registers, {row['shared']} bytes of shared"
            f" memory, {row['blocks']} blocks; {row['global_bytes']} bytes of global memory"
            f" ({row['memory_bytes']} not from L2)"
        )
        lines.append(", ".join(f"{kind} {row[f'n_{kind}']}" for kind in KINDS if row[f"n_{kind}"]))
        lines.append(row["names"])
    if "limit" in row:
        names = [name for name in COLUMNS if name.startswith("cycles_")]
        lines.append("cycles: " + ", ".join(f"{n.split('_')[1]} {row[n]}" for n in names))
        for card in MEMORY:
            text = f"{card}: {row[f'binding_{card}']} binds,"
            text += f" {row[f'share_{card}']:.0%} of {row['limit']}, next {row[f'next_{card}']}"
            text += f", {row[f'tflops_{card}']} TFLOP/s" if row[f"tflops_{card}"] else ""
            lines.append(text)
        if row["through_l2"] != "":
            lines[-1] += f"; {row['apart']:.0%} without overlap, {row['through_l2']:.0%} through L2"
    return "\n    ".join(lines)
