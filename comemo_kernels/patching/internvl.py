"""InternVL of transformers: tile projection, and RoPE-DHR position ids as an option."""

import torch
from torch import Tensor, nn

from comemo_kernels.patching.internvl_features import PARTS, get_image_features, is_gelu
from comemo_kernels.patching.internvl_positions import forward, generate
from comemo_kernels.patching.plan import Plan
from comemo_kernels.reference import fold_tiles

NAME = "InternVL of transformers (InternVLForConditionalGeneration, InternVLModel)"
_CORE = {"vision_tower", "multi_modal_projector", "language_model"}


def recognise(model: nn.Module) -> bool:
    """Whether a model is an InternVL with or without its head."""
    parts = vars(model)["_modules"]
    return _is_core(model) or (parts.keys() >= {"model", "lm_head"} and _is_core(parts["model"]))


def _is_core(model: nn.Module | None) -> bool:
    return (
        model is not None
        and vars(model)["_modules"].keys() >= _CORE
        and any(kind.__name__ == "InternVLModel" for kind in type(model).__mro__)
    )


def make_plan(plan: Plan) -> None:
    """Plan all replacements in `plan.model`."""
    model = plan.model
    core = model if _is_core(model) else model.model
    for module in {id(one): one for one in (model, core)}.values():
        plan.replace(module, forward, "the option image_grids: rope_dhr_positions")
    if hasattr(model, "generate"):
        plan.replace(
            model, generate, "the option image_grids: rope_dhr_positions", attribute="generate"
        )
    reason = _find_reason(core)
    if reason is None:
        by = "fold and projector by project_tiles"
        plan.replace(core, get_image_features, by, attribute="get_image_features")
    else:
        plan.leave(core.multi_modal_projector, reason)
    plan.leave(core.language_model, "its rotary embedding is the model's own")


def _find_reason(core: nn.Module) -> str | None:
    """Why image features are left as they are; None if they are replaced."""
    projector = core.multi_modal_projector
    if any(name in vars(core) for name in ("get_image_features", "pixel_shuffle")):
        return "get_image_features or pixel_shuffle was replaced before"
    if vars(projector)["_modules"].keys() != set(PARTS) or not _runs_in_order(type(projector)):
        return "its parts are not LayerNorm, Linear, GELU, Linear"
    if not is_gelu(projector.act):
        return f"its activation must be the exact GELU, got {type(projector.act).__name__}"
    if not _folds(core):
        return "pixel_shuffle is another fold"
    return None


class _Step(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return (self.factor * x).sin() + 1


def _runs_in_order(kind: type) -> bool:
    """Whether the forward of a projector's class calls its four parts, and nothing else."""
    projector: nn.Module = object.__new__(kind)
    nn.Module.__init__(projector)
    x = wanted = torch.arange(6, device="cpu", dtype=torch.float32).view(1, 2, 3)
    for factor, name in enumerate(PARTS, 1):
        step = _Step(factor)
        wanted = step(wanted)
        setattr(projector, name, step)
    try:
        return torch.equal(projector.forward(x), wanted)
    except Exception:  # the forward of a foreign class may raise anything
        return False


def _folds(core: nn.Module) -> bool:
    """Whether `pixel_shuffle` is `fold_tiles`."""
    raster = torch.arange(96, device="cpu", dtype=torch.float32).view(1, 4, 4, 6)
    try:
        return all(
            torch.equal(core.pixel_shuffle(raster, scale_factor=ratio), fold_tiles(raster, ratio))
            for ratio in (0.5, 0.25)
        )
    except Exception:  # a foreign method may raise anything
        return False
