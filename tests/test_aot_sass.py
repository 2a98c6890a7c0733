"""Machine code: its loops, tensor-core instructions, kinds and widths."""

import pytest
from conftest import INTERPRET

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

import triton

from comemo_kernels import aot_counts, aot_sass

CODE = """
.text.kernel:
    /*0000*/ MOV R1, 0x1 ;
.L_x_1:
    /*0010*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;
    /*0020*/ @!P0 BRA `(.L_x_3) ;
.L_x_2:
    /*0030*/ FADD R2, R2, R3 ;
    /*0040*/ @!P2 BRA P1, `(.L_x_4) ;
    /*0050*/ FMUL R2, R2, R3 ;
    /*0060*/ FMUL R2, R2, R3 ;
.L_x_4:
    /*0070*/ @P3 BRA `(.L_x_1) ;
    /*0080*/ EXIT ;
.L_x_3:
    /*0090*/ SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R1 ;
    /*00a0*/ @!P0 BRA `(.L_x_3) ;
    /*00b0*/ BRA `(.L_x_2) ;
.L_x_5:
    /*00c0*/ BRA `(.L_x_5) ;
"""


def test_loops_do_not_go_by_addresses():
    """A wait is placed after the end and jumps back: the only loop there is the wait's own."""
    code, labels = aot_sass.parse(CODE)
    blocks = aot_sass.find_blocks(code, labels)
    wait, main = aot_sass.find_loops(blocks, lambda i: (-1,))
    assert [i.place for i in wait.code] == [9, 10]
    assert [i.place for i in main.code] == [1, 2, 3, 4, 7]
    assert [i.place for i in main.aside] == [5, 6, 9, 10, 11]
    heavy = aot_sass.find_loops(blocks, lambda i: (i.stem == "FMUL", -1))[1]
    assert [i.place for i in heavy.code] == [1, 2, 3, 4, 5, 6, 7]
    whole = aot_sass.whole(blocks, lambda i: (-1,))
    assert [i.place for i in whole.code] == [0, 1, 2, 3, 4, 7, 8]


@pytest.mark.parametrize(
    ("name", "operands", "flops", "cycles", "shared"),
    [
        ("HGMMA.64x64x16.F32.BF16", "R88, gdesc[UR8], RZ, !UPT", 2 * 64 * 64 * 16, 32, 4096),
        ("HGMMA.64x64x16.F32", "R24, R120, gdesc[UR8].tnspB, R24", 2 * 64 * 64 * 16, 32, 2048),
        ("HGMMA.64x64x8.F32.TF32", "R88, gdesc[UR8], R88", 2 * 64 * 64 * 8, 32, 4096),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", "R88, gdesc[UR8], R88", 2 * 64 * 64 * 32, 32, 4096),
        ("HMMA.16816.F32.BF16", "R4, R8, R12, R4", 4 * 4096, 4 / 0.62, 0),
        ("HMMA.1688.F32.TF32", "R4, R8, R12, R4", 4 * 2048, 4 / 0.62, 0),
        ("IMMA.16832.S8.S8", "R4, R8, R12, R4", 4 * 8192, 4 / 0.62, 0),
        ("DMMA.884", "R4, R8, R12, R4", 4 * 512, 8, 0),
    ],
)
def test_products_of_tensor_cores(name, operands, flops, cycles, shared):
    """Sums over four warps, which are one group."""
    product = aot_sass.product_of(aot_sass.Instruction(0, "", name, operands, "", 0))
    assert (4 * product.flops, 4 * product.shared) == (flops, shared)
    assert 4 * aot_counts._tensor_cycles(product) == pytest.approx(cycles)


def test_an_unknown_product_is_an_error():
    with pytest.raises(ValueError, match=r"unknown shape: HGMMA\.SP"):
        aot_sass.product_of(aot_sass.Instruction(0, "", "HGMMA.SP", "R4, R8", "", 0))


@pytest.mark.parametrize(
    ("name", "guard", "kind", "bits"),
    [
        ("LDG.E.128.STRONG.GPU", "@P0", "global", 128),
        ("LDG.E.LTC128B.64", "", "global", 64),
        ("LDGSTS.E.BYPASS.LTC128B.128", "", "copy", 128),
        ("LDS.U8", "", "shared", 8),
        ("LDSM.16.MT88.4", "", "shared", 128),
        ("STSM.16.M88", "", "shared", 32),
        ("LDS", "@!PT", "other", 32),  # never runs
        ("FMNMX", "", "float", 32),
        ("F2FP.BF16.F32.PACK_AB", "", "convert", 32),
        ("IMAD.MOV.U32", "", "other", 32),
        ("UMOV", "", "other", 32),
    ],
)
def test_kinds_and_widths(name, guard, kind, bits):
    instruction = aot_sass.Instruction(0, guard, name, "", "", 0)
    assert aot_sass.kind_of(instruction) == kind
    assert aot_sass.width_of(instruction) == bits


def test_a_wheel_without_the_tool_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no nvdisasm: no "):
        aot_sass.disassemble(None)
