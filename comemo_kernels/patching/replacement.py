"""One replaced function of a module: what runs instead, and how to put the old one back.

Only attributes of instances are set, never of a class, so that other models are not affected. A
`Replacement` is copied and pickled with its module; then it belongs to the copy.
"""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import nn

MISSING = "the attribute of the class"  # a string: it keeps its identity in copies and pickles


class PatchWarning(UserWarning):
    """A call of a patched model ran the model's own code, for the reason that it tells."""


class Replacement:
    """A function of a module instance, in place of that of its class.

    Args:
        module: whose attribute is replaced.
        path: its name in the model.
        attribute: what is replaced, mostly "forward".
        function: called with this object and the arguments of the call. It is defined at the top
            of a file, so that it can be pickled.
        by: what it runs, for the report.
    """

    is_a_patch = True  # what `is_untouched` looks for

    def __init__(
        self,
        module: nn.Module,
        path: str,
        attribute: str,
        function: Callable[..., Any],
        by: str,
    ) -> None:
        self.module, self.path, self.function, self.by = module, path, function, by
        self.attribute = attribute
        self.active = False
        self.previous: Any = MISSING
        self.refused: Counter[str] = Counter()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.active:
            return self.function(self, *args, **kwargs)
        return self.original(*args, **kwargs)

    @property
    def original(self) -> Callable[..., Any]:
        """What would run without the patch."""
        if isinstance(self.previous, str):
            return getattr(type(self.module), self.attribute).__get__(self.module)
        return self.previous

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def refuse(self, reason: str, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own code for this call, and say why: once as a warning, then counted."""
        self.note(reason)
        return self.original(*args, **kwargs)

    def note(self, reason: str) -> None:
        """Say that this call runs the model's own code, and why."""
        if not self.refused[reason]:
            warnings.warn(
                f"{self.path or 'the model'}: ran the model's own {self.attribute}: {reason}",
                PatchWarning,
                stacklevel=4,
            )
        self.refused[reason] += 1

    def install(self) -> None:
        """Put it in the module. Under hooks of accelerate, which then run around it as before."""
        attributes = vars(self.module)
        place = self.attribute
        if place == "forward" and "_hf_hook" in attributes and "_old_forward" in attributes:
            place = "_old_forward"
        self.previous = attributes.get(place, MISSING)
        attributes[place] = self
        self.active = True

    def remove(self) -> None:
        """Put back what was there before.

        If somebody wrapped it since, the wrapper stays and this object hands calls on.
        """
        self.active = False
        attributes = vars(self.module)
        for place in [name for name, value in attributes.items() if value is self]:
            if place == "_old_forward":  # accelerate's hooks call it
                attributes[place] = self.original
            elif isinstance(self.previous, str):
                del attributes[place]
            else:
                attributes[place] = self.previous
