"""How many bytes of global memory the instructions of a kernel move."""

import math
import re
from pathlib import Path
from typing import Any

from comemo_kernels.aot_read import Place, place_accesses
from comemo_kernels.aot_sass import Instruction, kind_of, width_of

_VERBS = {"LDGSTS": "cp", "ST": "st", "STG": "st"}  # all others "ld"
_STORES = ("UTMASTG", "UTMAREDG")
# A barrier that expects bytes; with ART0 or A1T0 it expects none.
_EXPECT = re.compile(r"SYNCS\.ARRIVE\.TRANS64(?!\S*(?:ART0|A1T0))")


class Traffic:
    """Bytes of global memory that an instruction moves: of a warp, or of a block by descriptor.

    Those of pointers in `small` count as 0, unless there are no others.
    """

    def __init__(self, kernel: Any, code: list[Instruction], small: frozenset[str]) -> None:
        self.code, self.small = code, small
        self.pointers: dict[tuple[str, str, int], set[str]] = {}
        for access, place in place_accesses(kernel):
            self.pointers.setdefault(place, set()).add(access.tensor)
        copied = r"async_tma_(?:copy_local|reduce).*desc<(?:tensor<)?([\dx]+)x[a-z]+(\d+)"
        tiles = re.findall(copied, kernel.asm["ttgir"])
        stored = sum(math.prod(map(int, dims.split("x"))) * int(bits) // 8 for dims, bits in tiles)
        stores = sum(i.stem in _STORES for i in code)
        if stores and not stored:
            raise ValueError("bytes of stores by descriptor are not in Triton's intermediate code")
        self.stored = stored // max(1, stores)  # by each, assuming that all are alike
        if not any(map(self.bytes_of, code)):
            self.small = frozenset()

    def lies_in(self, instruction: Instruction, pointers: frozenset[str]) -> bool:
        """Whether an access goes through one of these pointers, by their names in the source."""
        verb, file = _VERBS.get(instruction.stem, "ld"), Path(instruction.file).name
        found = self.pointers.get(Place(verb, file, instruction.row), set())
        return bool(found) and found <= pointers

    def bytes_of(self, instruction: Instruction) -> int:
        if box := self.box_of(instruction):
            return box
        kind = kind_of(instruction)
        by_thread = kind == "global" or (kind == "copy" and instruction.stem == "LDGSTS")
        if not by_thread or self.lies_in(instruction, self.small):
            return 0
        return 32 * width_of(instruction) // 8

    def box_of(self, instruction: Instruction) -> int:
        """Bytes of a copy by descriptor: at the barrier that expects it, or at the store."""
        if instruction.stem in _STORES:
            return self.stored
        if _EXPECT.match(instruction.name):
            return self._value(instruction.operands.split(", ")[-1], instruction.place)
        return 0

    def _value(self, register: str, place: int) -> int:
        """The constant that a register was last set to before `place`."""
        for before in reversed(self.code[:place]):
            target, *sources = before.operands.split(", ")
            if target == register and sources:
                source = sources[-1]
                constant = source.startswith("0x")
                return int(source, 16) if constant else self._value(source, before.place)
        raise ValueError(f"bytes of a copy by descriptor are not a constant: {register}")
