"""The machine code of a compiled kernel for NVIDIA: its instructions, what they do, its loops.

Disassembled by `nvdisasm` of Triton's wheel. Loops are found in the graph of branches, not by
addresses: code that rarely runs is placed after the end of a kernel and jumps back.
"""

import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import triton

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?\w+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*(.*?)\s*;")
_PLACE = re.compile(r'//## File "([^"]+)", line (\d+)')
_NAME = re.compile(r"^([.$\w]+):")
_TARGET = re.compile(r"\.L_\w+")
_JUMPS, _INDIRECT, _ENDS = ("BRA", "JMP"), ("BRX", "BRXU", "JMX"), ("EXIT", "RET", "KILL")

KINDS = (
    "tensor",
    "shared",
    "copy",
    "global",
    "special",
    "convert",
    "wait",
    "float",
    "local",
    "other",
)
_KINDS = {
    "tensor": r"[HQIB]GMMA|[HIDQB]MMA",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS|SHFL",
    "copy": r"LDGSTS|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED",
    "global": r"LDG|STG|LD|ST|ATOMG?|REDG?",
    "special": r"MUFU",
    "convert": r"F2F|F2FP|F2I|F2IP|I2F|I2FP|I2I|I2IP|FRND",
    "wait": r"BAR|SYNCS|WARPGROUP|WARPSYNC|DEPBAR|LDGDEPBAR|ARRIVES|MEMBAR|FENCE|ERRBAR"
    r"|CGAERRBAR|UTMACMDFLUSH|UTMACCTL|NANOSLEEP|YIELD",
    "float": r"F(ADD|MUL|FMA|MNMX3?|SEL|SETP?|CHK|SWZADD|RND)"
    r"|H(ADD2|MUL2|FMA2|MNMX2|SETP?2|ADD2_32I)(_\w+)?|D(ADD|MUL|FMA|MNMX|SETP)",
    "local": r"LDL|STL",
}
_KIND = {kind: re.compile(rf"(?:{stems})") for kind, stems in _KINDS.items()}
_GROUP = re.compile(r"(\d+)x(\d+)x(\d+)")
_SINGLE = re.compile(r"(\d{1,2})(8)(\d{1,2})")
_BITS = {"E4M3": 8, "E5M2": 8, "S8": 8, "U8": 8, "F16": 16, "BF16": 16, "TF32": 32}


class Instruction(NamedTuple):
    place: int  # index in the kernel
    guard: str  # its predicate, as "@!P0"; "" without one
    name: str  # with modifiers, as "LDG.E.128"
    operands: str
    file: str  # its source file
    row: int

    @property
    def stem(self) -> str:
        return self.name.split(".")[0]


class Block(NamedTuple):
    """A basic block: instructions that run in order, and the blocks that may follow."""

    code: list[Instruction]
    following: list[int]


class Loop(NamedTuple):
    """The instructions of a pass, and those of the loop in branches that the pass does not take."""

    code: tuple[Instruction, ...]
    aside: tuple[Instruction, ...]
    blocks: frozenset[int]


def kind_of(instruction: Instruction) -> str:
    """One of KINDS; "other" if it never runs, as loads that ptxas puts before copies."""
    stem = instruction.stem if instruction.guard != "@!PT" else ""
    return next((kind for kind, form in _KIND.items() if form.fullmatch(stem)), "other")


class Product(NamedTuple):
    """A tensor-core instruction, per warp: of a warp group's, each warp does a quarter."""

    flops: int
    bits: int  # of an element
    grouped: bool  # by a warp group
    shared: int  # bytes of operands that it reads from shared memory


