"""Where to run and in which dtype."""

import pytest
import torch

from comemo import device


def test_dtype_of_a_cpu_is_measured(monkeypatch):
    cpu = torch.device("cpu")
    for times, chosen in (((1.0, 3.0), torch.float32), ((1.0, 0.4), torch.bfloat16)):
        seconds = dict(zip((torch.float32, torch.bfloat16), times, strict=True))
        monkeypatch.setattr(
            device, "_gemm_seconds", lambda dtype, give_up=0, seconds=seconds: seconds[dtype]
        )
        device.default_dtype.cache_clear()
        assert device.default_dtype(cpu) == chosen
    monkeypatch.undo()
    device.default_dtype.cache_clear()
    first = device.default_dtype(cpu)
    monkeypatch.setattr(device, "_gemm_seconds", None)
    assert device.default_dtype(cpu) == first
    assert first in (torch.float32, torch.bfloat16)


def test_dtype_of_an_accelerator(monkeypatch):
    device.default_dtype.cache_clear()
    for supported, chosen in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, s=supported, **__: s)
        assert device.default_dtype.__wrapped__(torch.device("cuda")) == chosen
        monkeypatch.setattr(device, "_can_compute", lambda *_, s=supported: s)
        assert device.default_dtype.__wrapped__(torch.device("mps")) == chosen


def test_device_names():
    assert device.parse_device(None) == device.default_device()
    assert device.parse_device("cpu") == torch.device("cpu")
    for name in ("abacus", "meta", "cuda:99"):
        with pytest.raises(ValueError, match=name):
            device.parse_device(name)
    with pytest.raises(ValueError, match="int8"):
        device.parse_dtype("int8", torch.device("cpu"))


def test_free_memory_is_what_a_container_leaves(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "_CGROUP", tmp_path)
    whole = device.free_memory(cpu)
    assert whole > 2**20
    (tmp_path / "memory.current").write_text("300\n")
    for text, wanted in (("1000\n", 700), ("200\n", 0)):
        (tmp_path / "memory.max").write_text(text)
        assert device.free_memory(cpu) == wanted
    (tmp_path / "memory.max").write_text("max\n")
    assert device.free_memory(cpu) > 2**20
