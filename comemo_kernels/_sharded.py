"""Public operations on DTensors: each rank computes its part, without communication.

A split from `_sharded_rules` is chosen for each dimension of the mesh. The operation runs on local
tensors, with gradients, and its results are DTensors again. What no split allows is refused: by
itself DTensor would gather whole weights for PyTorch's products, and has no rule for a kernel.
The gradient of a tensor that is split is split; that of one that is whole while others are split is
a term of a sum (Partial), as in DTensor's own operations. Only that of a leaf is summed: optimizers
of torch 2.6 (SGD with momentum), and its clipping, compute with the terms of each rank alone.

`register_sharding` would cover only the operators: neither the products of PyTorch between them nor
the references, and it gathers where placements do not fit.

This file is imported once there is a DTensor: not every build of PyTorch has them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, placement_types

from comemo_kernels._sharded_rules import RULES, UNSPLIT, Place, Split

Found = dict[str, Tensor]  # by path, for example "rotation.cos" or "kv_weights[1]"

_Strided: Any = getattr(placement_types, "_StridedShard", None)  # not public
_LISTS = (list, tuple, nn.ParameterList)


@torch.compiler.disable  # it looks into containers and placements: for a graph a break
def call(function: Any, values: tuple[Any, ...]) -> Any:
    """Call a public function with DTensors among its arguments.

    Raises:
        ValueError: naming the function and the argument: no rule for the function, or none for
            these placements; tensors of several meshes; a dimension that cannot be split equally.
    """
    args = dict(zip(signature(function).parameters, values, strict=True))
    call = _Call(function.__qualname__, args)
    for split in call.splits:
        if split.instead is not None:
            return split.instead(function.__globals__, args)
    result = function(*(call.local(name, value) for name, value in args.items()))
    if not isinstance(result, tuple):
        return call.wrap(result, 0)
    return tuple(call.wrap(part, i) for i, part in enumerate(result))


def check(function: Any, values: tuple[Any, ...]) -> None:
    """Raise the ValueError of `call` for DTensors in containers, if there are any."""
    args = dict(zip(signature(function).parameters, values, strict=True))
    if any(holds(value) for value in values):
        _Call(function.__qualname__, args)


def holds(value: Any) -> bool:
    """Whether an argument is or contains a DTensor."""
    return any(isinstance(t, DTensor) for _, t in _tensors("", value))


# --- arguments ---


def _parts(value: Any) -> list[tuple[str, Any]]:
    if hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    return [(f"[{i}]", x) for i, x in enumerate(value)] if isinstance(value, _LISTS) else []


def _tensors(path: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    for suffix, part in _parts(value):
        yield from _tensors(path + suffix, part)


def _changed(path: str, value: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    """An argument with `change(path, tensor)` for each of its tensors."""
    if isinstance(value, Tensor):
        return change(path, value)
    parts = {suffix: _changed(path + suffix, part, change) for suffix, part in _parts(value)}
    if hasattr(value, "_fields"):
        return type(value)(*parts.values())
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{suffix[1:]: part for suffix, part in parts.items()})
    return list(parts.values()) if isinstance(value, _LISTS) else value


def _may_be_plain(path: str, t: Tensor) -> bool:
    """Whether a plain tensor may stand for one that is whole: integers, tables of angles."""
    is_table = path.rpartition(".")[2] in ("cos", "sin")
    return is_table or not t.is_floating_point()


# --- placements ---


def _wanted(path: str, split: Split) -> int | Place:
    return split.args.get(re.sub(r"\[.*?\]", "", path), Place.WHOLE)


def _placement(wanted: int | Place, t: Tensor) -> Placement:
    if isinstance(wanted, int):
        return Shard(wanted % max(t.ndim, 1))
    if wanted is Place.PARTIAL:
        return Partial()
    return _Strided(0, split_factor=2) if wanted is Place.HALVES and _Strided else Replicate()


def _fits(t: Tensor, wanted: int | Place, mesh_dim: int) -> bool:
    if not isinstance(t, DTensor):
        return wanted is Place.WHOLE
    held = t.placements[mesh_dim]
    if wanted is Place.HALVES:
        known = _Strided is not None and isinstance(held, _Strided)
        return known and (held.dim, held.split_factor) == (0, 2)
    if wanted is Place.ONCE and type(held) is Partial:
        return held.reduce_op == "sum"
    wanted = _placement(wanted, t)
    return type(held) is type(wanted) and held == wanted


class _Local(torch.autograd.Function):
    """The part of a DTensor on this rank, or zeros in its place; its gradient has `placements`.

    `DTensor.to_local` takes the parts of all ranks for equal. If they are not, torch 2.6 gathers
    the gradient of a leaf, on some ranks only.
    """

    @staticmethod
    def forward(ctx, t, placements, absent):
        ctx.layout, ctx.is_summed = (t.device_mesh, placements, t.shape), t.is_leaf
        local = t.to_local()
        if hasattr(local, "wait"):  # a collective of the operation before, which still runs
            local = local.wait()
        return torch.zeros_like(local) if absent else local.view_as(local)

    @staticmethod
    def backward(ctx, dy):
        dt, (_, placements, _) = _from_local(dy, *ctx.layout), ctx.layout
        if ctx.is_summed and any(type(p) is Partial for p in placements):
            dt = dt.redistribute(
                placements=[Replicate() if type(p) is Partial else p for p in placements]
            )
        return dt, None, None


def _from_local(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Placement], shape: Sequence[int]
) -> DTensor:
    """The tensor of `shape` whose part is `local`, dense, its dimensions in the order of those."""
    stride, step = [0] * local.ndim, 1
    for dim in sorted(range(local.ndim), key=lambda dim: (local.stride(dim), -dim)):
        stride[dim], step = step, step * max(shape[dim], 1)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )


class _Call:
    """A call of a public function: the split for each dimension of its mesh."""

    def __init__(self, verb: str, args: dict[str, Any]) -> None:
        self.verb = verb = verb.removesuffix(".__init__")
        self.found: Found = {
            path: t for name, value in args.items() for path, t in _tensors(name, value)
        }
        path, first = next((p, t) for p, t in self.found.items() if isinstance(t, DTensor))
        if verb not in RULES:
            raise ValueError(
                f"{verb}: {path} must be a plain tensor, because {verb} has no rule for a DTensor,"
                f" got one with placements {first.placements}: pass {path}.to_local()"
            )
        self.mesh = first.device_mesh
        for other, t in self.found.items():
            if not isinstance(t, DTensor):
                if t.requires_grad or not _may_be_plain(other, t):
                    raise ValueError(
                        f"{verb}: {other} must be a DTensor like {path}, which has placements"
                        f" {first.placements}, got a plain tensor: distribute it, or pass"
                        f" {path}.to_local()"
                    )
            elif t.device_mesh != self.mesh:
                raise ValueError(
                    f"{verb}: {other} must be on the mesh of {path}, {self.mesh}, got placements"
                    f" {t.placements} on {t.device_mesh}"
                )
        coordinate = self.mesh.get_coordinate()
        if coordinate is None:
            raise ValueError(
                f"{verb}: {path}, with placements {first.placements}, must be on a mesh that has"
                f" this rank, got {self.mesh}"
            )
        self.coordinate: list[int] = coordinate
        known = [*RULES[verb](args), UNSPLIT]
        self.splits = [self._choose(known, j) for j in range(self.mesh.ndim)]
        self.counts = self._count(args)

    # --- choice ---

    def _choose(self, known: list[Split], mesh_dim: int) -> Split:
        """The split that fits all arguments, on one dimension of the mesh."""
        nearest: list[tuple[bool, int, int, str, Split]] = []
        for split in known:
            misfits = [
                path
                for path, t in self.found.items()
                if not _fits(t, _wanted(path, split), mesh_dim)
            ]
            if not misfits:
                return split
            # The split that the first argument fits is the one that was meant.
            is_meant = misfits[0] != next(iter(self.found))
            nearest.append((not is_meant, len(misfits), len(nearest), misfits[0], split))
        *_, path, split = min(nearest)
        raise self._refusal(path, _wanted(path, split), mesh_dim)

    def _refusal(self, path: str, wanted: int | Place, mesh_dim: int) -> ValueError:
        t, names = self.found[path], self.mesh.mesh_dim_names
        placements: list[Placement] = [Replicate()] * self.mesh.ndim
        got = "a plain tensor, which is taken for whole"
        if isinstance(t, DTensor):
            placements, got = list(t.placements), f"placements {t.placements}"
        placements[mesh_dim] = _placement(wanted, t)
        named = f" ({names[mesh_dim]!r})" if names else ""
        return ValueError(
            f"{self.verb}: {path} must be a DTensor with {placements[mesh_dim]!r} on dimension"
            f" {mesh_dim}{named} of the mesh, beside the other arguments, got {got}: redistribute"
            f" it to {placements}, or pass local tensors (.to_local())"
        )

    def _count(self, args: dict[str, Any]) -> dict[str, int]:
        """Arguments that are numbers, for one rank; ValueError where ranks would differ."""
        counts: dict[str, int] = {}
        for split, ranks in zip(self.splits, self.mesh.shape, strict=True):
            for name in split.counts:
                counts[name] = counts.get(name, 1) * ranks
        for name, ranks in counts.items():
            self._check_multiple(name, args[name], ranks)
        for path, t in self.found.items():
            parts = [1] * t.ndim
            for split, ranks in zip(self.splits, self.mesh.shape, strict=True):
                dim = _wanted(path, split)
                if split.lead:
                    self._check_rows(path, t, split)
                elif isinstance(dim, int):
                    parts[dim] *= ranks
            for dim, ranks in enumerate(parts):
                self._check_multiple(f"dimension {dim} of {path}", t.shape[dim], ranks)
            if [_wanted(path, split) for split in self.splits].count(Place.HALVES) > 1:
                raise ValueError(
                    f"{self.verb}: {path} must be split on one dimension of the mesh, got"
                    f" placements {self.found[path].placements}"
                )
        return {name: args[name] // ranks for name, ranks in counts.items()}

    def _check_rows(self, path: str, t: Tensor, split: Split) -> None:
        """Raise ValueError on all ranks: their parts may be equal on some of them by chance."""
        dim, lead_dim = _wanted(path, split), _wanted(split.lead, split)
        if isinstance(dim, int) and isinstance(lead_dim, int):
            rows = self.found[split.lead].shape[lead_dim]
            if t.shape[dim] != rows:
                raise ValueError(
                    f"{self.verb}: dimension {dim} of {path} must be {rows}, like that of"
                    f" {split.lead}, got {t.shape[dim]}"
                )

    def _check_multiple(self, what: str, size: int, ranks: int) -> None:
        if size % ranks:
            raise ValueError(
                f"{self.verb}: {what} must be a multiple of {ranks}, the ranks that split it, got"
                f" {size}: redistribute to Replicate(), or pass local tensors (.to_local())"
            )

    # --- local tensors ---

    def local(self, name: str, value: Any) -> Any:
        """An argument of the function on this rank."""
        return _changed(name, self.counts.get(name, value), self._local)

    def _local(self, path: str, t: Tensor) -> Tensor:
        if not isinstance(t, DTensor):
            return t
        grads, absent = list(t.placements), False
        for j, split in enumerate(self.splits):
            place = _wanted(path, split)
            if place is Place.ONCE:
                absent |= grads[j].is_replicate() and self.coordinate[j] > 0
                grads[j] = Replicate()
            elif place is Place.WHOLE and split.args:
                grads[j] = Partial()
        return _Local.apply(t, grads, absent)

    def wrap(self, value: Any, i: int) -> Any:
        """Result `i` of the function, or tensors that are it together."""
        if isinstance(value, tuple):
            return tuple(self.wrap(part, i) for part in value)
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        for split, ranks in zip(self.splits, self.mesh.shape, strict=True):
            dim = split.results[i]
            if isinstance(dim, int):
                lead = self.found.get(split.lead)
                shape[dim] = shape[dim] * ranks if lead is None else lead.shape[dim]
        placements = [_placement(split.results[i], value) for split in self.splits]
        return _from_local(value, self.mesh, placements, shape)
