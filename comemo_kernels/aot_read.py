"""What a compiled kernel does and needs, read from its code without a GPU."""

import ast
import functools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_PLACE = re.compile(r"\s*\.loc\s+(\d+) (\d+) (\d+)(?:.*inlined_at (\d+) (\d+) (\d+))?")
_ASSEMBLY = re.compile(r"// begin inline asm\n.*?// end inline asm\n", re.DOTALL)
_DIRECT = re.compile(r"\b(?:ld|st)((?:\.\w+)*\.global(?:\.[\w:]+)*)\s")
_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (\w+)")


class Access(NamedTuple):
    """A load or store of global memory, or a copy from there to shared memory, of one thread."""

    tensor: str  # the pointer, as the kernel's source names it
    bytes: int


class Usage(NamedTuple):
    """What a kernel needs of a multiprocessor."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack, or registers on AMD


def read_accesses(kernel: Any) -> list[Access]:
    """Every access of an NVIDIA kernel in the order of its PTX, but those by tensor descriptors.

    The compiler notes the source line of an instruction, and that line names the pointer; of a
    helper that was handed the pointer it is the line that calls it.
    """
    code = _ASSEMBLY.sub(_place_once, kernel.asm["ptx"])
    files: dict[str, str] = dict(_FILE.findall(code))
    tensor, found = "", []
    for line in code.splitlines():
        if place := _PLACE.match(line):
            numbers = [int(n) for n in place.groups() if n]
            spots = [(files[str(f)], (row, column)) for f, row, column in _by_three(numbers)]
            tensor = _name_pointer(spots) or tensor
        elif copy := _COPY.search(line):
            found.append(Access(tensor, int(copy[1], 0)))
        elif direct := _DIRECT.search(line):
            count, bits = (
                re.search(form, direct[1]) for form in (r"\.v(\d+)\b", r"\.[bfsu](\d+)\b")
            )
            if bits:  # else a declaration
                found.append(Access(tensor, int(count[1] if count else 1) * int(bits[1]) // 8))
    return found


def _place_once(assembly: re.Match[str]) -> str:
    """Inline assembly without the places of all but its first line: they count source lines on."""
    first, *rest = assembly[0].splitlines(keepends=True)[1:]
    return first + "".join(line for line in rest if not _PLACE.match(line))


def _by_three(numbers: list[int]) -> list[tuple[int, ...]]:
    return [tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3)]


def _name_pointer(spots: list[tuple[str, tuple[int, int]]]) -> str:
    """The pointer of the access at the first spot, which is within a call at the second."""
    (file, spot), *callers = spots
    call = _calls(file).get(spot)
    if call is None or not call.is_access:
        return ""
    name = call.arguments[0]
    for file, spot in callers:
        caller = _calls(file).get(spot)
        if name in call.parameters and caller is not None:
            name = dict(zip(call.parameters, caller.arguments, strict=False)).get(name, name)
    return name


class _Call(NamedTuple):
    is_access: bool  # tl.load or tl.store
    arguments: tuple[str, ...]  # the leftmost name of each
    parameters: tuple[str, ...]  # of the function that it stands in


@functools.cache
def _calls(file: str) -> dict[tuple[int, int], _Call]:
    """Every call in the functions of a file, by line and column."""
    found = {}
    tree = ast.parse(Path(file).read_text() if Path(file).is_file() else "")
    for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
        parameters = tuple(argument.arg for argument in function.args.args)
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                arguments = tuple(_leftmost(argument) for argument in _flat(node.args))
                is_access = ast.unparse(node.func) in ("tl.load", "tl.store")
                found[node.lineno, node.col_offset + 1] = _Call(is_access, arguments, parameters)
    return found


def _flat(arguments: list[ast.expr]) -> list[ast.expr]:
    """Arguments of a call, those in `*(a, b)` one by one, as far as they can be told."""
    found: list[ast.expr] = []
    for argument in arguments:
        if not isinstance(argument, ast.Starred):
            found.append(argument)
        elif isinstance(argument.value, ast.Tuple):
            found += argument.value.elts
        else:
            break  # how many it stands for is not to be seen
    return found


def _leftmost(node: ast.expr) -> str:
    """`x_ptr` of `x_ptr + row[:, None] * stride`."""
    while isinstance(node, (ast.BinOp, ast.Subscript)):
        node = node.left if isinstance(node, ast.BinOp) else node.value
    return ast.unparse(node)


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
