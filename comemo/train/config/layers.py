"""Settings by full name, as files and command lines have them: read, named, translated, merged."""

import contextlib
import dataclasses
import importlib.util
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_origin

from comemo.safety.regular import check_regular
from comemo.safety.settings import shorten
from comemo.train.config import flags, rules
from comemo.train.config.flag_meanings import Given
from comemo.train.config.rules import shown
from comemo.train.settings import StageSettings, TrainSettings

Name = tuple[str, ...]  # full name of a setting, as parts
Entry = tuple[Name, Given]
Layer = dict[Name, Given]
LONGEST_FILE = 2**20  # bytes
MOST_VALUES = 10**5


class SettingsNote(UserWarning):
    """What an old name became."""


def require(*packages: str) -> None:
    """Refuse to begin without packages that training needs.

    Args:
        packages: names to import.

    Raises:
        ValueError: names what is missing, and how to install it.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f'require: training needs {" and ".join(missing)}: pip install "comemo-kernels[train]"'
        )


def flatten(settings: TrainSettings) -> dict[Name, Any]:
    """Full name of every setting, as parts -> value, in the order of the dataclasses."""

    def walk(place: Name, section: Any) -> Iterator[tuple[Name, Any]]:
        for field in dataclasses.fields(section):
            name, value = (*place, field.name), getattr(section, field.name)
            if name == ("stages",):
                for stage, inner in value.items():
                    yield from walk((*name, stage), inner)
            elif dataclasses.is_dataclass(value):
                yield from walk(name, value)
            else:
                yield name, value

    return dict(walk((), settings))


OWN = {name[-1] for name in flatten(TrainSettings(stages={"NAME": StageSettings()}))}


@contextlib.contextmanager
def collecting(faults: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if str(error) not in faults:
            faults.append(str(error))


def _load(file: Path) -> dict[str, Any]:
    """A YAML file as data: no tag makes an object, and no key may be there twice."""
    import yaml

    check_regular("read_settings", file)
    if (length := file.stat().st_size) > LONGEST_FILE:
        raise ValueError(
            f"read_settings: {os.fspath(file)!r} must have at most {LONGEST_FILE:,} bytes, got"
            f" {length:,}"
        )

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            plain = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            keys = [self.construct_object(key, deep=True) for key in plain]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the name {twice[0]!r} is there twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    try:
        content = _sized(yaml.load(file.read_text(encoding="utf-8"), Loader))
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"read_settings: {os.fspath(file)!r} is not YAML: {reason}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"read_settings: {os.fspath(file)!r} must hold names and values, got {shorten(content)}"
        )
    return content


def _sized(content: Any) -> Any:
    """The same; anchors that repeat each other can make a short file endless."""
    rest, count = [content], 0
    while rest:
        item = rest.pop()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"with its anchors it has more than {MOST_VALUES:,} values")
        if isinstance(item, dict):
            rest += [*item, *item.values()]
        elif isinstance(item, list):
            rest += item
    return content


def read_file(file: Path, faults: list[str]) -> list[Entry]:
    """Full names and values of a YAML file.

    Raises:
        ValueError: a pipe, a long file, or one that is not YAML.
        OSError: a file that cannot be read.
    """
    return list(_entries(_load(file), faults))


def _is_section(name: Name) -> bool:
    inner = name[2:] if name[:1] == ("stages",) else name
    sections = [("lora",), *((section,) for section in rules.SECTIONS)]
    return (name[:1] == ("stages",) and len(name) < 3) or inner in sections


def _entries(mapping: Mapping[Any, Any], faults: list[str], place: Name = ()) -> Iterator[Entry]:
    """Full names and values of nested mappings."""
    for key, value in mapping.items():
        if not isinstance(key, str) or not key:
            faults.append(f"names must be texts, got {shorten(key)} in {'.'.join(place) or 'it'}")
            continue
        name = (*place, *key.split("."))
        if not _is_section(name):
            yield name, Given(value)
        elif isinstance(value, Mapping):
            yield from _entries(value, faults, name)
        elif value is not None:
            faults.append(f"{'.'.join(name)} must be names and values, got {shorten(value)}")


def read_words(words: Sequence[str], faults: list[str]) -> Iterator[Entry]:
    """Full names and values of a command line, see `read_settings`."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                faults.append(f"wanted name=value or --name value, got {word!r}")
                continue
            is_switch = not rest or rest[0].startswith("--")
            text = "true" if is_switch else rest.pop(0)
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
            faults.append(f"wanted name=value or --name value, got {word!r}")
            continue
        name, value = tuple(key.replace("-", "_").split(".")), _parse(text)
        if name[0] == "stages" and len(name) > 1:  # names of stages may have a "-"
            name = ("stages", key.split(".")[1], *name[2:])
        if not _is_section(name):
            yield name, Given(value, text)
        elif isinstance(value, Mapping):
            yield from _entries(value, faults, name)
        else:
            faults.append(f"{'.'.join(name)} must be names and values, got {text!r}")


