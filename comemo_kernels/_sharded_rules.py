"""Which public operations are exact when their arguments are split among ranks, and how.

A split is a table: the dimension of each argument that the ranks of a mesh dimension share out, and
that of each result. Nothing communicates, so only splits are listed in which the results of a rank
follow from its own parts: by rows, by heads, by features of a weight. Where the features that a
product sums over are split, results are terms of a sum, and a residual must be in one of them only.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

Arguments = dict[str, Any]


class Place(Enum):
    """How ranks hold a tensor of which they do not split a dimension."""

    WHOLE = "each rank has all of it"
    ONCE = "it is one of the terms of a result: the whole of it must count on one rank only"
    PARTIAL = "each rank has a term of the sum"
    HALVES = "dimension 0 is keys, then values, and both are split"


Parts = Mapping[str, int | Place]  # by argument or part of one: the dimension that is split, or how


class Split(NamedTuple):
    """One exact way to split a call among the ranks of a mesh dimension.

    Attributes:
        args: argument, or part of one -> the dimension that is split, ONCE or HALVES; the others
            are whole.
        results: for each result the dimension that is split, PARTIAL or WHOLE.
        lead: argument whose rows are split, evenly or not; "" if all parts must be equal.
        counts: arguments that are numbers of what is split.
        instead: computes the same from the same arguments by other operations, which it finds among
            the names of the operation's file; None: the operation runs on local tensors.
    """

    args: Parts
    results: tuple[int | Place, ...] = (0, 0)
    lead: str = ""
    counts: tuple[str, ...] = ()
    instead: Callable[[Mapping[str, Any], Arguments], Any] | None = None


UNSPLIT = Split({}, (Place.WHOLE, Place.WHOLE))


def _rows(names: Parts, rows: int, maybe: dict[str, tuple[Tensor | None, int]]) -> Split:
    """Split by rows, in which the first of `names` leads.

    Args:
        names: arguments with the dimension that is split; that of the first is that of the results.
        rows: their number.
        maybe: more arguments with that dimension; those with one row for all rows stay whole.
    """
    more = {
        name: dim
        for name, (t, dim) in maybe.items()
        if t is not None and -t.ndim <= dim < t.ndim and (t.shape[dim] != 1 or rows == 1)
    }
    lead, dim = next(iter(names.items()))
    return Split({**names, **more}, (dim, dim), lead)


def _leading(lead: Tensor, *names: str) -> list[Split]:
    """Split by each dimension of `names` but the last; `lead` is the first of them."""
    return [_rows(dict.fromkeys(names, i), lead.shape[i], {}) for i in range(lead.ndim - 1)]


def _refuse_written(verb: str, args: Arguments, *names: str) -> None:
    """Raise ValueError for an argument that asks to write into tensors."""
    for name in names:
        if args[name] is not None and (name != "inplace" or args[name]):
            raise ValueError(
                f"{verb}: {name} must be {'False' if name == 'inplace' else 'None'} beside a"
                " DTensor, which is not written in place: pass local tensors (.to_local())"
            )


def _apply_rotary(args: Arguments) -> list[Split]:
    _refuse_written("apply_rotary", args, "inplace")
    q, positions, splits = args["q"], args["positions"], [Split({"q": -2, "k": -2}, (-2, -2))]
    for i in range(q.ndim - 2):
        if positions is None:
            maybe = {"cos": (args["cos"], i), "sin": (args["sin"], i)}
        elif isinstance(positions, Tensor):
            maybe = {"positions": (positions, i)}
        else:
            continue  # grids have the places of images in the whole sequence
        splits.append(_rows({"q": i, "k": i}, q.shape[i], maybe))
    return splits


def _attend(args: Arguments, rows: tuple[str, ...], heads: Parts) -> list[Split]:
    """Splits of attention, with further arguments that are split by rows and by heads."""
    q, k, rotation = args["q"], args["k"], args["rotation"]
    if q.ndim != 4 or k.ndim != 3:
        return []
    splits = []
    for i in (0, 1):
        maybe = {"spans": (args["spans"], i)}
        if rotation is not None:
            maybe["rotation.positions"] = (rotation.positions, i)
            if i == 0:
                maybe["rotation.biases"] = (rotation.biases, 0)
        splits.append(_rows(dict.fromkeys(("q", *rows), i), q.shape[i], maybe))
    results: tuple[int | Place, ...] = (Place.PARTIAL,) if heads else (2, 2)
    if k.shape[1] == 1:  # every query head reads the one key head
        splits.append(Split({"q": 2, **heads}, results))
    memory: Parts = {"k": 1, "v": 1, "scales.keys": 1, "scales.values": 1}
    splits.append(Split({"q": 2, **memory, **heads}, results))
    return splits


def _attend_spans(args: Arguments) -> list[Split]:
    _refuse_written("attend_spans", args, "workspace")
    return _attend(args, (), {})


def _attend_gated(args: Arguments) -> list[Split]:
    return _attend(args, ("x",), {"x": Place.ONCE, "weight": 1})


def _norm_linear(args: Arguments) -> list[Split]:
    return [*_leading(args["x"], "x"), Split({"weight": 0}, (-1,))]


def _norm_swiglu(args: Arguments) -> list[Split]:
    return [*_leading(args["x"], "x"), Split({"gate_weight": 0, "up_weight": 0}, (-1,))]


def _gated_residual(args: Arguments) -> list[Split]:
    features: Parts = {"x": Place.ONCE, "a": -1, "weight": 1}
    return [
        *_leading(args["x"], "x", "a"),
        Split({"x": -1, "weight": 0}, (-1,)),
        Split(features, (Place.PARTIAL,)),
    ]


def _gated_swiglu(args: Arguments) -> list[Split]:
    features: Parts = {"gate_weight": 0, "up_weight": 0, "down_weight": 1}
    return [*_leading(args["x"], "x"), Split(features, (Place.PARTIAL,), instead=_swiglu_in_two)]


def _swiglu_in_two(names: Mapping[str, Any], args: Arguments) -> Any:
    """Each rank needs all of x for the norm, but the residual must count once: two operations."""
    x, norm_weight, gate_weight, up_weight, down_weight, gate, eps, recompute = args.values()
    weights = (norm_weight, gate_weight, up_weight)
    names["check_gated_swiglu"](x, *weights, down_weight, gate, recompute)
    wide = names["norm_swiglu"](x, *weights, eps)
    return names["gated_residual"](x, wide, down_weight, gate)


def _project_memory(args: Arguments) -> list[Split]:
    rows = _rows({"media": 0, "ids": 0}, 0, {})
    return [rows, Split({"kv_weights": Place.HALVES}, (1, 1), counts=("heads",))]


def _build_memory(args: Arguments) -> list[Split]:
    held: Parts = {"keys": 1, "values": 1, "scales.keys": 1, "scales.values": 1}
    return [Split({"kv_weights": Place.HALVES, **held})]


def _project_tiles(args: Arguments) -> list[Split]:
    _refuse_written("project_tiles", args, "media", "embeds", "rows")
    return [Split({"tokens": 0}, (0,), "tokens")]


RULES: dict[str, Callable[[Arguments], list[Split]]] = {
    "apply_rotary": _apply_rotary,
    "attend_gated": _attend_gated,
    "attend_spans": _attend_spans,
    "build_memory": _build_memory,
    "gated_residual": _gated_residual,
    "gated_swiglu": _gated_swiglu,
    "norm_linear": _norm_linear,
    "norm_swiglu": _norm_swiglu,
    "project_memory": _project_memory,
    "project_tiles": _project_tiles,
}
