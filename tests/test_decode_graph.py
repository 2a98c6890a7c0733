"""A decode step as a CUDA graph: everything on the device, no sync, replay equals the step."""

import pytest
import torch
from conftest import SLOW_ON_CPU
from decoding import (  # noqa: F401
    GREEDY,
    TOLD,
    _model,
    assert_same,
    assert_same_cache,
    loop,
    model,
    poison,
    text,
    without_picture,
)
from small import make_model, make_prompts
from torch.utils._python_dispatch import TorchDispatchMode

import comemo_kernels as ops
from comemo import DecodeLoop
from comemo.decode import arena as decode_memory
from comemo.decode import loop as decode

pytestmark = pytest.mark.usefixtures("one_thread")


def test_capture_and_flag_without_a_gpu():
    calls = []
    assert ops.capture(lambda: calls.append(1), "cpu")() is None
    assert calls == [1]
    with pytest.raises(ValueError, match="warmups must be an integer from 1"):
        ops.capture(lambda: None, "cpu", warmups=0)
    assert not ops.runs_ahead("cpu")
    value = torch.tensor([3])
    flag = ops.HostFlag(value)
    flag.post(value)
    value.fill_(4)
    assert flag.read().tolist() == [3]


class NothingRead(TorchDispatchMode):
    """Refuses operations that sync, or that a graph cannot capture."""

    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.__name__.split(".")[0] not in self.READS, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("prompts", [make_prompts, without_picture, text])
def test_a_step_never_syncs(model, loop, prompts, monkeypatch):
    """Repeated without any work in between, as a graph replay, it continues by itself."""
    batch = prompts(model)
    wanted = model.generate(**batch, **GREEDY)[:, -7:]
    model.generate(**batch, **GREEDY | {"max_new_tokens": 2}, decode_loop=loop)
    (step,) = loop._steps.values()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # or CPU values are read
    tokens = []
    with torch.no_grad(), NothingRead():
        for _ in range(5):
            step.run(True)
            tokens.append(step.token.clone())
    assert torch.equal(torch.cat(tokens, 1), wanted[:, 2:])


@SLOW_ON_CPU
@pytest.mark.kernel
def test_a_step_on_kernels_reads_no_stale_data(device, monkeypatch):
    for module in (decode, decode_memory):  # the interpreter is slow
        monkeypatch.setattr(module, "capacity_for", lambda n, least=64: -(-n // least) * least)
    model = make_model(num_hidden_layers=2).to(device)
    batch = without_picture(model)
    batch = {n: t.to(device) if n != "tile_grid" else t for n, t in batch.items()}
    loop = DecodeLoop(model)
    model.generate(**batch, **GREEDY | {"max_new_tokens": 2}, decode_loop=loop)
    poison(loop)
    assert_same(model, loop, batch, max_new_tokens=2)
    assert loop.captures == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_is_the_step(dtype, monkeypatch):
    model = make_model(dtype).cuda()

    def on_gpu(batch):
        return {n: t.cuda() if torch.is_tensor(t) else t for n, t in batch.items()}

    def unsynced(self, *args, decode=DecodeLoop._decode):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return decode(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    loop, batch = DecodeLoop(model), on_gpu(make_prompts(model))
    options = GREEDY | TOLD | {"max_new_tokens": 12}
    model.generate(**batch, **options, decode_loop=loop)
    assert loop.captures == 1
    monkeypatch.setattr(DecodeLoop, "_decode", unsynced)
    eager = DecodeLoop(model)
    for turn in range(3):
        batch["pixel_values"] = batch["pixel_values"].roll(1, 0) + turn
        found = model.generate(**batch, **options, decode_loop=loop)
        with monkeypatch.context() as patch:
            patch.setattr(ops, "capture", lambda function, device: function)
            wanted = model.generate(**batch, **options, decode_loop=eager)
        assert torch.equal(found.sequences, wanted.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(wanted.logits))
        assert_same_cache(found.past_key_values, wanted.past_key_values)
        if dtype == torch.float32:
            assert torch.equal(model.generate(**batch, **options).sequences, found.sequences)
    assert loop.captures == 1
    sampled = options | {"do_sample": True}
    assert model.generate(**batch, **sampled, decode_loop=loop).sequences.shape[1] == 53
