"""CoMemo for current transformers; after `import comemo` the Auto classes can load the model.

The names are imported when they are used: torch and transformers take seconds.
"""

import comemo.cli.starting  # isort: skip  # noqa: F401  (Ctrl-C during the other imports)

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from comemo import auto_hook

if TYPE_CHECKING:
    from comemo.chat.session import ChatSession
    from comemo.conditional_generation import CoMemoForConditionalGeneration
    from comemo.config import CoMemoConfig, MixinConfig
    from comemo.decode.interface import Prefilled
    from comemo.decode.loop import DecodeLoop
    from comemo.image_processor import CoMemoImageProcessor
    from comemo.images import load_image
    from comemo.model import CoMemoModel
    from comemo.outputs import CoMemoModelOutput, CoMemoOutput
    from comemo.processor import CoMemoProcessor
    from comemo.store.store import MemoryStore, MemoryStoreWarning
    from comemo.tokenizer import InternLM2Tokenizer
    from comemo_kernels import ImageMemory

__version__ = "0.1.0"
__all__ = [
    "ChatSession",
    "CoMemoConfig",
    "CoMemoForConditionalGeneration",
    "CoMemoImageProcessor",
    "CoMemoModel",
    "CoMemoModelOutput",
    "CoMemoOutput",
    "CoMemoProcessor",
    "DecodeLoop",
    "ImageMemory",
    "InternLM2Tokenizer",
    "MemoryStore",
    "MemoryStoreWarning",
    "MixinConfig",
    "Prefilled",
    "__version__",
    "load_image",
]

_PLACES = {  # module of each name
    "ChatSession": "comemo.chat.session",
    "CoMemoConfig": "comemo.config",
    "CoMemoForConditionalGeneration": "comemo.conditional_generation",
    "CoMemoImageProcessor": "comemo.image_processor",
    "CoMemoModel": "comemo.model",
    "CoMemoModelOutput": "comemo.outputs",
    "CoMemoOutput": "comemo.outputs",
    "CoMemoProcessor": "comemo.processor",
    "DecodeLoop": "comemo.decode.loop",
    "ImageMemory": "comemo_kernels",
    "InternLM2Tokenizer": "comemo.tokenizer",
    "MemoryStore": "comemo.store.store",
    "MemoryStoreWarning": "comemo.store.store",
    "MixinConfig": "comemo.config",
    "Prefilled": "comemo.decode.interface",
    "load_image": "comemo.images",
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`, or a module of this package, when it is used."""
    if name in _PLACES:
        value = getattr(import_module(_PLACES[name]), name)
    elif name[:1] != "_" and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})


auto_hook.install()
