"""open_flamingo's sources, loaded from an installed wheel without its old requirements.

Importing the package itself needs open_clip and an old torch; the files of its model do not.
"""

import importlib
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

MISSING = "no open_flamingo: pip install --no-deps open_flamingo==2.0.1 einops-exts"


def load() -> SimpleNamespace | None:
    """Its modules helpers, flamingo, flamingo_lm and utils; None if it is not installed."""
    spec = find_spec("open_flamingo")
    if spec is None or find_spec("einops_exts") is None:
        return None
    sources = ModuleType("open_flamingo_sources")
    assert spec.submodule_search_locations is not None
    sources.__path__ = [f"{spec.submodule_search_locations[0]}/src"]
    sys.modules.setdefault("open_flamingo_sources", sources)
    names = ("helpers", "flamingo", "flamingo_lm", "utils")
    return SimpleNamespace(
        **{name: importlib.import_module(f"open_flamingo_sources.{name}") for name in names}
    )
