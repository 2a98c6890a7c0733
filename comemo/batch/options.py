"""Options of `generate` that a request or the command line may give: names, ranges, defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SAMPLING = ("temperature", "top_p", "top_k", "min_p")
LONGEST = 512  # new tokens, if nothing else is asked for


@dataclass(frozen=True)
class NumberRule:
    """A number in a range.

    Attributes:
        kind: int or float.
        low, high: the least and the greatest number.
        above: whether numbers must be above `low`, not at least `low`.
    """

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False

    def fits(self, value: Any) -> bool:
        """Whether a value of JSON keeps the rule."""
        known = isinstance(value, int if self.kind is int else (int, float))
        if not known or isinstance(value, bool):
            return False
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        noun = "a whole number" if self.kind is int else "a number"
        low = f"{'above' if self.above else 'of at least'} {self.low:g}"
        return f"{noun} {low} and at most {self.high:,}"


# Temperatures near 0 and penalties far from 1 end in NaN.
NUMBERS = {
    "max_new_tokens": NumberRule(int, 1, 10**6),
    "min_new_tokens": NumberRule(int, 0, 10**6),
    "temperature": NumberRule(float, 0.001, 1000),
    "top_p": NumberRule(float, 0, 1, above=True),
    "top_k": NumberRule(int, 0, 10**6),
    "min_p": NumberRule(float, 0, 1),
    "num_beams": NumberRule(int, 1, 256),
    "length_penalty": NumberRule(float, -100, 100),
    "repetition_penalty": NumberRule(float, 0.01, 100),
    "no_repeat_ngram_size": NumberRule(int, 0, 10**6),
}
NAMES = (*NUMBERS, "do_sample", "stop_strings")


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse values that `generate` cannot use.

    Args:
        options: by name, all of `NAMES`; None means that it was not given.

    Raises:
        ValueError: names the first wrong value.
    """
    for name, value in options.items():
        if value is None:
            continue
        if name in NUMBERS:
            right, wanted = NUMBERS[name].fits(value), str(NUMBERS[name])
        elif name == "do_sample":
            right, wanted = isinstance(value, bool), "true or false"
        else:
            texts = value if isinstance(value, list) else [value]
            right = bool(texts) and all(isinstance(text, str) and text for text in texts)
            wanted = "a text, or a list of texts"
        if not right:
            hint = ": greedy answers need none" if name == "temperature" and value == 0 else ""
            raise ValueError(f"{name} must be {wanted}, got {value!r:.60}{hint}")


def complete_options(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one answer.

    Args:
        given: of the request, checked.
        defaults: for what it does not give, checked.

    Returns:
        Options of `generate`, sorted by name. `max_new_tokens` and `do_sample` are always among
        them. An answer is drawn if `do_sample` says so, or, where nobody gives it, if there is an
        option of sampling; a greedy one has no such options.
    """
    merged = {name: value for name, value in defaults.items() if value is not None}
    merged |= {name: value for name, value in given.items() if value is not None}
    merged.setdefault("max_new_tokens", LONGEST)
    merged.setdefault("do_sample", not merged.keys().isdisjoint(SAMPLING))
    if not merged["do_sample"]:
        merged = {name: value for name, value in merged.items() if name not in SAMPLING}
    return dict(sorted(merged.items()))


def can_share_batch(options: Mapping[str, Any]) -> bool:
    """Whether answers with these options are the same in a batch as alone.

    Drawn ones are not: all rows of a batch draw from one generator. Those that end at texts are
    padded after their end, and nothing in the ids says where that is.

    Args:
        options: of `complete_options`.
    """
    return not options["do_sample"] and "stop_strings" not in options
