"""Weights and optimizer states of a divided model: gathered, handed out, written in parts.

Gathered states have the form of one process, so that a run may go on with another plan. In parts
the rows of the keys and values of mixin layers are in the order of the ranks that divide them.
"""

import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import distribute_tensor

from comemo.parallel.tensor import by_kind, by_rank
from comemo.train import ranks
from comemo.train.checkpoints import PARTS
from comemo.train.parallel.gradients import is_divided

NOTE = "shards.json"  # in it: how the layers were divided
KEYS_AND_VALUES = ".mixin.kv_proj.weight"
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
# Not by groups, of which a run under another plan may have others.
BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
HANDED_OUT = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
Groups = list[list[str]]  # names of parameters, as one process groups them


def is_in_parts(checkpoint: Path) -> bool:
    """Whether the weights of a checkpoint were written by each rank."""
    return (checkpoint / PARTS).is_dir()


def fill(model: nn.Module, whole: nn.Module | None, device: torch.device, tensor: int) -> None:
    """Give a divided model, which is on the meta device, its weights. All ranks must call.

    Args:
        model: what `shard_model` divided.
        whole: the model with its weights, on the first rank; None on others.
        device: where the parts are kept.
        tensor: ranks that divide each layer.
    """
    model.to_empty(device=device)
    state = {} if whole is None else {n: w.detach() for n, w in whole.named_parameters()}
    set_model_state_dict(model, _reordered(state, tensor, by_rank), options=HANDED_OUT)


def whole_weights(model: nn.Module, tensor: int) -> dict[str, Tensor]:
    """All weights on the CPU of the first rank, nothing on others. All ranks must call."""
    with _without_advice():
        state = get_model_state_dict(model, options=GATHERED)
    return _reordered(state, tensor, by_kind)


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Without torch's advice on the order of all-gathers, which is that of FSDP itself."""
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _reordered(
    state: dict[str, Any], size: int, order: Callable[[Tensor, int], Tensor]
) -> dict[str, Any]:
    """The same weights with rows of keys and values in another order."""
    if size == 1:
        return state
    return {n: order(w, size) if n.endswith(KEYS_AND_VALUES) else w for n, w in state.items()}


def whole_optimizer(
    model: nn.Module, optimizer: Any, groups: Groups, tensor: int
) -> dict[str, Any] | None:
    """The state of a divided model's optimizer in the form of one process, on the first rank.

    Args:
        model, optimizer: the latter as torch has it.
        groups: names of the parameters in each group of one process.
        tensor: ranks that divide each layer.
    """
    with _without_advice():
        found = get_optimizer_state_dict(model, optimizer, options=GATHERED)
    if not ranks.is_first():
        return None
    owner = {name: group for group in found["param_groups"] for name in group["params"]}
    state, param_groups, number = {}, [], 0
    for names in groups:
        own: dict[str, Any] = dict(owner[names[0]]) if names else {}
        own["params"] = list(range(number, number + len(names)))
        param_groups.append(own)
        for name in names:
            moments = found["state"].get(name, {})
            if name.endswith(KEYS_AND_VALUES) and tensor > 1:
                moments = _of_moments(moments, lambda moment: by_kind(moment, tensor))
            if moments:
                state[number] = moments
            number += 1
    return {"state": state, "param_groups": param_groups}


def hand_out_optimizer(
    model: nn.Module, optimizer: Any, state: dict[str, Any] | None, groups: Groups, tensor: int
) -> None:
    """Load the state of one process into a divided model's optimizer. All ranks must call.

    Args:
        model, optimizer, groups, tensor: as `whole_optimizer`.
        state: on the first rank.
    """
    if state is None:
        given: dict[str, Any] = {}
    else:
        names = [name for group in groups for name in group]
        moments = {
            name: _of_moments(own, lambda moment: by_rank(moment, tensor))
            if name.endswith(KEYS_AND_VALUES) and tensor > 1
            else own
            for name, own in ((names[i], own) for i, own in state["state"].items())
        }
        owner = {
            name: group
            for group, own in zip(state["param_groups"], groups, strict=True)
            for name in own
        }
        # Groups of the optimizer are those of one process, or parts of them.
        own_groups = names_by_group((g["params"] for g in optimizer.param_groups), model)
        param_groups = [{**owner[own[0]], "params": own} for own in own_groups]
        given = {"state": moments, "param_groups": param_groups}
    set_optimizer_state_dict(model, optimizer, given, options=HANDED_OUT)


