"""The published CoMemo code: its model with an InternLM2 language model, on transformers 4.37 on.

Source: CoMemo (arXiv:2506.06279) and its published code, whose structure is recognised by names.
"""

from torch import nn

from comemo_kernels.patching import published_attention as attention
from comemo_kernels.patching import published_block as block
from comemo_kernels.patching import published_generate as generation
from comemo_kernels.patching.plain import is_rms_norm
from comemo_kernels.patching.plan import Plan
from comemo_kernels.patching.published_rotary import check_rotary

NAME = "the published CoMemo code (CoMemoChatModel)"
_PARTS = ("vision_model", "language_model", "mlp1", "extract_feature", "generate", "pixel_shuffle")


def recognise(model: nn.Module) -> bool:
    """Whether a model has the structure of `CoMemoChatModel` with an InternLM2 language model."""
    if not all(hasattr(model, part) for part in _PARTS):
        return False
    layers = getattr(getattr(model.language_model, "model", None), "layers", None)
    if not layers:
        return False
    parts = ("gated_cross_attn_layer", "decoder_layer", "vis_x")
    return all(
        all(hasattr(layer, part) for part in parts)
        and hasattr(getattr(layer.decoder_layer, "attention", None), "wqkv")
        for layer in layers
    )


def make_plan(plan: Plan) -> None:
    """Plan all replacements in `plan.model`.

    Raises:
        ValueError: rotary buffers that do not hold what their formula gives.
    """
    model = plan.model
    for module in model.modules():
        if hasattr(module, "cos_cached") and hasattr(module, "inv_freq"):
            check_rotary(plan.path_of(module), module)
    plan.replace(
        model,
        generation.generate,
        "image memory built once per call; decode steps fused",
        "generate",
    )
    plan.replace(model, generation.extract_feature, "project_tiles", "extract_feature")
    for layer in model.language_model.model.layers:
        found = layer.gated_cross_attn_layer
        if found is not None and block.is_known(found):
            by = "norm_linear, attend_gated, gated_swiglu on a built memory"
            plan.replace(layer, block.run_layer, "reads the image memory of the call")
            plan.replace(found, block.run_block, by)
            plan.replace(found.cross_attn, block.run_attention, "attend_spans on a built memory")
            for norm in (found.cross_attention_norm, found.ffn_norm_2):
                if not is_rms_norm(norm):  # also tries its class, before anything is captured
                    plan.leave(norm, "not a plain RMSNorm: it is called")
        elif found is not None:
            plan.leave(found, "not the published structure")
        own = layer.decoder_layer.attention
        if attention.is_known(own):
            plan.replace(own, attention.run, "apply_rotary; keys are not repeated")
        else:
            plan.leave(own, f"{type(own).__name__} is not known")
    plan.leave(model.vision_model, "the vision tower runs once per image")
