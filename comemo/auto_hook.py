"""Register the model with the Auto classes when they are used, without importing transformers.

`import comemo` must be quick, so it cannot import the classes that `comemo.auto` registers. Instead
a finder waits for transformers' modules of Auto classes. When one of them is imported, its methods
that load or make something are replaced by ones that first import `comemo.auto`, which registers
everything by transformers' public `register`. So nothing of transformers is imported within its own
imports, where half of it may be missing, and no table of transformers is filled by private names.

Programs that hold a CoMemo model may read those tables without calling an Auto class: registration
also follows the import of the model's class.
"""

import functools
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_AUTO, _MODEL = "transformers.models.auto", "comemo.conditional_generation"
_LOADS, _MAKES = ("from_pretrained",), ("from_pretrained", "from_config")
# Module -> methods by class, which register before they run.
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    f"{_AUTO}.configuration_auto": {"AutoConfig": ("from_pretrained", "for_model")},
    f"{_AUTO}.modeling_auto": {
        "AutoModel": _MAKES,
        "AutoModelForCausalLM": _MAKES,
        "AutoModelForImageTextToText": _MAKES,
    },
    f"{_AUTO}.tokenization_auto": {"AutoTokenizer": _LOADS},
    f"{_AUTO}.image_processing_auto": {"AutoImageProcessor": _LOADS},
    f"{_AUTO}.processing_auto": {"AutoProcessor": _LOADS},
    f"{_AUTO}.video_processing_auto": {"AutoVideoProcessor": _LOADS},
    f"{_AUTO}.feature_extraction_auto": {"AutoFeatureExtractor": _LOADS},
}


def install() -> None:
    """Wait for the Auto classes; those that are imported already are changed at once."""
    for name in METHODS:
        if (module := sys.modules.get(name)) is not None:
            _change(module)
    sys.meta_path.insert(0, _Finder())


def is_registered() -> bool:
    """Whether `comemo.auto` has registered everything."""
    return getattr(sys.modules.get("comemo.auto"), "REGISTERED", False)


def _change(module: ModuleType) -> None:
    """What follows the import of a module that the finder waits for."""
    if module.__name__ == _MODEL:
        importlib.import_module("comemo.auto")
    for name, methods in METHODS.get(module.__name__, {}).items():
        for method in methods:
            _register_before(getattr(module, name), method)


def _register_before(owner: Any, name: str) -> None:
    function = getattr(owner, name).__func__

    @functools.wraps(function)
    def registered(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if is_registered():
            return function(cls, *args, **kwargs)
        importlib.import_module("comemo.auto")
        return getattr(cls, name)(*args, **kwargs)  # which it may have replaced

    setattr(owner, name, classmethod(registered))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the awaited modules as all other finders do, and gives them a `_Loader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in METHODS and fullname != _MODEL:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            if find is not None and (spec := find(fullname, path, target)) is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs a module by its own loader, and `_change` after it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # for those who find a module without importing it

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # as if this had not been here
        self.loader.exec_module(module)
        _change(module)
