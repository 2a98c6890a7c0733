"""What a compiled kernel does and needs, read from its code without a GPU."""

import ast
import functools
import inspect
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_PLACE = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)")
_DIRECT = re.compile(r"\b(ld|st)((?:\.\w+)*\.global(?:\.[\w:]+)*)\s")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (\w+)")


class Access(NamedTuple):
    """A load or store of global memory, or a copy from there to shared memory, of one thread."""

    tensor: str  # the pointer, as the kernel's source names it
    bytes: int


class Usage(NamedTuple):
    """What a kernel needs of a multiprocessor."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack, or registers on AMD


class Place(NamedTuple):
    """What machine code knows of an access."""

    verb: str  # "ld", "st" or "cp"
    file: str  # without its folder
    row: int


def read_accesses(kernel: Any) -> list[Access]:
    """Every access of an NVIDIA kernel in the order of its PTX, but those by tensor descriptors."""
    return [access for access, _ in place_accesses(kernel)]


def place_accesses(kernel: Any) -> list[tuple[Access, Place]]:
    """The same, each with its place.

    The compiler notes the source line of an instruction, and that line names the pointer. Each line
    of inline assembly counts as one source line more: machine code hears of those, the names come
    from the first. Triton's cache goes by the text of a kernel, not by its place: the noted file
    may be that of another copy of these sources, gone since. What counts is the file of that name
    here.
    """
    code = kernel.asm["ptx"]
    beside = Path(inspect.getfile(kernel.src.fn.fn)).parent
    names = {number: Path(file).name for number, file in _FILE.findall(code)}
    files = {number: _find_source(name, beside) for number, name in names.items()}
    tensor, file, row, assembly, found = "", "", 0, 0, []
    for line in code.splitlines():
        begins, ends = "// begin inline asm" in line, "// end inline asm" in line
        assembly = 0 if ends else assembly + (begins or assembly > 0)  # its lines so far
        if place := _PLACE.match(line):
            file, row = names[place[1]], int(place[2])
            if assembly <= 2:
                tensor = _name_pointer(files[place[1]], row, int(place[3])) or tensor
        elif copy := _COPY.search(line):
            found.append((Access(tensor, int(copy[1], 0)), Place("cp", file, row)))
        elif direct := _DIRECT.search(line):
            count, bits = (
                re.search(form, direct[2]) for form in (r"\.v(\d+)\b", r"\.[bfsu](\d+)\b")
            )
            if bits:  # else a declaration
                size = int(count[1] if count else 1) * int(bits[1]) // 8
                found.append((Access(tensor, size), Place(direct[1], file, row)))
    return found


def _find_source(name: str, beside: Path) -> Path | None:
    """The source file of a kernel or of what it calls; None of Triton's own."""
    paths = (folder / name for folder in (beside, Path(__file__).parent))
    return next((path for path in paths if path.is_file()), None)


def _name_pointer(file: Path | None, row: int, column: int) -> str:
    """The pointer that the access at, or around, a place of a source file goes through."""
    found = _accesses_of(file) if file else []
    around = [name for start, end, name in found if start <= (row, column) <= end]
    return around[-1] if around else ""


@functools.cache
def _accesses_of(file: Path) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
    """Start, end and pointer of every `tl.load` and `tl.store` of a file, the outer ones first."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store"):
            end = (node.end_lineno or node.lineno, node.end_col_offset or 0)
            pointer = node.args[0]
            while isinstance(pointer, (ast.BinOp, ast.Subscript)):
                pointer = pointer.left if isinstance(pointer, ast.BinOp) else pointer.value
            found.append(((node.lineno, node.col_offset + 1), end, ast.unparse(pointer)))
    return sorted(found)


def read_usage(kernel: Any) -> Usage:
    """Registers and spills of a kernel, of NVIDIA's by the tool in Triton's wheel."""
    if "amdgcn" in kernel.asm:
        counts = {n: int(v) for n, v in re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"])}
        return Usage(counts["vgpr_count"], counts["vgpr_spill_count"] + counts["sgpr_spill_count"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return Usage(counts["REG"], counts["STACK"] + counts["LOCAL"])


def count_wide(kernel: Any) -> int:
    """Accesses of 128 bits, those by tensor descriptors aside."""
    if "amdgcn" in kernel.asm:
        return len(re.findall(r"global_(?:load|store)_dwordx4", kernel.asm["amdgcn"]))
    return sum(access.bytes >= 16 for access in read_accesses(kernel))


def count_products(kernel: Any) -> int:
    """Matrix instructions that read shared memory themselves: HGMMA of sm_90, UTCMMA of sm_100."""
    return len(re.findall(r"\bwgmma\.mma_async|\btcgen05\.mma\b", kernel.asm.get("ptx", "")))
