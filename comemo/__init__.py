"""CoMemo for current transformers; after `import comemo` the Auto classes can load the model."""

import comemo.cli.starting  # isort: skip  # noqa: F401  (Ctrl-C during the other imports)

from comemo import auto
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
from comemo_kernels import ImageMemory, __version__

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

auto.register()