def _parse(text: str) -> Any:
    import yaml

    try:
        return _sized(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError):
        return text


def place(entries: Iterable[Entry], faults: list[str]) -> Layer:
    """Give every value its full name; translate old names."""
    layer: Layer = {}
    old: dict[Name, dict[str, Given]] = {}
    for name, given in entries:
        found = _find(name)
        if found is not None:
            known, inner = found
            is_text = rules.kind_of(known) in (str, str | None)
            value = given.text if is_text and given.text is not None else given.value
            for key in reversed(inner):
                value = {key: value}
            given = Given(value, None if inner else given.text)
            layer[known] = merge(layer.get(known), given)
        elif _is_old(name):
            old.setdefault(name[:-1], {})[name[-1]] = given
        else:
            faults.append(f"{'.'.join(name)} is not a setting{_near(name)}")
    for scope, values in old.items():
        _translate(scope, values, layer, faults)
    return layer


def _is_old(name: Name) -> bool:
    """Whether a name is one of another trainer, and not ours in a wrong place."""
    in_section = len(name) == 1 or _is_section(name[:-1])
    own = name[-1] in OWN and name[-1] not in flags.READERS
    return in_section and flags.is_known(name[-1]) and not own


def _translate(scope: Name, old: dict[str, Given], layer: Layer, faults: list[str]) -> None:
    settings, notes, wrong = flags.translate(old)
    faults += [f"{'.'.join(scope)}.{line}" if scope else line for line in wrong]
    for name, given in settings.items():
        if scope[:1] == ("stages",) and name[:2] == ("stages", "*"):
            name = (*scope[:2], *name[2:])
        if name[: len(scope)] != scope:
            faults.append(f"{shown(name)} is not a setting of {'.'.join(scope)}")
        elif name in layer and name != ("start", "model") and layer[name].value != given.value:
            names = ", ".join(old)
            faults.append(f"{shown(name)} is there twice: by its name, and by one of {names}")
        else:
            layer[name] = merge(given, layer.get(name))
    for note in notes:
        warnings.warn(f"read_settings: {note}", SettingsNote, stacklevel=4)


def merge(before: Given | None, given: Given | None) -> Given:
    """The later value; mappings are merged, key by key."""
    if before is None or given is None:
        return given or before or Given(None)
    if isinstance(before.value, dict) and isinstance(given.value, dict):
        merged = dict(before.value)
        for key, value in given.value.items():
            merged[key] = merge(Given(merged.get(key)), Given(value)).value
        return Given(merged)
    return given


def _find(name: Name) -> tuple[Name, Name] | None:
    """The setting that a name means, and keys inside its value; None if there is none."""
    for end in range(len(name), 0, -1):
        for known in (name[:end], ("stages", "*", *name[:end])):
            with contextlib.suppress(LookupError):
                has_keys = get_origin(rules.kind_of(known)) is dict or known == ("data", "mixing")
                if end == len(name) or has_keys:
                    return known, name[end:]
    return None


def _near(name: Name) -> str:
    """What an unknown name may have meant."""
    sample = TrainSettings(stages={"NAME": StageSettings()})
    known = [".".join(path) for path in flatten(sample)]
    same = [path for path in known if path.rpartition(".")[2] == name[-1]]
    if same:
        same = [path.removeprefix("stages.NAME.") for path in same]
        return f": did you mean {' or '.join(same)}?"
    place = ".".join(name)
    if name[0] == "stages" and len(name) > 2:
        place = ".".join(("stages", "NAME", *name[2:]))
    bare = [path.removeprefix("stages.NAME.") for path in known]
    return rules.suggest(place, {*known, *bare}).replace(
        "NAME", name[1] if len(name) > 2 else "NAME"
    )
