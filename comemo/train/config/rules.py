"""The valid values of the settings of training, one by one: types, ranges, choices."""

import dataclasses
import difflib
import functools
import math
import re
import types
from collections.abc import Callable
from typing import Any, Union, get_args, get_origin, get_type_hints

from comemo.images import MAX_TILES
from comemo.safety.settings import shorten
from comemo.train.settings import (
    AnswerSettings,
    DataSettings,
    LoraSettings,
    ParallelSettings,
    StageSettings,
    StartSettings,
    TrainSettings,
)

SECTIONS: dict[str, type] = {
    "start": StartSettings,
    "data": DataSettings,
    "answers": AnswerSettings,
    "parallel": ParallelSettings,
}
PARTS = ("vision", "projector", "mixin", "language")
EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
NOTHING = ("None", "none", "null", "~")  # on a command line

Rule = tuple[str, Callable[[Any], bool]]  # what is wanted, and a test of a converted value


def _whole(low: int, high: float = math.inf) -> Rule:
    limit = f" and at most {high:,}" if high < math.inf else ""
    return f"a whole number, at least {low}{limit}", lambda value: low <= value <= high


def _number(low: float, below: float = math.inf, above: bool = False) -> Rule:
    limit = f" and below {below:g}" if below < math.inf else ""

    def fits(value: float) -> bool:
        return (low < value if above else low <= value) and value < below

    return f"a number {'above' if above else 'of at least'} {low:g}{limit}", fits


def _one_of(*choices: str) -> Rule:
    return f"one of {', '.join(choices)}", lambda value: value in choices


def _is_mixing(value: Any) -> bool:
    if isinstance(value, dict):
        weights = list(value.values())
        numbers = all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in weights)
        return numbers and all(0 <= w < math.inf for w in weights) and any(weights)
    return isinstance(value, str) and value in ("length", "sqrt")


def _are_parts(value: tuple[str, ...]) -> bool:
    return len(set(value)) == len(value) and set(value) <= set(PARTS)


def _are_betas(value: tuple[float, ...]) -> bool:
    return len(value) == 2 and all(0 <= beta < 1 for beta in value)


def _is_warmup(value: float) -> bool:
    return 0 <= value < 1 or (value >= 1 and value == int(value))


def _are_questions(value: Any) -> bool:
    return all(map(_is_question, value))


def _is_question(item: Any) -> bool:
    if not isinstance(item, dict) or not {"question"} <= item.keys() <= {"question", "image"}:
        return False
    shown = item.get("image")
    shown = shown if isinstance(shown, list) else [] if shown is None else [shown]
    texts = [item["question"], *shown]
    return all(isinstance(text, str) and text.strip() for text in texts)


_TEXT: Rule = ("a text that is not empty", lambda value: bool(value.strip()))
_SHARE = _number(0, 1)

RULES: dict[str, Rule] = {
    "output": ("a directory", lambda value: "\0" not in value),
    "preset": _one_of("script", "paper"),
    "run": ("names of stages, each once", lambda value: len(set(value)) == len(value)),
    "seed": _whole(0, 2**63 - 1),
    "device": _one_of("auto", "cpu", "cuda"),
    **{f"start.{name}": _TEXT for name in ("checkpoint", "vision", "language", "tokenizer")},
    "start.projector": _TEXT,
    "data.eval": _TEXT,
    "data.root": _TEXT,
    "data.max_tokens": _whole(2),
    "data.max_tiles": _whole(1),
    "data.buffer": _whole(1),
    "data.max_sample_tokens": _whole(2),
    "data.too_long": _one_of("cut", "refuse"),
    "data.bad_data": _one_of("skip", "stop"),
    "data.mixing": (
        "length, sqrt, or a weight of at least 0 for each dataset, not all of them 0",
        _is_mixing,
    ),
    "data.loss_weight": _one_of("token", "sample", "square"),
    "data.max_dynamic_patch": _whole(1, MAX_TILES),
    "data.min_dynamic_patch": _whole(1, MAX_TILES),
    "data.min_frames": _whole(1),
    "data.max_frames": _whole(1),
    "data.workers": _whole(0, 1024),
    "answers.every": _whole(0),
    "answers.ask": (
        "a list of questions, each {question: text} or {question: text, image: path or paths}",
        _are_questions,
    ),
    "answers.max_new_tokens": _whole(1),
    "parallel.plan": _one_of("ddp", "fsdp"),
    "parallel.tensor": _whole(1),
    "parallel.replicas": _whole(1),
    "parallel.checkpoints": _one_of("full", "sharded"),
    "parallel.context": _whole(1),
    "stage.train": (f"some of {', '.join(PARTS)}, each once", _are_parts),
    "stage.steps": _whole(1),
    "stage.epochs": _number(0, above=True),
    "stage.packs_per_step": _whole(1),
    "stage.learning_rate": _number(0),
    "stage.schedule": _one_of("constant", "cosine"),
    "stage.warmup": ("a share of the steps below 1, or a whole number of steps", _is_warmup),
    "stage.weight_decay": _number(0),
    "stage.betas": ("two numbers from 0 to below 1", _are_betas),
    "stage.eps": _number(0, above=True),
    "stage.max_grad_norm": _number(0),
    "stage.drop_path": _SHARE,
    "stage.neftune_alpha": _number(0, above=True),
    "stage.precision": _one_of("auto", "float32", "bfloat16"),
    "stage.save_every": _whole(1),
    "stage.keep": _whole(1),
    "stage.eval_every": _whole(0),
    "stage.log_every": _whole(1),
    "stage.spike": ("0 for never, or a number above 1", lambda value: value == 0 or value > 1),
    **{f"stage.lora.{name}": _whole(0) for name in ("vision", "language", "mixin")},
    "stage.lora.alpha": _number(0, above=True),
    "stage.lora.dropout": _SHARE,
}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping of names to values",
    list: "a list",
    tuple: "a list",
}


