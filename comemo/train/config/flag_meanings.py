"""What a flag of another trainer can mean here: settings of ours, no effect, or a refusal."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from comemo.config import MixinConfig
from comemo.safety.regular import read_json
from comemo.safety.settings import shorten
from comemo.train.config.rules import shown

Path = tuple[str, ...]


class Given(NamedTuple):
    """A value and, if it is from a command line, its word."""

    value: Any
    text: str | None = None


class Meaning(NamedTuple):
    """What an old name means here: settings of ours by full name, and a note for the user."""

    settings: dict[Path, Given]
    note: str


Reader = Callable[[Given], Meaning]


PLAN: Path = ("parallel", "plan")
OFFLOAD: Path = ("parallel", "offload")


def stage(*names: str) -> Path:
    """Full name of a setting of every stage that runs."""
    return ("stages", "*", *names)


def renamed(*path: str) -> Reader:
    return lambda given: Meaning({path: given}, f"is called {shown(path)} here")


def unused(why: str, values: tuple[Any, ...] | None = None, otherwise: str = "") -> Reader:
    """Without effect: for these values only, or for all."""

    def read(given: Given) -> Meaning:
        if values is not None and not any(_same(given.value, value) for value in values):
            raise ValueError(f"got {shorten(given.value)}: {otherwise or why}")
        return Meaning({}, f"has no effect: {why}")

    return read


def _same(value: Any, other: Any) -> bool:
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def refused(why: str, unless: tuple[Any, ...] = (None, False, "", 0, 0.0)) -> Reader:
    return unused("it is off here too", unless, why)


def flag(given: Given) -> bool:
    if not isinstance(given.value, bool):
        raise ValueError(f"must be true or false, got {shorten(given.value)}")
    return given.value


def switch(path: Path, on: Any, off: Any) -> Reader:
    """true and false become two values of one setting."""

    def read(given: Given) -> Meaning:
        value = on if flag(given) else off
        return Meaning({path: Given(value)}, f"is {shown(path)}: {word(value)} here")

    return read


def mapped(path: Path, values: Mapping[Any, dict[Path, Any]], otherwise: str) -> Reader:
    """Each value becomes settings."""

    def read(given: Given) -> Meaning:
        for value, settings in values.items():
            if _same(given.value, value):
                texts = [f"{shown(name)}: {word(new)}" for name, new in settings.items()]
                note = f"is {', '.join(texts)} here" if texts else f"is decided by {shown(path)}"
                return Meaning({name: Given(new) for name, new in settings.items()}, note)
        raise ValueError(f"got {shorten(given.value)}: {otherwise}")

    return read


def word(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def read_deepspeed(given: Given) -> Meaning:
    """A configuration of DeepSpeed, its file, or a name that has the ZeRO stage in it."""
    config, name = given.value, str(given.value)
    if config in (None, "", False):
        return Meaning({}, "has no effect: nothing is sharded unless shard_optimizer is true")
    zero: Any = None
    if isinstance(config, str) and config.endswith(".json"):
        try:
            config = read_json(config)
        except (OSError, ValueError):  # the published scripts name a file that came elsewhere
            config = None
    if isinstance(config, dict):
        part = config.get("zero_optimization", {})
        zero = part.get("stage", 0) if isinstance(part, dict) else None
    else:
        digits = [
            n for n in range(4) for word in ("stage", "stage_", "zero") if f"{word}{n}" in name
        ]
        zero = digits[0] if len(set(digits)) == 1 else None
    if zero == 3:
        return Meaning({PLAN: Given("fsdp")}, "is parallel.plan: fsdp here (ZeRO-3)")
    if zero not in (0, 1):
        raise ValueError(
            f"got {shorten(given.value)}: DeepSpeed is not used: shard_optimizer: true is ZeRO-1,"
            " and parallel.plan: fsdp is ZeRO-3"
        )
    value = zero == 1
    return Meaning(
        {("shard_optimizer",): Given(value)},
        f"is shard_optimizer: {word(value)} here (ZeRO-{zero})",
    )


def read_fsdp(given: Given) -> Meaning:
    """The words of transformers' `fsdp`, or true."""
    value = given.value
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else []
    if value is True or (words and set(words) <= {"full_shard", "auto_wrap", "offload"}):
        found = {PLAN: Given("fsdp")}
        if "offload" in words:
            found[OFFLOAD] = Given(True)
        return Meaning(found, "is parallel.plan: fsdp here (FSDP2)")
    if value in (None, False, "", []):
        return Meaning({}, "has no effect: parallel.plan says how ranks share the model")
    raise ValueError(
        f"got {shorten(value)}: parallel.plan fsdp is full_shard; parallel.replicas is hybrid_shard"
    )


def read_mixin(given: Given) -> Meaning:
    """The file, or the directory with a `config.json`, of the mixin layers' sizes."""
    path = given.text or str(given.value)
    if os.path.isdir(path):
        path = os.path.join(path, "config.json")
    try:
        content = read_json(path)
    except OSError as error:
        raise ValueError(f"got {path!r}: {error.strerror}") from error
    if not isinstance(content, dict):
        raise ValueError(f"got {path!r}, which must hold a JSON object")
    sizes = {name: content[name] for name in MixinConfig.__annotations__ if name in content}
    note = "is start.model.mixin_config here, with the sizes of that file"
    return Meaning({("start", "model"): Given({"mixin_config": sizes})}, note)


def model(name: str) -> Reader:
    return lambda given: Meaning(
        {("start", "model"): Given({name: given.value})}, f"is start.model.{name} here"
    )


def read_reports(given: Given) -> Meaning:
    names = given.value if isinstance(given.value, list) else [given.value]
    names = [name for name in names if name not in (None, "none", "")]
    if not all(name in ("tensorboard", "all") for name in names):
        raise ValueError(
            f"got {shorten(given.value)}: runs are reported to TensorBoard and to log.jsonl, which"
            " other tools can read"
        )
    return Meaning({("tensorboard",): Given(bool(names))}, f"is tensorboard: {word(bool(names))}")
