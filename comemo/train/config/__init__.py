"""The settings of a run, read from a YAML file and a command line, and written again."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comemo.train.config import rules
from comemo.train.config.conflicts import conflicts
from comemo.train.config.flag_meanings import Given
from comemo.train.config.layers import (
    Layer,
    Name,
    collecting,
    flatten,
    merge,
    place,
    read_file,
    read_words,
    require,
)
from comemo.train.config.presets import STAGES, preset_values
from comemo.train.settings import (
    AnswerSettings,
    ParallelSettings,
    StageSettings,
    TrainSettings,
)

# What may change between the parts of a resumed run: it has no effect on what is computed.
FREE = {
    ("output",),
    ("preset",),
    ("device",),
    ("tensorboard",),
    ("data", "eval"),
    ("data", "workers"),
    ("data", "bad_data"),
    ("shard_optimizer",),
    *(("answers", field.name) for field in dataclasses.fields(AnswerSettings)),
    *(("parallel", field.name) for field in dataclasses.fields(ParallelSettings)),
}
FREE_IN_STAGES = {
    "save_every",
    "keep",
    "eval_every",
    "log_every",
    "spike",
    "gradient_checkpointing",
}


class SettingsError(ValueError):
    """Wrong settings; `faults` has one line for each."""

    def __init__(self, function: str, source: str, faults: Sequence[str]) -> None:
        self.source, self.faults = source, list(faults)
        count = "" if len(faults) == 1 else f"{len(faults)} faults: "
        super().__init__(f"{function}: {source}: {count}{'; '.join(faults)}")


def read_settings(file: str | Path | None, words: Sequence[str] = ()) -> TrainSettings:
    """Read the settings of a run.

    The words override the file, the file the preset, the preset the defaults. A setting of a stage
    without a stage's name (`learning_rate`) is that of every stage that runs.

    Args:
        file: YAML; None for the words alone.
        words: `name=value`, `--name=value`, `--name value` or `--name` for true; `-` in names is
            `_`.

    Returns:
        Complete settings; `run` and `stages` name the same stages as the file and the preset.

    Raises:
        ValueError: a `SettingsError` with all faults of the file and the words.
        OSError: a file that cannot be read.

    Warns:
        SettingsNote: for each flag of transformers or of the published script.
    """
    require("yaml")
    source = "the command line" if file is None else os.fspath(file)
    faults: list[str] = []
    raw = [] if file is None else read_file(Path(file), faults)
    layers = [place(entries, faults) for entries in (raw, read_words(words, faults))]
    settings = _build(layers, faults)
    if not faults:
        faults = conflicts(settings)
    if faults:
        raise SettingsError("read_settings", source, faults)
    return settings


def check_settings(settings: TrainSettings) -> None:
    """Refuse settings that were made in a program.

    Raises:
        ValueError: a `SettingsError` with all faults.
    """
    faults: list[str] = []
    for name, value in flatten(settings).items():
        with collecting(faults):
            rules.convert(name, list(value) if isinstance(value, tuple) else value)
    faults = faults or conflicts(settings)
    if faults:
        raise SettingsError("check_settings", "TrainSettings", faults)


def write_settings(settings: TrainSettings, file: str | Path) -> None:
    """Write settings as YAML that `read_settings` reads back; the file is replaced as a whole.

    Args:
        settings: complete ones.
        file: where to write.

    Raises:
        OSError: the directory cannot be written.
    """
    new = Path(f"{os.fspath(file)}.new")
    try:
        new.write_text(as_yaml(settings), encoding="utf-8")
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)


def as_yaml(settings: TrainSettings) -> str:
    """Settings as YAML, in the order of the dataclasses."""
    require("yaml")
    import yaml

    return yaml.safe_dump(_plain(dataclasses.asdict(settings)), sort_keys=False, allow_unicode=True)


def difference(old: TrainSettings, new: TrainSettings) -> list[str]:
    """What a resumed run would compute differently.

    Args:
        old: settings that the run began with.
        new: settings that it should go on with.

    Returns:
        One line for each setting, such as `stages.finetune.learning_rate: 4e-05 -> 2e-05`. What
        has no effect on the weights is left out, and so are stages after those of one of both.
    """
    before, after = flatten(old), flatten(new)
    common = min(len(old.run), len(new.run))
    same_runs = old.run[:common] == new.run[:common]
    lines = []
    for name in [*before, *(name for name in after if name not in before)]:
        if name in FREE or (name[0] == "stages" and name[-1] in FREE_IN_STAGES):
            continue
        if name == ("run",) and same_runs:
            continue
        if name[0] == "stages" and same_runs and name[1] not in old.run[:common]:
            continue
        was, is_now = before.get(name), after.get(name)
        if was != is_now:
            lines.append(f"{'.'.join(name)}: {_shown(was)} -> {_shown(is_now)}")
    return lines


def _shown(value: Any) -> str:
    return str(_plain(value))


def _plain(value: Any) -> Any:
    """Lists for tuples, which YAML does not have."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _build(layers: list[Layer], faults: list[str]) -> TrainSettings:
    """Settings from the file and the command line, over the preset and the defaults."""
    given: Layer = {}
    for layer in layers:
        for name, value in layer.items():
            given[name] = merge(given.get(name), value)

    def read(*name: str) -> Any:
        with collecting(faults):
            return rules.convert(name, *given[name])

    preset = read("preset") if ("preset",) in given else None
    parts = given.get(("start", "checkpoint"), Given(None)).value is None
    base = {name: Given(value) for name, value in preset_values(preset, parts).items()}
    run = read("run") if ("run",) in given else None
    named = {name[1] for layer in (base, given) for name in layer if name[0] == "stages"} - {"*"}
    if not run:
        run = tuple(stage for stage in STAGES if stage in named)
        run = run or (tuple(STAGES) if parts else ("finetune",))
    for stage in sorted(named - {*STAGES, *run}):
        near = rules.suggest(stage, {*STAGES, *run})
        faults.append(f"stages.{stage} is neither in run nor one of {', '.join(STAGES)}{near}")
    named = {stage for stage in named if any(stage in name for name in given)}
    stages = [*STAGES, *(stage for stage in run if stage not in STAGES)]
    settings = TrainSettings(preset=preset, run=run)
    settings.stages = {
        stage: _build_stage(stage, stage in run, [base, *layers], faults)
        for stage in stages
        if stage in run or stage in named
    }
    for name in {**base, **given}:
        if name[0] == "stages" or name in (("preset",), ("run",)):
            continue
        with collecting(faults):
            merged = merge(base.get(name), given.get(name))
            _set(settings, name, rules.convert(name, *merged))
    return settings


def _build_stage(stage: str, runs: bool, layers: list[Layer], faults: list[str]) -> StageSettings:
    settings = StageSettings(**STAGES.get(stage, {}))
    places = [("stages", "*")] * runs + [("stages", stage)]
    for layer, above in itertools.product(layers, places):
        own = {name[2:]: given for name, given in layer.items() if name[:2] == above}
        for length, other in ((("steps",), "epochs"), (("epochs",), "steps")):
            if length in own and own[length].value is not None and (other,) not in own:
                setattr(settings, other, None)  # the more specific one counts
        for name, given in own.items():
            with collecting(faults):
                _set(settings, name, rules.convert((*above, *name), *given))
    return settings


def _set(settings: Any, name: Name, value: Any) -> None:
    for part in name[:-1]:
        settings = getattr(settings, part)
    setattr(settings, name[-1], value)
