"""Divided weights on a GPU, in a group of one rank: placement, offloading, precision."""

import pytest
import torch
from small import make_model, make_prompts
from test_parallel_training import backward, divide
from torch import distributed as dist

from comemo.train.parallel.gradients import clip, squares_by_name
from comemo.train.parallel.plan import share
from comemo.train.parallel.state import whole_weights
from comemo.train.settings import ParallelSettings

pytestmark = pytest.mark.gpu


@pytest.fixture
def group(tmp_path):
    meeting = f"file://{tmp_path}/rendezvous"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meeting, rank=0, world_size=1)
    yield torch.device("cuda", torch.cuda.current_device())
    dist.destroy_process_group()


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_divided_step_equals_a_whole_one(group, offload, precision):
    whole = make_model(heads=4).requires_grad_(True).train()
    inputs = make_prompts(whole)
    wanted = backward(whole, inputs)
    norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()])
    sharing = share(ParallelSettings(plan="fsdp"), group)
    model, _ = divide(whole, {}, precision, group, offload)
    loss = backward(model, inputs)
    total = torch.stack([*squares_by_name(model).values()]).sum().sqrt()
    loose = 2e-2 if precision == "bfloat16" else 1e-3
    assert sharing.is_sharded
    assert loss == pytest.approx(wanted, rel=loose)
    assert total.item() == pytest.approx(norm.item(), rel=3 * loose)
    places = {p.device.type for p in model.parameters()}
    assert places == {"cpu" if offload else "cuda"}
    clip(model, total, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    held = whole_weights(model, 1)
    assert all(weight.isfinite().all() for weight in held.values())
    assert not torch.equal(held["lm_head.weight"], whole.lm_head.weight.cpu())
