"""Which weights a stage trains."""

from torch import nn

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.train.settings import StageSettings

PARTS = ("vision", "projector", "mixin", "language")
GATES = ("attn_gate", "mlp_gate")


def part_of(name: str) -> str:
    """The part that a parameter belongs to.

    Args:
        name: of the parameter in `CoMemoForConditionalGeneration`.
    """
    if name.startswith("model.vision_tower."):
        return "vision"
    if name.startswith("model.multi_modal_projector."):
        return "projector"
    return "mixin" if ".mixin." in name else "language"


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to a low-rank adapter.

    Args:
        name: of the parameter.
    """
    return ".lora_" in name


def choose_trainable(model: CoMemoForConditionalGeneration, stage: StageSettings) -> None:
    """Set `requires_grad` of every parameter.

    A part with adapters of this stage is frozen but for them, also if it is in `stage.train`; the
    gates of mixin layers are too small for adapters and are trained with them, unless
    `stage.freeze_gates`. Embeddings and output layer belong to the language model. Vision layers
    that `config.select_layer` leaves out never run and are always frozen.

    Args:
        model: with the adapters that the stage asks for, see `add_adapters`.
        stage: what to train.

    Raises:
        ValueError: an unknown part, a wrong type, adapters that the model does not have, vision
            layers that it does not have, or nothing to train. Nothing is changed then.
    """
    ranks = {name: getattr(stage.lora, name, 0) for name in PARTS}
    parameters = dict(model.named_parameters())
    _check(stage, ranks, parameters)
    whole = {part for part in stage.train if not ranks[part]}
    chosen = {name for name in parameters if _is_chosen(name, whole, ranks)}
    if ranks["mixin"]:
        chosen |= {name for name in parameters if name.endswith(GATES)}
    if stage.freeze_gates:
        chosen -= {name for name in parameters if name.endswith(GATES)}
    if stage.unfreeze_lm_head:
        chosen.add("lm_head.weight")
    tower = "model.vision_tower.encoder.layer."
    layers = model.model.vision_layers()
    if stage.unfreeze_vit_layers:
        for index in _unfrozen(model, stage.unfreeze_vit_layers):
            own = f"{tower}{index}."
            chosen |= {n for n in parameters if n.startswith(own) and not is_adapter(n)}
    chosen -= {
        name
        for name in parameters
        if name.startswith(tower) and int(name[len(tower) :].split(".")[0]) >= len(layers)
    }
    if not chosen:
        raise ValueError("stage: there must be something to train, got no part and no adapter")
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in chosen)
    except BaseException:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
        raise


def _is_chosen(name: str, whole: set[str], ranks: dict[str, int]) -> bool:
    part = part_of(name)
    return bool(ranks[part]) if is_adapter(name) else part in whole


def _check(
    stage: StageSettings, ranks: dict[str, int], parameters: dict[str, nn.Parameter]
) -> None:
    if isinstance(stage.train, str) or any(part not in PARTS for part in stage.train):
        raise ValueError(f"stage.train: must be a list of parts among {PARTS}, got {stage.train!r}")
    adapted = {part_of(name) for name in parameters if is_adapter(name)}
    for part, rank in ranks.items():
        if rank and part not in adapted:
            raise ValueError(
                f"stage.lora: the model must have adapters in {part}, got none: call add_adapters"
                " first"
            )
    if not isinstance(stage.unfreeze_vit_layers, int):
        raise ValueError(
            "stage.unfreeze_vit_layers: must be the index of a layer, got"
            f" {stage.unfreeze_vit_layers!r}"
        )


def _unfrozen(model: CoMemoForConditionalGeneration, first: int) -> range:
    """Indices of the vision layers from `first` on, as published: the slice `layers[first:]`."""
    depth, run = len(model.model.vision_tower.encoder.layer), len(model.model.vision_layers())
    found = range(depth)[first:]
    if not -depth <= first < depth or found[0] >= run:
        raise ValueError(
            f"stage.unfreeze_vit_layers: must be from {-depth} to {run - 1}, a layer that runs, got"
            f" {first}"
        )
    return found