def product_of(instruction: Instruction) -> Product | None:
    """What a tensor-core instruction computes; None for others. ValueError: an unknown shape."""
    if kind_of(instruction) != "tensor":
        return None
    stem, shape, *rest = instruction.name.split(".")
    bits = 64 if stem == "DMMA" else max((_BITS[x] for x in rest if x in _BITS), default=16)
    if found := _GROUP.fullmatch(shape):
        m, n, k = map(int, found.groups())
        rows = n + (0 if _in_registers(instruction) else m)
        return Product(2 * m * n * k // 4, bits, True, rows * k * bits // 8 // 4)
    if found := _SINGLE.fullmatch(shape):
        m, n, k = map(int, found.groups())
        return Product(2 * m * n * k, bits, False, 0)
    raise ValueError(f"a tensor-core instruction of unknown shape: {instruction.name}")


def _in_registers(instruction: Instruction) -> bool:
    """Whether a warp group's first operand is in registers; otherwise one `gdesc` names both."""
    return not instruction.operands.split(",")[1].strip().startswith("gdesc")


def width_of(instruction: Instruction) -> int:
    """Bits that a thread loads, stores or copies."""
    stem, *rest = instruction.name.split(".")
    if stem in ("LDSM", "STSM"):
        return 32 * int(rest[-1]) if rest[-1] in ("2", "4") else 32
    named = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return next((named[name] for name in rest if name in named), 32)


def label_of(instruction: Instruction) -> str:
    """The table's name of an instruction whose shape, width or function counts; "" for others."""
    kind, (stem, *rest) = kind_of(instruction), instruction.name.split(".")
    if kind == "tensor":
        held = (
            ", A in registers" if _GROUP.fullmatch(rest[0]) and _in_registers(instruction) else ""
        )
        return f"{stem}.{rest[0]}{held}"
    if kind in ("shared", "copy", "global") and not stem.startswith(("UTMA", "UBLK", "SHFL")):
        return f"{stem}.{width_of(instruction)}"
    named = kind in ("shared", "copy", "special", "convert", "wait", "local")
    return ".".join((stem, *rest[: kind in ("special", "wait")])) if named else ""


# --- loops ---

Weight = Callable[[Instruction], tuple[int, ...]]


def disassemble(kernel: Any) -> str:
    """The output of `nvdisasm` for a kernel. FileNotFoundError: Triton's wheel has no nvdisasm."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/nvdisasm")
    if not os.path.exists(tool):
        raise FileNotFoundError(f"triton {triton.__version__} has no nvdisasm: no {tool}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, "-c", "-g", file.name], capture_output=True, text=True, check=True
        ).stdout


@functools.lru_cache(maxsize=8)
def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of the kernel in a disassembly, and the places of its labels."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    file, row = "", 0
    for line in text.splitlines():
        if label := _NAME.match(line):
            labels[label[1]] = len(code)
        elif place := _PLACE.search(line):
            file, row = place[1], int(place[2])
        elif found := _LINE.search(line):
            guard, name, operands = found.groups("")
            code.append(Instruction(len(code), guard, name, operands, file, row))
    return code, labels


def _leave(code: list[Instruction], labels: dict[str, int], place: int) -> list[int] | None:
    """The places that may follow an instruction; None if only the next one may."""
    _, guard, name, operands, *_ = code[place]
    stem, beyond = name.split(".")[0], [place + 1] if place + 1 < len(code) else []
    targets = [labels[target] for target in _TARGET.findall(operands)]
    if stem in _ENDS:
        return beyond if guard else []
    if stem in _JUMPS:
        condition = operands.split("`")[0].strip()  # as P3 of `BRA P3, (.L_x_1)`
        return targets + (beyond if guard or condition else [])
    if stem in _INDIRECT:
        return targets + (beyond if guard else [])
    if stem == "BSYNC":  # goes to the target of the last BSSY of its register
        for before in reversed(code[:place]):
            if before.stem == "BSSY" and before.operands.split(",")[0] == operands:
                return [labels[target] for target in _TARGET.findall(before.operands)]
    return None


def find_blocks(code: list[Instruction], labels: dict[str, int]) -> list[Block]:
    """The basic blocks of a kernel, the first one first."""
    leaving = {i.place: _leave(code, labels, i.place) for i in code}
    starts = {0, *labels.values()} - {len(code)}
    for place, places in leaving.items():
        if places is not None:
            starts |= {*places, place + 1}
    ordered = sorted(start for start in starts if start < len(code))
    numbers = {start: number for number, start in enumerate(ordered)}
    blocks = []
    for start, end in zip(ordered, [*ordered[1:], len(code)], strict=True):
        places = leaving[end - 1]
        places = ([end] if end < len(code) else []) if places is None else places
        blocks.append(Block(code[start:end], sorted({numbers[p] for p in places if p in numbers})))
    return blocks


def order_blocks(blocks: list[Block]) -> dict[int, int]:
    """The reachable blocks with their rank in topological order, back edges aside."""
    done: list[int] = []
    seen, stack = {0}, [(0, iter(blocks[0].following))]
    while stack:
        block, rest = stack[-1]
        following = next((f for f in rest if f not in seen), None)
        if following is None:
            done.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(blocks[following].following)))
    return {block: rank for rank, block in enumerate(reversed(done))}


def find_loops(blocks: list[Block], weight: Weight) -> list[Loop]:
    """Every loop, inner ones first. A pass takes the path of the largest weight."""
    rank = order_blocks(blocks)
    leading: dict[int, list[int]] = {block: [] for block in rank}
    for block in rank:
        for following in blocks[block].following:
            leading[following].append(block)
    bodies: dict[int, set[int]] = {}
    for head in rank:
        stack = [block for block in leading[head] if rank[block] >= rank[head]]
        if stack:
            body = bodies.setdefault(head, {head})
            while stack:
                block = stack.pop()
                if block not in body and rank[block] > rank[head]:
                    body.add(block)
                    stack += leading[block]
    found = []
    for head, body in sorted(bodies.items(), key=lambda item: len(item[1])):
        latches = {block for block in body if head in blocks[block].following}
        found.append(_take(blocks, rank, head, body, latches, weight))
    return found


def whole(blocks: list[Block], weight: Weight) -> Loop:
    """A kernel from its first instruction to its last; its loops pass once."""
    rank = order_blocks(blocks)
    ends = {block for block in rank if not blocks[block].following}
    ends = ends or set(rank)
    return _take(blocks, rank, 0, set(rank), ends, weight)


def _take(
    blocks: list[Block],
    rank: dict[int, int],
    head: int,
    body: set[int],
    ends: set[int],
    weight: Weight,
) -> Loop:
    """The path of the largest weight from `head` to one of `ends`, and the rest of `body`."""
    own = {}
    for block in body:
        weights = [weight(instruction) for instruction in blocks[block].code]
        own[block] = tuple(map(sum, zip(*weights, strict=True)))
    best: dict[int, tuple[tuple[int, ...], int | None]] = {head: (own[head], None)}
    for block in sorted(body, key=rank.__getitem__):
        for following in blocks[block].following:
            if block in best and following in body and rank[following] > rank[block]:
                sums = tuple(map(sum, zip(best[block][0], own[following], strict=True)))
                if following not in best or sums > best[following][0]:
                    best[following] = sums, block
    step: int | None = max((end for end in ends if end in best), key=lambda end: best[end][0])
    path = []
    while step is not None:
        path.append(step)
        step = best[step][1]
    code = tuple(i for block in reversed(path) for i in blocks[block].code)
    aside = tuple(i for block in sorted(body - set(path)) for i in blocks[block].code)
    return Loop(code, aside, frozenset(body))