@functools.cache
def kinds(settings: type) -> dict[str, Any]:
    """Name of each field of a class of settings -> its type."""
    hints = get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def shown(path: tuple[str, ...]) -> str:
    """A full name as users write it: `stages.*.x`, of every stage that runs, is `x`."""
    return ".".join(path[2:] if path[:2] == ("stages", "*") else path)


def rule_name(path: tuple[str, ...]) -> str:
    """The key in `RULES` of a full name: `stages.NAME.x` is `stage.x`."""
    return ".".join(("stage", *path[2:]) if path[0] == "stages" else path)


def kind_of(path: tuple[str, ...]) -> Any:
    """The type of a setting by its full name, as parts.

    Raises:
        LookupError: there is none of this name.
    """
    if path[0] == "stages" and len(path) == 3 and path[2] != "lora":
        return kinds(StageSettings)[path[2]]
    if path[0] == "stages" and len(path) == 4 and path[2] == "lora":
        return kinds(LoraSettings)[path[3]]
    if path[0] in SECTIONS and len(path) == 2:
        return kinds(SECTIONS[path[0]])[path[1]]
    if len(path) == 1 and path[0] not in (*SECTIONS, "stages"):
        return kinds(TrainSettings)[path[0]]
    raise LookupError(".".join(path))


def convert(path: tuple[str, ...], value: Any, text: str | None = None) -> Any:
    """The value of a setting in its type.

    Args:
        path: full name, as parts.
        value: as YAML has it. `1e-4`, which YAML reads as a text, is a number; true is none.
        text: the word of a command line that it was read from.

    Raises:
        ValueError: not of this type, or against its rule. The message has the full name, what is
            wanted and what was given.
    """
    kind = kind_of(path)
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if type(None) in options:
        if value is None or text in NOTHING:
            return None
        (kind,) = (option for option in options if option is not type(None))
    wanted, fits = RULES.get(rule_name(path), (_KINDS.get(get_origin(kind) or kind), anything))
    try:
        converted = _as_kind(kind, value, text)
        if fits(converted):
            return converted
    except (TypeError, ValueError, OverflowError):
        pass
    wanted = f"null or {wanted}" if type(None) in options else wanted
    got = text if text is not None and not isinstance(value, str) else value
    raise ValueError(f"{shown(path)} must be {wanted}, got {shorten(got)}")


def anything(value: Any) -> bool:
    return True


def _as_kind(kind: Any, value: Any, text: str | None) -> Any:
    """Raises TypeError or ValueError for a value of another kind."""
    if kind is Any:
        return _with_numbers(value)
    if kind is str and text is not None:
        return text
    if kind in (int, float):
        return _as_number(kind, value)
    origin = get_origin(kind) or kind
    if origin is tuple:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        item = get_args(kind)[0]
        return tuple(_as_kind(item, entry, None) for entry in value)
    if not isinstance(value, origin):
        raise TypeError
    return {name: _with_numbers(own) for name, own in value.items()} if origin is dict else value


def _with_numbers(value: Any) -> Any:
    """A value of any kind, where `1e4`, which YAML reads as a text, is a number."""
    if isinstance(value, dict):
        return {name: _with_numbers(own) for name, own in value.items()}
    return float(value) if isinstance(value, str) and EXPONENT.fullmatch(value) else value


def _as_number(kind: type, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    if kind is int and isinstance(value, int):
        return value
    number = float(value)
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise ValueError
    return kind(number)


def suggest(name: str, known: Any) -> str:
    """`: did you mean ...?` for a name that is close to known ones, else an empty text."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.7)
    return f": did you mean {' or '.join(near)}?" if near else ""
