"""Write the tables of docs/training.md from the dataclasses: `python docs/write_settings.py`."""

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comemo.train.settings import (
    AnswerSettings,
    DataSettings,
    LoraSettings,
    ParallelSettings,
    StageSettings,
    StartSettings,
    TrainSettings,
)

PAGE = Path(__file__).parent / "training.md"
START, END = "\n## All settings\n", "\n## Names of other trainers\n"
SECTIONS = {
    "The run": TrainSettings,
    "`start`": StartSettings,
    "`data`": DataSettings,
    "`stages.NAME`": StageSettings,
    "`stages.NAME.lora`": LoraSettings,
    "`answers`": AnswerSettings,
    "`parallel`": ParallelSettings,
}


def described(settings: type) -> Iterator[tuple[list[str], str]]:
    """Names that share an entry in the docstring of a dataclass, and its text."""
    text = textwrap.dedent((settings.__doc__ or "").partition("Attributes:\n")[2])
    for entry in re.split(r"\n(?=\S)", text.strip()):
        names, _, meaning = " ".join(entry.split()).partition(": ")
        yield names.split(", "), meaning[:1].upper() + meaning[1:]


def default_of(settings: type, name: str) -> str:
    """The default of a field as it is written in YAML."""
    value: Any = getattr(settings(), name)
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value) or "(needed)"


def table(settings: type) -> Iterator[str]:
    """The rows of one dataclass."""
    yield "| setting | default | meaning |\n|---|---|---|"
    names = {field.name for field in dataclasses.fields(settings)}
    for entry, meaning in described(settings):
        keys = [name for name in entry if name in names]
        shown = ", ".join(f"`{name}`" for name in keys)
        defaults = [f"`{default_of(settings, name)}`" for name in keys]
        if len(set(defaults)) == 1:
            del defaults[1:]
        yield f"| {shown} | {', '.join(defaults)} | {meaning.replace('None', 'null')} |"


def write_page(page: str) -> str:
    """The page with its tables as the dataclasses are now."""
    before, _, rest = page.partition(START)
    after = rest[rest.index(END) :]
    lines = [
        before + START,
        "From the dataclasses, by `python docs/write_settings.py`. `comemo train CONFIG.yaml"
        " --print` shows the\nvalues of a run.",
    ]
    for title, settings in SECTIONS.items():
        lines += [f"\n### {title}\n", *table(settings)]
    return "\n".join(lines) + "\n" + after


if __name__ == "__main__":
    PAGE.write_text(write_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
