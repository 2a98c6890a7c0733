"""The training loop on a GPU: its losses are those of a CPU, and a run goes on there."""

import pytest
import torch
import virtual_gpu
from conftest import GPU
from packs import make_pack, make_trainer
from small import make_model

from comemo import CoMemoForConditionalGeneration

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.gpu
@pytest.mark.parametrize(("mixed", "tolerance"), [(False, 1e-3), (True, 5e-2)])
def test_losses_are_those_of_a_cpu(tmp_path, mixed, tolerance):
    found = []
    for cpu in (True, False):
        model = make_model().cpu().requires_grad_(True)
        options = {"use_cpu": cpu, "bf16": mixed and not cpu, "gradient_checkpointing": not cpu}
        trainer, reports = make_trainer(tmp_path / f"{cpu}", model=model, **options)
        trainer.train()
        found.append([report.loss for report in reports])
    assert found[1] == pytest.approx(found[0], rel=tolerance)


@pytest.mark.gpu
def test_an_interrupted_run_goes_on(tmp_path):
    options = {"use_cpu": False, "bf16": True, "steps": 4, "save_total_limit": None}
    trainer, whole = make_trainer(tmp_path / "a", **options)
    trainer.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    model = make_model().cpu().requires_grad_(True)
    loaded = CoMemoForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    again, rest = make_trainer(tmp_path / "b", model=model, **options)
    again.load_data_state(checkpoint)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert [r.loss for r in rest] == pytest.approx([r.loss for r in whole][2:], rel=1e-4)


@pytest.mark.skipif(GPU, reason="a real one is tested above")
@pytest.mark.parametrize("index", [0, 1], ids=["text", "image"])
def test_a_pack_goes_to_a_virtual_gpu(tmp_path, index):
    """No operation of a step has tensors on two devices."""
    wanted, _ = make_trainer(tmp_path / "cpu", total=1, save_strategy="no")
    pack = {**make_pack(0, index), "stream": 0}
    loss = wanted.compute_loss(wanted.model, wanted._prepare_inputs(pack), num_items_in_batch=1)
    virtual_gpu.faults.clear()
    with virtual_gpu.present():
        trainer, _ = make_trainer(tmp_path / "gpu", total=1, save_strategy="no")
        trainer.model.cuda()
        inputs = trainer._prepare_inputs(pack)
        inputs = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        found = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=1)
        found.backward()
        assert found.item() == pytest.approx(loss.item(), rel=1e-5)
    assert not virtual_gpu.faults
