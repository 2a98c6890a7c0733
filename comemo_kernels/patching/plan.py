"""What a patch replaces in a model, what it leaves, and a report of both."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from comemo_kernels.patching.replacement import Replacement


class Left(NamedTuple):
    """A module that a patch does not touch."""

    path: str
    reason: str


class Plan:
    """The replacements in one model, made before anything is changed.

    Args:
        model: an instance of a known kind.
        kind: name of that kind.
    """

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.model, self.kind = model, kind
        self.replacements: list[Replacement] = []
        self.left: list[Left] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self.holders = 0  # with-blocks that use the patch
        self.kept = False  # by `patch`, until `unpatch`

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_paths": {}}  # numbers of objects mean nothing in a copy

    def path_of(self, module: nn.Module) -> str:
        """The name of a module in the model."""
        return self._paths.get(id(module), type(module).__name__)

    def replace(
        self,
        module: nn.Module,
        function: Callable[..., Any],
        by: str,
        attribute: str = "forward",
    ) -> None:
        """Plan a replacement; `function` and `by` as in `Replacement`.

        A forward that somebody else has replaced is left, except under accelerate's hooks.
        """
        attributes = vars(module)
        hooked = "_hf_hook" in attributes and "_old_forward" in attributes
        if attribute == "forward" and "forward" in attributes and not hooked:
            self.leave(module, "its forward was replaced before")
            return
        path = self.path_of(module)
        self.replacements.append(Replacement(module, path, attribute, function, by))

    def leave(self, module: nn.Module, reason: str) -> None:
        """Note that a module is not replaced, and why."""
        self.left.append(Left(self.path_of(module), reason))

    def install(self) -> None:
        """Put all replacements in, or none if one fails."""
        try:
            for replacement in self.replacements:
                replacement.install()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Put everything back, also in copies of modules that were put into the model since."""
        for replacement in reversed(self.replacements):
            if replacement.active:
                replacement.remove()
        for module in self.model.modules():  # adapters copy modules
            for value in list(vars(module).values()):
                if type(value) is Replacement and value.active:
                    value.remove()


class Report(NamedTuple):
    """What a patch replaced, what it left, and the calls that ran the model's own code.

    Paths are names of modules in the model. `str()` gives a table.
    """

    kind: str
    replaced: dict[str, str]  # path.attribute -> what runs instead
    left: dict[str, str]  # path -> reason
    refused: dict[str, dict[str, int]]  # path.attribute -> reason -> calls

    @classmethod
    def of(cls, plan: Plan) -> "Report":
        def name(replacement: Replacement) -> str:
            return f"{replacement.path}.{replacement.attribute}".lstrip(".")

        return cls(
            plan.kind,
            {name(one): one.by for one in plan.replacements},
            {left.path: left.reason for left in plan.left},
            {name(one): dict(one.refused) for one in plan.replacements if one.refused},
        )

    def __str__(self) -> str:
        calls = {
            f"{path}: {reason}": count
            for path, reasons in self.refused.items()
            for reason, count in reasons.items()
        }
        parts = [
            self.kind,
            *_lines("replaced", Counter(f"{_star(k)}: {v}" for k, v in self.replaced.items())),
            *_lines("left as it is", Counter(f"{_star(k)}: {v}" for k, v in self.left.items())),
            *_lines("calls of the model's own code", calls),
        ]
        return "\n".join(parts)


def _star(path: str) -> str:
    """Numbers of layers as *, so that equal layers are one line."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _lines(title: str, counts: dict[str, int]) -> list[str]:
    if not counts:
        return []
    return [f"{title}:", *(f"  {count:4} x {text}" for text, count in counts.items())]
