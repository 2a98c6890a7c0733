"""Divide a model among the ranks of a run: FSDP2, and tensor parallelism inside it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from comemo.parallel.tensor import COLUMNS, cut, mark_layer, parts_of
from comemo.train.parallel.plan import Sharing


def shard_model(model: Any, sharing: Sharing, precision: str, offload: bool) -> None:
    """Divide a model; its weights may be on the meta device, see `state.fill`.

    One layer at a time is whole while it computes. Weights are in float32 and sent in the precision
    of training; gradients are added in float32.

    Args:
        model: a `CoMemoForConditionalGeneration` with its adapters.
        sharing: a plan that is sharded.
        precision: "float32" or "bfloat16".
        offload: whether the parts are kept on the CPU.
    """
    assert sharing.rest is not None
    half = torch.bfloat16 if precision == "bfloat16" else None
    # Inputs keep their dtypes: angles of the image memory are in float32.
    mixed = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=half and torch.float32, cast_forward_inputs=False
    )
    policy = OffloadPolicy()
    if offload:
        policy = CPUOffloadPolicy(pin_memory=sharing.rest.device_type != "cpu")
    options: dict[str, Any] = {"mp_policy": mixed, "offload_policy": policy}
    for layer in model.model.language_model.layers:
        if sharing.split is not None:
            _divide(layer, sharing)
        fully_shard(layer, mesh=sharing.layers, **options)
    model.model.split = sharing.split
    for layer in model.model.vision_tower.encoder.layer:
        fully_shard(layer, mesh=sharing.rest, **options)
    fully_shard(model, mesh=sharing.rest, **options)
    model._is_accelerate_prepared = True  # accelerate would wrap it again


@contextlib.contextmanager
def whole_outside_layers(model: Any) -> Iterator[None]:
    """Within the `with` block the weights outside of layers are whole, also between forwards.

    Conversations embed tokens and project tiles outside of the model's forward.

    Args:
        model: which may be divided; all ranks must call then.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def _divide(layer: nn.Module, sharing: Sharing) -> None:
    """Make the divided weights of a layer `DTensor`s of which this rank has its part."""
    split, mesh = sharing.split, sharing.columns
    assert split is not None
    assert mesh is not None
    for part in parts_of(layer):
        weight = part.module._parameters[part.name]
        assert weight is not None
        local = cut(weight.detach(), part.kind, split)
        placed = DTensor.from_local(
            local, mesh, [Shard(1 if part.kind == COLUMNS else 0)], run_check=False
        )
        part.module._parameters[part.name] = nn.Parameter(placed, weight.requires_grad)
    mark_layer(layer, split)
