"""How the ranks of a run share its model and its data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from comemo.parallel.split import Split
from comemo.parallel.tensor import check_divisible
from comemo.train import ranks
from comemo.train.settings import ParallelSettings


@dataclass(frozen=True)
class Sharing:
    """The place of this rank in a run.

    Ranks that divide layers are next to each other and read the same packs.

    Attributes:
        tensor: number of ranks that divide each layer.
        layers: mesh over which FSDP divides the weights of decoder layers, which `split` may have
            divided already; None if each rank has whole weights.
        rest: mesh for all other weights: all ranks.
        columns: mesh of the ranks that divide each layer, and `split` the same ranks, or None.
    """

    tensor: int = 1
    layers: DeviceMesh | None = None
    rest: DeviceMesh | None = None
    columns: DeviceMesh | None = None
    split: Split | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether no rank has whole weights: all ranks must then call the model together."""
        return self.layers is not None

    @property
    def readers(self) -> int:
        """Number of ranks that read different packs."""
        return ranks.world_size() // self.tensor

    @property
    def reader(self) -> int:
        """Index of this rank among them."""
        return ranks.rank() // self.tensor

    def gather(self, value: Any) -> list[Any]:
        """The values of all readers, in their order, on each rank; see `ranks.gather`."""
        return ranks.gather(value)[:: self.tensor]


def share(settings: ParallelSettings, device: torch.device) -> Sharing:
    """Find the place of this rank; all ranks call.

    Args:
        settings: of the run.
        device: of this rank.

    Raises:
        ValueError: numbers that do not divide the number of ranks.
    """
    check_ranks(settings, ranks.world_size())
    if settings.plan != "fsdp" or not dist.is_initialized():
        return Sharing()
    world, tensor, replicas = ranks.world_size(), settings.tensor, settings.replicas
    shards = world // (tensor * replicas)
    names = ("replicas", "shards", "tensor")
    mesh = init_device_mesh(device.type, (replicas, shards, tensor), mesh_dim_names=names)
    rest = init_device_mesh(
        device.type, (replicas, shards * tensor), mesh_dim_names=("replicas", "shards")
    )
    of_layers = mesh["replicas", "shards"] if replicas > 1 else mesh["shards"]
    rest = rest if replicas > 1 else rest["shards"]
    if tensor == 1:
        return Sharing(tensor, of_layers, rest)
    columns = mesh["tensor"]
    group = columns.get_group()
    split = Split(group, dist.get_rank(group), tensor, sharded=True)
    return Sharing(tensor, of_layers, rest, columns, split)


def check_ranks(settings: ParallelSettings, world: int) -> None:
    """Raise unless the numbers of a plan divide the number of ranks.

    Raises:
        ValueError: with the numbers.
    """
    parts = settings.tensor * settings.replicas
    if world % parts:
        raise ValueError(
            f"train: parallel.tensor {settings.tensor} times parallel.replicas {settings.replicas}"
            f" must divide the number of ranks, got {world}"
        )
    if settings.offload and world == 1:
        raise ValueError(
            "train: parallel.offload must be false for one process, which keeps its weights whole"
        )


def check_model(sharing: Sharing, config: Any) -> None:
    """Refuse a model whose layers the ranks of a plan cannot divide.

    Raises:
        ValueError: see `check_divisible`.
    """
    if sharing.tensor > 1:
        check_divisible("train: parallel.tensor", config, sharing.tensor)
