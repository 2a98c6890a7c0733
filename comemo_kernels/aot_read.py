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
from triton.runtime.jit import JITFunction

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
    """The verb and source line of an access, as in machine code."""

    verb: str  # "ld", "st" or "cp"
    file: str  # without its folder
    row: int


def read_accesses(kernel: Any) -> list[Access]:
    """Every access of an NVIDIA kernel in the order of its PTX, except by tensor descriptors."""
    return [access for access, _ in place_accesses(kernel)]


def place_accesses(kernel: Any) -> list[tuple[Access, Place]]:
    """The same, each with its place.

    The compiler notes the source line of an instruction, and that line names the pointer. Each line
    of inline assembly counts as one source line more: machine code keeps those, the names come from
    the first.

    Raises:
        ValueError: a file in the code is not the source of the kernel or of a function it calls.
    """
    code = kernel.asm["ptx"]
    names = {number: Path(file).name for number, file in _FILE.findall(code)}
    files = _find_sources(kernel)
    tensor, file, row, assembly, found = "", "", 0, 0, []
    for line in code.splitlines():
        begins, ends = "// begin inline asm" in line, "// end inline asm" in line
        assembly = 0 if ends else assembly + (begins or assembly > 0)  # its lines so far
        if place := _PLACE.match(line):
            file, row = names[place[1]], int(place[2])
            if assembly <= 2:
                tensor = _name_pointer(files[place[1]], row, int(place[3])) or tensor
            continue
        size, verb = 0, ""
        if copy := _COPY.search(line):
            size, verb = int(copy[1], 0), "cp"
        elif direct := _DIRECT.search(line):
            count, bits = (
                re.search(form, direct[2]) for form in (r"\.v(\d+)\b", r"\.[bfsu](\d+)\b")
            )
            if bits:  # otherwise a declaration
                size, verb = int(count[1] if count else 1) * int(bits[1]) // 8, direct[1]
        if verb:
            name = tensor or f"a pointer that line {row} of {file} does not name"
            found.append((Access(name, size), Place(verb, file, row)))
    return found


def _find_sources(kernel: Any) -> dict[str, Path | None]:
    """The source file of each file number in a kernel's PTX; None of Triton's own.

    Triton's cache goes by the text and first line of a kernel and of what it calls, not by their
    files: the code may name a copy of these files that is gone, or their names before they were
    renamed. The lines tell which file is meant.
    """
    code, sources = kernel.asm["ptx"], _sources_of(kernel.src.fn)
    rows: dict[str, set[int]] = {}
    for line in code.splitlines():
        if place := _PLACE.match(line):
            rows.setdefault(place[1], set()).add(int(place[2]))
    files = dict(_FILE.findall(code))
    found: dict[str, Path | None] = {
        number: next((path for path in sources if path.name == Path(file).name), None)
        for number, file in files.items()
    }
    for number, file in files.items():
        if found[number] or number not in rows or "/triton/language/" in file:
            continue
        free = {path: rows[number] & lines for path, lines in sources.items()}
        fits = {path: len(hit) for path, hit in free.items() if path not in found.values()}
        best = [path for path, hits in fits.items() if 0 < hits == max(fits.values())]
        if len(best) != 1:
            raise ValueError(
                f"{kernel.metadata.name}: its compiled code names {file}, which is none of its"
                f" sources {', '.join(map(str, sources))}: empty Triton's cache"
            )
        found[number] = best[0]
    return found


def _sources_of(kernel: Any) -> dict[Path, set[int]]:
    """The files of a kernel and of the functions it calls, with the lines of these functions."""
    found: dict[Path, set[int]] = {}
    waiting, seen = [kernel.fn], set()
    while waiting:
        function = waiting.pop()
        if function not in seen:
            seen.add(function)
            lines, first = inspect.getsourcelines(function)
            path = Path(inspect.getfile(function))
            found.setdefault(path, set()).update(range(first, first + len(lines)))
            called = [function.__globals__.get(name) for name in function.__code__.co_names]
            waiting += [value.fn for value in called if isinstance(value, JITFunction)]
    return found


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
