"""Weights of 8 or 4 bits by torchao: how a model is quantised while it is loaded, and saved."""

import importlib.util
from typing import Any

from torch import nn
from transformers import TorchAoConfig

from comemo.config import CoMemoConfig
from comemo.safety.settings import BITS
from comemo.weights.quantised import is_quantised

GROUPS = (64, 32)  # weights of a row that share a scale, in int4; the first that divides all rows
ROWS = 16  # the number of rows of a weight in int4 is a multiple
# Linear layers by their weights' names: of the decoder, whose products have few rows, and others.
_DECODER = r"re:(model\.)?language_model\.layers\.\d+\..*_proj\.weight"
_OTHERS = (
    r"re:(model\.)?vision_tower\.encoder\..*\.(\w+_proj|projection_layer|fc[12])\.weight",
    r"re:(model\.)?multi_modal_projector\.[13]\.weight",
    r"re:lm_head\.weight",
)


def quantisation(bits: str, config: CoMemoConfig) -> TorchAoConfig:
    """The `quantization_config` for `from_pretrained` that suits this model on a CPU.

    "int8": all linear layers, with a scale for each row. "int4": those of the decoder and of the
    mixin layers, with a scale and a zero point for each group of a row; all others in int8, because
    their products have many rows, or their errors are those of the logits. Embeddings, position
    tables, norms and gates stay as they are.

    Args:
        bits: one of `BITS`.
        config: of the model.

    Raises:
        ValueError: an unknown name, or torchao is not installed; for "int4" layers of a width that
            no group size of `GROUPS` divides.
    """
    if bits not in BITS:
        raise ValueError(f"quantisation: bits must be one of {BITS}, got {bits!r}")
    check_torchao("quantisation")
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig

    # Otherwise torchao changes settings of the compiler and of float32 products for all models.
    kept: Any = {"set_inductor_config": False}
    whole = Int8WeightOnlyConfig(**kept)
    if bits == "int8":
        return TorchAoConfig(whole, modules_to_not_convert=[])
    from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig

    narrow = PrototypeInt4WeightOnlyConfig(group_size=_group_size(config), **kept)
    by_name = {_DECODER: narrow} | dict.fromkeys(_OTHERS, whole)
    return TorchAoConfig(FqnToConfig(by_name), modules_to_not_convert=[])


def chosen_weights(bits: str | None, path: Any) -> dict[str, Any]:
    """Options of `from_pretrained` for weights of so many bits.

    Args:
        bits: one of `BITS`; None for the weights as they are.
        path: of the checkpoint.

    Raises:
        ValueError: see `quantisation`; a checkpoint that is quantised already.
    """
    if bits is None:
        return {}
    config = CoMemoConfig.from_pretrained(path)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"quantisation: {path} is quantised already, wanted to make it {bits}")
    return {"quantization_config": quantisation(bits, config)}


def check_torchao(function: str) -> None:
    """Raise if torchao is not installed.

    Args:
        function: the name that the error begins with.

    Raises:
        ValueError: how to install it.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(
            f"{function}: quantised weights need torchao, which is not installed:"
            " pip install 'comemo-kernels[quantized]'"
        )


def _group_size(config: CoMemoConfig) -> int:
    """The group size that divides all rows of the weights in int4."""
    text, mixin = config.text_config, config.mixin_config
    inner = text.num_attention_heads * text.head_dim
    of_mixin = mixin.num_heads * mixin.head_dim
    widths = {
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads * head_dim": inner,
        "mixin_config.vision_dim": mixin.vision_dim,
        "mixin_config.intermediate_size": mixin.intermediate_size,
        "mixin_config.num_heads * head_dim": of_mixin,
    }
    groups = [size for size in GROUPS if all(width % size == 0 for width in widths.values())]
    keys = text.num_key_value_heads * text.head_dim
    if not groups or keys % ROWS:
        raise ValueError(
            f"quantisation: int4 needs widths that are multiples of {GROUPS[-1]}, and"
            f" num_key_value_heads * head_dim a multiple of {ROWS}, got {widths} and {keys}:"
            " choose 'int8'"
        )
    return groups[0]


def check_quantised(function: str, model: Any) -> None:
    """Refuse a model in which torchao has left layers as they were, without saying so.

    Args:
        function: the name that the error begins with.
        model: a model that was quantised while it was loaded.

    Raises:
        ValueError: the layers and their shapes.
    """
    quantiser = model.hf_quantizer
    if quantiser.quantization_config.quant_method != "torchao" or quantiser.pre_quantized:
        return
    left = [
        f"{name} {tuple(module.weight.shape)}"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and quantiser.param_needs_quantization(model, f"{name}.weight")
        and not is_quantised(module.weight)
    ]
    if left:
        raise ValueError(
            f"{function}: the quantization_config must fit all layers that it names, or name them"
            f" in modules_to_not_convert, got {len(left)} whose shapes do not fit: {left[:8]}"
        )


def check_savable(function: str, model: nn.Module) -> bool:
    """Whether a model has weights of torchao, which have to be saved under the names used here.

    Args:
        function: the name that the error begins with.
        model: any model.

    Raises:
        ValueError: weights in a form that has no file format; a model that was not quantised by
            `from_pretrained`.
    """
    kinds = {type(weight).__name__ for weight in model.parameters() if is_quantised(weight)}
    if not kinds:
        return False
    from torchao.prototype.safetensors.safetensors_utils import ALLOWED_TENSORS_SUBCLASSES

    if unknown := sorted(kinds.difference(ALLOWED_TENSORS_SUBCLASSES)):
        raise ValueError(
            f"{function}: wanted quantised weights that torchao can save, got {unknown}, which"
            " are ordered for this processor: keep the checkpoint that they were made from, and"
            " quantise it whenever it is loaded"
        )
    if getattr(model, "hf_quantizer", None) is None:
        raise ValueError(
            f"{function}: wanted a model that from_pretrained quantised, whose config says how, got"
            f" one with weights that are {sorted(kinds)}: load it with quantization_config"
        )
    return True
