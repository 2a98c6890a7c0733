"""What settings of the data must be."""

from typing import Any

from comemo.train.settings import DataSettings

_CHOICES = {
    "too_long": ("cut", "refuse"),
    "bad_data": ("skip", "stop"),
    "loss_weight": ("token", "sample", "square"),
}
_COUNTS = {
    "max_tokens": 1,
    "max_tiles": 0,
    "buffer": 0,
    "max_sample_tokens": 1,
    "min_frames": 1,
    "max_frames": 1,
    "workers": 0,
}
_OPTIONAL = ("max_dynamic_patch", "min_dynamic_patch")
_SWITCHES = ("restart", "published_pixels", "published_text")


def check_data(settings: DataSettings) -> None:
    """Refuse settings that no data can be read with.

    Raises:
        ValueError: names the setting, what it must be, and what it is.
    """
    for name in ("train", "eval", "root"):
        value = getattr(settings, name)
        if not isinstance(value, str) and (value is not None or name == "train"):
            raise ValueError(f"data: {name} must be a path, got {value!r:.60}")
    for name, allowed in _CHOICES.items():
        if (value := getattr(settings, name)) not in allowed:
            raise ValueError(f"data: {name} must be one of {list(allowed)}, got {value!r}")
    for name, least in _COUNTS.items():
        check_count(name, getattr(settings, name), least)
    for name in _OPTIONAL:
        if (value := getattr(settings, name)) is not None:
            check_count(name, value)
    for name in _SWITCHES:
        if not isinstance(value := getattr(settings, name), bool):
            raise ValueError(f"data: {name} must be true or false, got {value!r}")
    if settings.use_thumbnail not in (None, True, False):
        got = repr(settings.use_thumbnail)
        raise ValueError(f"data: use_thumbnail must be true, false or null, got {got}")
    if settings.min_frames > settings.max_frames:
        got = f"{settings.min_frames} and {settings.max_frames}"
        raise ValueError(f"data: min_frames must be at most max_frames, got {got}")
    low, high = settings.min_dynamic_patch, settings.max_dynamic_patch
    if low is not None and high is not None and low > high:
        got = f"{low} and {high}"
        raise ValueError(f"data: min_dynamic_patch must be at most max_dynamic_patch, got {got}")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not an integer of at least `least`.

    Args:
        name: of the setting.
        value: as given.
        least: that is allowed.

    Raises:
        ValueError: names the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise ValueError(f"data: {name} must be an integer of at least {least}, got {value!r:.60}")


def check_epochs(epochs: Any) -> None:
    """Refuse what is not None or a number above 0.

    Raises:
        ValueError: names it.
    """
    is_number = isinstance(epochs, (int, float)) and not isinstance(epochs, bool)
    if epochs is not None and not (is_number and 0 < epochs < 1e6):
        raise ValueError(f"data: epochs must be a number above 0, got {epochs!r:.60}")
