"""CoMemo on current transformers: `import comemo`, then the Auto classes know the model."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES

from comemo.config import CoMemoConfig, MixinConfig
from comemo.core import CoMemoModel
from comemo.decode import DecodeLoop
from comemo.image_processor import CoMemoImageProcessor, knowing_published
from comemo.images import load_image
from comemo.model import CoMemoForConditionalGeneration
from comemo.outputs import CoMemoModelOutput, CoMemoOutput
from comemo.processor import CoMemoProcessor
from comemo.session import ChatSession
from comemo.store import MemoryStore, MemoryStoreWarning
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
    "__version__",
    "load_image",
]

AutoConfig.register(CoMemoConfig.model_type, CoMemoConfig)
# By its published name and not by config: only so does AutoTokenizer prefer this class to the
# code that a checkpoint names, even where trust_remote_code=True asks for that code.
REGISTERED_TOKENIZER_CLASSES[InternLM2Tokenizer.__name__] = InternLM2Tokenizer
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    auto.register(CoMemoConfig, CoMemoForConditionalGeneration)
AutoImageProcessor.register(CoMemoConfig, image_processor_classes={"pil": CoMemoImageProcessor})
AutoImageProcessor.from_pretrained = staticmethod(
    knowing_published(AutoImageProcessor.from_pretrained)
)
AutoProcessor.register(CoMemoConfig, CoMemoProcessor)
