"""Processes of torchrun, slurm and the like as one model: who divides what with whom."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from comemo.device import device_of_rank
from comemo.parallel.environment import complete_environment
from comemo.parallel.split import Split

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}  # of a group, by the device of its ranks
DIVIDING = ("tp_plan", "tp_size", "device_mesh", "distributed_config")  # of `from_pretrained`


@dataclass(frozen=True)
class Division:
    """How the ranks of a run divide a model.

    Attributes:
        tensor: the ranks that divide every layer; None for whole layers.
        stages: the ranks that have some of the layers each; None for all layers.
        device: of this rank.
    """

    tensor: Split | None
    stages: Split | None
    device: torch.device


def take_division(function: str, options: dict[str, Any]) -> Division | None:
    """Read and remove the options of `from_pretrained` that divide a model.

    All ranks must call. Without a process group one is made from the variables of torchrun. Ranks
    beyond those of one model are further copies of it.

    Args:
        function: the name that errors begin with.
        options: `tp_plan` ("auto"), `tp_size`, `device_mesh` (with a dimension "tp" or of one
            dimension), or `distributed_config` with `tp_size`, `tp_plan` and `pp_size`, as an
            object of transformers or a dictionary.

    Returns:
        None if none of them is given; the options are then as before.

    Raises:
        ValueError: options that exclude each other or that are not supported here, or numbers that
            do not fit the number of ranks.
    """
    given = {name: options.pop(name) for name in DIVIDING if options.get(name) is not None}
    for name in DIVIDING:
        options.pop(name, None)
    if not given:
        return None
    for name in ("device_map", "quantization_config"):
        if options.get(name) is not None:
            raise ValueError(
                f"{function}: {next(iter(given))} and {name} exclude each other: a model that ranks"
                " divide has ordinary weights on the device of each rank"
            )
    if "distributed_config" in given:
        if len(given) > 1:
            others = sorted(given.keys() - {"distributed_config"})
            raise ValueError(f"{function}: give either distributed_config or {others}, got both")
        given = _read_config(function, given["distributed_config"])
    plan = given.get("tp_plan", "auto")
    if plan != "auto":
        raise ValueError(
            f"{function}: tp_plan must be 'auto', because heads, image memory and fused kernels are"
            f" divided together, got {plan!r}"
        )
    device = join(function)
    if (mesh := given.get("device_mesh")) is not None:
        return _of_mesh(function, mesh, given.get("tp_size"), device)
    world = dist.get_world_size()
    stages = _number(function, "pp_size", given.get("pp_size", 1))
    tensor = _number(function, "tp_size", given.get("tp_size", max(1, world // stages)))
    if world % (tensor * stages):
        raise ValueError(
            f"{function}: tp_size {tensor} times pp_size {stages} must divide the number of ranks,"
            f" got {world}"
        )
    shape = (world // (tensor * stages), stages, tensor)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "pipeline", "tensor"))
    return Division(_split_of(mesh, "tensor"), _split_of(mesh, "pipeline"), device)


def _read_config(function: str, config: Any) -> dict[str, Any]:
    values = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    wanted = {name: values.pop(name, None) for name in ("tp_size", "tp_plan", "pp_size")}
    others = {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and value not in (None, False, 1) and name.endswith("_size")
    }
    if others:
        raise ValueError(
            f"{function}: distributed_config may have tp_size, tp_plan 'auto' and pp_size, got"
            f" {others}: for training, `comemo train` shards by its own settings"
        )
    return {name: value for name, value in wanted.items() if value is not None}


def _number(function: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{function}: {name} must be a positive number of ranks, got {value!r}")
    return value


def _of_mesh(function: str, mesh: Any, size: Any, device: torch.device) -> Division:
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "tp" not in names:
        raise ValueError(f"{function}: device_mesh must have a dimension 'tp', got {names}")
    if mesh.ndim > 1:
        mesh = mesh["tp"]
    if size not in (None, mesh.size()):
        raise ValueError(
            f"{function}: tp_size must be that of device_mesh, {mesh.size()}, got {size}"
        )
    return Division(_split_of(mesh), None, device)


def _split_of(mesh: DeviceMesh, name: str | None = None) -> Split | None:
    group = mesh.get_group(name) if name else mesh.get_group()
    size = dist.get_world_size(group)
    return Split(group, dist.get_rank(group), size) if size > 1 else None


def join(function: str) -> torch.device:
    """The device of this rank, in a process group that is made if there is none.

    Args:
        function: the name that the error begins with.

    Raises:
        ValueError: neither a process group nor the variables of torchrun.
    """
    complete_environment()
    device = device_of_rank(int(os.environ.get("LOCAL_RANK", "0")))
    if device.type not in BACKENDS:  # without collectives, such as Apple's GPUs
        device = torch.device("cpu")
    if not dist.is_initialized():
        if "RANK" not in os.environ:
            raise ValueError(
                f"{function}: a model that ranks divide must be loaded by all of them, started as"
                " torchrun --nproc-per-node N, got a single process"
            )
        dist.init_process_group(BACKENDS[device.type])
    return device
