"""What the compiler makes of the kernel around a mixin layer's attention, with no GPU."""

import pytest
import torch
from conftest import INTERPRET

if INTERPRET:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)
pytest.importorskip("triton")

from comemo_kernels import aot, glue

KERNELS = (glue.one_weight_kernel, glue.two_weights_kernel)


def test_weights_stream_past_the_registers():
    """On sm_90 every step of every configuration is asynchronous copies of 128 bits, no less."""
    for case in aot.cases():
        if case.kernel not in KERNELS or not case.name.startswith("bf16"):
            continue
        for config in case.kernel.configs:
            with case.kernel.using(config), aot.offline(aot.CHIPS["sm_90"].target) as compiled:
                case.launch()
            _, _, code = aot._read_nvidia(compiled[0])
            steps = config["num_stages"]  # those ahead of the loop, and the loop's own
            weights = 2 if case.kernel is glue.two_weights_kernel else 1
            tiles = 16 + weights * config["BLOCK_O"]  # x and weights, in rows
            threads = 32 * config["num_warps"]
            wanted = steps * tiles * config["BLOCK_BYTES"] // (16 * threads)
            assert code.count("LDGSTS.E.BYPASS.128") == wanted, (case.name, config)


def test_sizes_and_strides_compile_nothing_new():
    """What decides a launch's key decides the compiled kernel, and a size is no part of it."""
    found = {}

    def recording(kernel):
        launch = kernel.launch

        def record(programs, key, *args):
            launch(programs, key, *args)
            found.setdefault((id(kernel), key), set()).add(id(compiled[-1]))

        return record

    with pytest.MonkeyPatch.context() as patch, aot.offline(aot.CHIPS["sm_90"].target) as compiled:
        for kernel in KERNELS:
            patch.setattr(kernel, "launch", recording(kernel))

        def run(x, weight, eps=1e-5, gate=None):
            R, K = x.shape
            outputs = weight.shape[0]
            norm = torch.ones(K).to(x)
            glue._launch(x, norm, weight, None, None, None, eps)
            glue._launch(x, norm, weight, weight, None, None, eps)
            glue._launch(x, None, weight, None, None, None, eps)
            glue._launch(x, None, weight, weight, None, None, eps)
            gate = x.new_ones(1) if gate is None else gate
            glue._launch(x, None, weight, None, x.new_ones(R, outputs), gate, None)
            glue._launch(x, None, weight, None, x.new_ones(R, outputs), None, None)

        for R in range(1, 17):
            for K, outputs in ((512, 1), (1024, 16), (2048, 48)):
                wide = torch.empty(R, 2 * K).half()
                run(wide[:, :K], torch.empty(8 * outputs, K).half(), eps=float(R))
                run(wide[:, K:], torch.empty(8 * outputs, 2 * K).half()[:, :K])
        run(wide[:, :K], torch.empty(8, K).half(), gate=torch.ones(2).half()[1:])
        assert len(found) == 6
        assert all(key is not None for _, key in found)
        assert all(len(kernels) == 1 for kernels in found.values())
        for K in (1, 7, 8, 24, 512):  # what a key must tell apart or leave to Triton
            for x in (
                torch.empty(3, K),
                torch.empty(3, K).half(),
                torch.empty(3, K + 1).half()[:, :K],
                torch.empty(3 * K + 1).half()[1:].view(3, K),
            ):
                for outputs in (1, 16):
                    run(x, torch.empty(outputs, K).to(x))
    for (_, key), kernels in found.items():
        assert key is None or len(kernels) == 1
