"""Launch keys against Triton's own choice: no size recompiles a kernel, no key is too coarse."""

import contextlib

import pytest
import torch
from conftest import INTERPRET

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from comemo_kernels import (
    _descriptors,
    _gelu_gradient,
    _gemm,
    _memory_build_tma,
    _rms_norm_gradient,
    _rows_kernel,
    _swiglu,
    _unshuffle_norm,
    aot,
    attention,
    memory_build,
    positions,
    rotary,
    tiles,
)


class Chooser(aot.OfflineDriver):
    """A device of its own, for which nothing has been compiled."""

    def get_current_device(self):
        return "keys"


def choose(function, key, signature, device, *_):
    """Instead of the compiler: an object for each kernel that it would compile."""
    return function.device_caches[device][0].setdefault(key, object())


@contextlib.contextmanager
def recorded(*kernels):
    """Launches for sm_90: (kernel, key) -> the compiled kernels that Triton chooses for it."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        if hasattr(JITFunction, "_do_compile"):  # from triton 3.4 on; otherwise all is compiled
            patch.setattr(JITFunction, "_do_compile", choose)
            driver.set_active(Chooser(aot.CHIPS["sm_90"].target))
        for kernel in kernels:

            def record(programs, *args, kernel=kernel, launch=kernel.launch):
                launch(programs, *args)
                if programs:
                    key = (kernel.function.__name__, id(kernel), kernel.key(args))
                    found.setdefault(key, set()).add(id(compiled[-1]))

            patch.setattr(kernel, "launch", record)
        yield found


def assert_keys(found, count):
    """At most `count` keys, each of one compiled kernel for all sizes."""
    assert len(found) <= count
    assert None not in {key for _, _, key in found}
    assert_fine(found)


def assert_fine(found):
    """A key distinguishes what Triton does, or leaves the choice to Triton."""
    for (_, _, key), compiled in found.items():
        assert key is None or len(compiled) == 1, key


def test_rotary():
    table, other = torch.empty(64, 32), torch.empty(65)[1:].expand(4, 64)[:, :32]

    def rotate(q, k, table, positions):
        rotary._launch([q, k], table, table, positions, 0, False, False, False, False)

    with recorded(rotary.rotary_kernel) as found:
        for N in range(1, 51):
            for B, H, G in ((1, 4, 1), (3, 16, 2), (2, 1, 1)):
                q, k = torch.empty(B, N, H, 64).half(), torch.empty(B, G, N, 64).half()
                rotate(q, k.transpose(1, 2), table, torch.zeros(B, N, dtype=torch.int64))
                odd = torch.empty(B, N, H, 6).half()
                rotate(odd, odd[:, :, :1], table[:, :3], torch.zeros(1, N, dtype=torch.int64))
        assert_keys(found, 2)
        for q in (
            torch.empty(2, 5, 4, 64).half(),
            torch.empty(2, 5, 4, 64),
            torch.empty(2, 5, 4, 65).half()[..., :64],
            torch.empty(2 * 5 * 4 * 64 + 1).half()[1:].view(2, 5, 4, 64),
            torch.empty(5, 4, 64).half(),
        ):
            for ids in (torch.int32, torch.int64):
                for chosen in (table, table.half(), other):
                    rotate(q, q, chosen, torch.zeros(q.shape[:-2], dtype=ids))
    assert_fine(found)


def test_positions():
    grids = torch.zeros(3, 4, dtype=torch.int32)
    with recorded(positions.rope_dhr_kernel) as found:
        for N in range(1, 51):
            for B, images in ((1, 1), (3, 2)):
                mask = torch.zeros(B, N, dtype=torch.bool)
                positions._launch(mask, mask, grids[:images], N, 16, True, True)
        assert_keys(found, 1)
        for attention_mask in (torch.int64, torch.int32, torch.float32, torch.bool):
            for end in (5, 2**31):
                mask = torch.zeros(3, 16, dtype=torch.bool)
                positions._launch(mask, mask.to(attention_mask), grids, end, 16, False, True)
    assert_fine(found)


def test_attention():
    """50 lengths of queries and memory, a batch, other layouts: a kernel for each block size."""

    def attend(B, N, M, H=4, G=2, images=2, ids=torch.int64, width=64, dtype=torch.float16):
        q, kv = torch.empty(B, N, H, width).half(), torch.empty(M, 2, G, width).to(dtype)
        q, kv = q[..., :64], kv[..., :64]
        spans, table = torch.zeros(B, 1, 2, dtype=ids), torch.empty(999, 32)
        rotation = [table, table, torch.zeros(B, N, dtype=ids)]
        rotation += [torch.zeros(images).int(), torch.zeros(B, images).int()]
        scales = [None] * 2 if dtype == torch.float16 else [torch.ones(-(-M // 16), G)] * 2
        attention._launch(q, kv[:, 0], kv[:, 1], spans, *rotation, *scales, 16)

    kernels = (attention.attend_many, attention.attend_few, attention.attend_one)
    with recorded(*kernels, attention.combine) as found:
        for i in range(1, 51):
            attend(1, 1, 64 * i)
            attend(1, 1, 64 * i, images=i + 1)
            attend(3, 1 + i % 8, 17 * i, H=8, G=8)
            attend(2, 90 + i, 33 * i, images=2 + i)
        # Not split, split; one block size is never split here, and one combines.
        assert_keys(found, 2 * 3 + 1)
        for images in (1, 2):
            for ids in (torch.int32, torch.int64):
                for width in (64, 67, 72):
                    attend(1, 1, 256, images=images, ids=ids, width=width)
                    attend(1, 90, 256, images=images, ids=ids, width=width)
        for width in (64, 72, 80):  # rows of whole 128 bits, or not
            attend(1, 1, 256, width=width, dtype=torch.float8_e4m3fn)
    assert_fine(found)


def test_build():
    def memory(M, L, exact, row=0, d=128, eight=False, width=32):
        dtype = torch.float8_e4m3fn if eight else torch.float16
        held = torch.empty(row + M + 16, 2, width, dtype=dtype, device="meta")[..., :32]
        weights = [torch.empty(128, d, device="meta").half()] * L
        norms = [torch.empty(d, device="meta").half()] * L if exact else []
        media, table = torch.empty(M, d, device="meta").half(), torch.empty(99, 16)
        scales = [torch.empty(M, 2, device="meta")] * L if eight else []
        arguments = (media, weights, norms, table, table, torch.zeros(M).int(), [held] * L)
        memory_build._launch(*arguments, [held] * L, scales, scales, 16 if eight else 1, row, 1e-5)

    kernels = (memory_build.norm_media, memory_build.project_media, memory_build.scale_memory)
    with pytest.MonkeyPatch.context() as patch, recorded(*kernels) as found:
        patch.setattr(memory_build, "to_device", lambda values, _: values)
        for i in range(1, 51):
            for exact in (True, False):
                memory(16 * i, 1 + i % 7, exact, row=16 * (i % 3))
        assert_keys(found, 4)
        memory(64, 2, True, eight=True)
        memory(64, 2, True, eight=True, width=40)
        memory(80, 3, False, row=32, eight=True)
        memory(64, 2, True, d=132)
        memory(64, 2, False, d=100)
    assert_fine(found)


def test_build_by_descriptors():
    if not _descriptors.AVAILABLE:
        pytest.skip("triton below 3.4 makes no descriptors in a kernel")
    with recorded(_memory_build_tma.project_tma) as found:
        for i in range(1, 51):
            M, L, G, d = 16 * i, 1 + i % 7, 1 + i % 5, 8 * (1 + i % 9)
            x, table = torch.empty(L, M, d, device="meta").half(), torch.empty(99, 16)
            ids, address = torch.zeros(M).int(), torch.zeros(L, 4).long()
            for given in (x, x[0]):
                given = (given, torch.empty(M), ids, table, table, address)
                _memory_build_tma.launch(*given, (G * 32, 32), M, (G, 32), 16 * (i % 3))
    assert_keys(found, 2)


def test_rows():
    def run(x, weight, eps=1e-5, gate=None):
        (R, K), outputs = x.shape, weight.shape[0]
        norm = torch.ones(K).to(x)
        _rows_kernel._launch(x, norm, weight, None, None, None, eps)
        _rows_kernel._launch(x, norm, weight, weight, None, None, eps)
        _rows_kernel._launch(x, None, weight, None, None, None, eps)
        _rows_kernel._launch(x, None, weight, weight, None, None, eps)
        gate = x.new_ones(1) if gate is None else gate
        _rows_kernel._launch(x, None, weight, None, x.new_ones(R, outputs), gate, None)
        _rows_kernel._launch(x, None, weight, None, x.new_ones(R, outputs), None, None)

    with recorded(_rows_kernel.one_weight_kernel, _rows_kernel.two_weights_kernel) as found:
        for R in range(1, 17):
            for K, outputs in ((512, 1), (1024, 16), (2048, 48)):
                wide = torch.empty(R, 2 * K).half()
                run(wide[:, :K], torch.empty(8 * outputs, K).half(), eps=float(R))
                run(wide[:, K:], torch.empty(8 * outputs, 2 * K).half()[:, :K])
        run(wide[:, :K], torch.empty(8, K).half(), gate=torch.ones(2).half()[1:])
        assert_keys(found, 6)
        for K in (1, 7, 8, 24, 512):
            for x in (
                torch.empty(3, K),
                torch.empty(3, K).half(),
                torch.empty(3, K + 1).half()[:, :K],
                torch.empty(3 * K + 1).half()[1:].view(3, K),
            ):
                for outputs in (1, 16):
                    run(x, torch.empty(outputs, K).to(x))
    assert_fine(found)


def test_tiles():
    def project(T, C=32, d=64, keep=False, rows=torch.int64, dtype=torch.float16, odd=0):
        new = lambda *shape: torch.empty(*shape, dtype=dtype)  # noqa: E731
        tokens, W = new(T, 17, C + odd)[..., :C], 4 * C
        weights = (new(W), new(W), new(d, W), new(d), new(d, d), new(d))
        if keep:
            _, normed, stats, before = tiles._launch(tokens, *weights, 2, False, 1e-5, True)
            _gelu_gradient._launch(before, before)
            arguments = (normed, tokens, weights[0], stats, 2, False, True, True)
            _unshuffle_norm._launch_fold_norm_gradient(*arguments)
        else:
            media, embeds = new(4 * T, d), new(4 * T + 3, d)
            place = torch.zeros(4 * T, dtype=rows)
            tiles._launch_into(media, embeds, place, tokens, *weights, 2, False, 1e-5)

    kernels = (
        _unshuffle_norm.fold_norm,
        _unshuffle_norm.fold_norm_gradient,
        _gemm.product,
        _gemm.add_parts,
    )
    with recorded(*kernels, _gelu_gradient.gelu_gradient) as found:
        for T in range(1, 51):
            project(T)
            project(T, keep=True)
        # Two products each way, the second with other destinations; their sums; the passes.
        assert_keys(found, 2 * 2 + 2 * 2 + 2 + 1 + 1)
        for C, d, odd in ((32, 64, 1), (33, 64, 0), (32, 60, 0), (256, 128, 0)):
            project(3, C, d, odd=odd)
            project(3, C, d, keep=True, odd=odd)
    assert_fine(found)


def test_norms_and_networks():
    def learn(R, d, wide, odd=0):
        x = torch.empty(R, d + odd).half()[:, odd:]
        for to in ((True, True), (True, False)):
            _rms_norm_gradient._launch(x[:, :d], x, x[0, :d], x, 1e-5 * R, *to)
        g, gate = torch.empty(R, wide).half(), torch.empty(1 + odd).half()[odd:]
        _swiglu._launch(g, g)
        _swiglu._launch_gradient(g, g, g, gate, True, True, True)

    norms = (
        _rms_norm_gradient.rms_norm_gradient,
        _rms_norm_gradient.rms_norm_gradient_wide,
        _rms_norm_gradient.rms_norm_gradient_widest,
    )
    with recorded(*norms, _swiglu.swiglu, _swiglu.swiglu_gradient) as found:
        for R in range(1, 51):
            learn(R, 72, 8 * R)
        assert_keys(found, 2 + 1 + 1)
        for R, d, odd in ((3, 71, 0), (3, 72, 1), (600, 8, 0), (3, 2056, 0), (3, 8200, 0)):
            learn(R, d, 7 * R, odd)
    assert_fine(found)


def test_a_number_of_more_than_32_bits_is_left_to_triton():
    x = torch.empty(2**31, device="meta", dtype=torch.bfloat16)
    with recorded(_gelu_gradient.gelu_gradient) as found:
        for count in (2**31, 2**31 - 8):
            _gelu_gradient._launch(x[:count], x[:count])
    assert [key is None for _, _, key in found] == [True, False]
    assert len(set.union(*found.values())) == 2