def _of_moments(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: change(v) if isinstance(v, Tensor) and v.ndim else v for k, v in state.items()}


def write_parts(folder: Path, model: nn.Module, optimizer: Any, tensor: int) -> None:
    """Write this rank's part of weights and optimizer state. All ranks must call.

    Args:
        folder: of the checkpoint, which exists.
        model, optimizer: the latter as torch has it.
        tensor: ranks that divide each layer.

    Raises:
        OSError: the disk is full, or another fault of the file system, on any rank.
    """
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=BY_NAME),
    }
    try:
        dcp.save(state, checkpoint_id=folder / PARTS)
    except BaseException as error:  # its exception is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise OSError(f"parts of a checkpoint: {' '.join(str(error).split())}") from error
    if ranks.is_first():
        (folder / PARTS / NOTE).write_text(json.dumps({"tensor": tensor}), encoding="utf-8")


def read_parts(checkpoint: Path, model: nn.Module, optimizer: Any, tensor: int) -> None:
    """Read this rank's part, which any number of ranks may have written. All ranks must call.

    Args:
        checkpoint: its folder.
        model: divided, with memory for its weights.
        optimizer: None to read the weights alone.
        tensor: ranks that divide each layer now.
    """
    state = {"model": get_model_state_dict(model)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=BY_NAME)
    dcp.load(state, checkpoint_id=checkpoint / PARTS)
    before = divided_before(checkpoint)
    if before != tensor:
        for name, value in sorted((state["model"] | state.get("optimizer", {})).items()):
            if KEYS_AND_VALUES in name and isinstance(value, Tensor) and value.ndim:
                _reorder(value, before, tensor)
    set_model_state_dict(model, state["model"])
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=BY_NAME)


@torch.no_grad()
def _reorder(weight: Any, before: int, now: int) -> None:
    """Rows of keys and values in the order of other ranks, in place; one weight is whole then."""
    if not is_divided(weight):
        weight.copy_(by_rank(by_kind(weight, before), now))
        return
    with _without_advice():
        whole = by_rank(by_kind(weight.full_tensor(), before), now)
    own = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
    weight.to_local().copy_(own.to_local())


def divided_before(checkpoint: Path) -> int:
    """How many ranks divided each layer when a checkpoint was written in parts."""
    return int(json.loads((checkpoint / PARTS / NOTE).read_text(encoding="utf-8"))["tensor"])


def read_whole(checkpoint: Path, model: nn.Module) -> None:
    """Read weights that were written in parts into a model in one process.

    Args:
        checkpoint: its folder.
        model: with memory for its weights.
    """
    state = {"model": {name: weight.detach() for name, weight in model.named_parameters()}}
    alone: Any = {"no_dist": True}
    if "no_dist" in inspect.signature(dcp.load).parameters:
        dcp.load(state, checkpoint_id=checkpoint / PARTS, **alone)
    else:
        dcp.load_state_dict(state, dcp.FileSystemReader(checkpoint / PARTS), **alone)
    size = divided_before(checkpoint)
    with torch.no_grad():
        for name, weight in state["model"].items():
            if name.endswith(KEYS_AND_VALUES):
                weight.copy_(by_kind(weight, size))


def names_by_group(groups: Iterable[Iterable[nn.Parameter]], model: nn.Module) -> Groups:
    """Names of the parameters in each group of an optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group] for group in groups]
