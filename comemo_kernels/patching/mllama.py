"""Mllama of transformers: Llama 3.2 Vision, with or without its vision model."""

from torch import nn

from comemo_kernels.patching.mllama_layers import (
    cross_attention,
    cross_layer,
    self_attention,
    self_layer,
)
from comemo_kernels.patching.mllama_mask import (
    model_forward,
    model_forward_by_index,
    slices_by_index,
)
from comemo_kernels.patching.plain import is_rms_norm
from comemo_kernels.patching.plan import Plan

NAME = "Mllama of transformers (MllamaForConditionalGeneration, MllamaForCausalLM)"
_CROSS = ("cross_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_SELF = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_GATES = ("cross_attn_attn_gate", "cross_attn_mlp_gate")
_VISION = "no operation for LayerNorm and attention of the vision model"


def recognise(model: nn.Module) -> bool:
    """Whether a model has this structure."""
    return _find_text(model) is not None


def make_plan(plan: Plan) -> None:
    """Plan all replacements in `plan.model`."""
    text = _find_text(plan.model)
    assert text is not None
    for whole in (plan.model, vars(plan.model)["_modules"].get("model")):
        if whole is not None and _has(whole, "vision_model", "language_model"):
            by_index = slices_by_index(whole)
            function = model_forward_by_index if by_index else model_forward
            plan.replace(whole, function, "spans instead of a dense mask, once for all layers")
            plan.leave(whole.vision_model, _VISION)
    rotates = type(text.rotary_emb).__name__ == "MllamaRotaryEmbedding"  # halves repeat
    for layer in text.layers:
        is_rms_norm(layer.input_layernorm)  # tries the class, which torch.compile cannot
        if _is_cross_layer(layer):
            plan.replace(
                layer, cross_layer, "norm_linear, attend_gated, gated_swiglu, keys of its cache"
            )
            plan.replace(layer.cross_attn, cross_attention, "attend_spans, if it is hooked")
        elif _has(layer, *_SELF):
            plan.replace(layer, self_layer, "gated_swiglu")
            if rotates:
                plan.replace(layer.self_attn, self_attention, "apply_rotary")
            else:
                plan.leave(layer.self_attn, "the rotary embedding is not that of Mllama")


def _find_text(model: nn.Module) -> nn.Module | None:
    """The text model in a model, or None; modules of a wrapper are not looked through."""
    if not isinstance(model, nn.Module):
        return None
    for name in ("model", "language_model", None):
        modules = vars(model)["_modules"]
        layers = modules.get("layers")
        if isinstance(layers, nn.ModuleList):
            return model if any(_is_cross_layer(layer) for layer in layers) else None
        if name is not None and name in modules:
            model = modules[name]
    return None


def _has(module: nn.Module, *names: str) -> bool:
    """Whether a module has these submodules."""
    modules = vars(module)["_modules"]
    return all(name in modules for name in names)


def _is_cross_layer(layer: nn.Module) -> bool:
    return (
        _has(layer, *_CROSS)
        and all(gate in vars(layer)["_parameters"] for gate in _GATES)
        and _has(layer.cross_attn, *_ATTENTION)
    )
