"""Directories of a vision tower, a language model or a projector: their config and weight names.

A weight gets the name that it has in a published checkpoint, or the one used here: both are what
`comemo.checkpoint.from_published` reads. Nothing of a directory is executed.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from comemo.config_parts import LLM_KEYS
from comemo.safety.files import read_json
from comemo.safety.regular import check_checkpoint, check_regular

Rules = list[tuple[str, str | None]]  # pattern of a key, and its replacement; None for other parts

ARCHITECTURES = {"internlm2": "InternLM2ForCausalLM", "llama": "LlamaForCausalLM"}
WHOLE = ("internvl_chat", "comemo_chat", "internvl")  # model types of whole models
VISION_TYPES = ("intern_vit_6b", "internvl_vision", *WHOLE)
LANGUAGE_TYPES = (*ARCHITECTURES, *WHOLE)
# Of a whole model: how it uses the tower's tokens, and how it cuts images.
OF_VISION = (
    "select_layer",
    "ps_version",
    "downsample_ratio",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
    "force_image_size",
)

VISION: Rules = [
    (
        r"^(?:vision_model\.)?"
        r"(?=embeddings\.(?:class_embedding|position_embedding|patch_embedding\.)(?!s)"
        r"|encoder\.layers\.)",
        "vision_model.",
    ),
    (
        r"^(?:(?:model\.)?vision_tower\.)?"
        r"(?=embeddings\.(?:cls_token|position_embeddings|patch_embeddings\.)|encoder\.layer\.)",
        "model.vision_tower.",
    ),
    (r"^(?:mlp1|model\.multi_modal_projector)\.(?=[013]\.)", "mlp1."),
    (r"^(?:model\.)?multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^(?:(?:model\.)?language_model|lm_head)\.", None),
]
_DECODER = r"^(?:model\.language_model|language_model\.model|model)\."
LANGUAGE: Rules = [
    (r"^(?:vision_model|mlp1|(?:model\.)?vision_tower|(?:model\.)?multi_modal_projector)\.", None),
    (r"\.(?:gated_cross_attn_layer|mixin)\.", None),
    (r"\.rotary_emb\.inv_freq$", None),  # computed from the config
    (
        _DECODER + r"layers\.(\d+)\.(?:decoder_layer\.)?",
        r"language_model.model.layers.\1.decoder_layer.",
    ),
    (_DECODER + r"(?=(?:tok_embeddings|embed_tokens|norm)\.)", "language_model.model."),
    (r"^(?:language_model\.)?(?=(?:output|lm_head)\.)", "language_model."),
]
PROJECTOR: Rules = [(r"^(?:mlp1\.)?(?=[013]\.)", "mlp1.")]


@dataclass(frozen=True)
class Weight:
    """A tensor of a safetensors file.

    Attributes:
        file, key: where it is.
        name: what `from_published` reads it as.
    """

    file: Path
    key: str
    name: str


@dataclass
class Part:
    """What a directory holds for one part of a model.

    Attributes:
        config: of the part, with published or transformers' names.
        settings: values of `CoMemoConfig` of the whole model that the part is from.
        weights: of the part; unknown ones too, under their own keys.
        projector: the weights of a projector beside a vision tower.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    weights: list[Weight]
    projector: list[Weight] = field(default_factory=list)


def read_vision(directory: str) -> Part:
    """Read an InternViT: alone, or in an InternVL or a CoMemo; published or transformers' layout.

    Args:
        directory: of config.json and safetensors.

    Raises:
        ValueError: another model, or files that cannot be read as data.
    """
    whole, kind = _read_config("start.vision", directory, VISION_TYPES)
    config = whole if kind not in WHOLE else _part_of("start.vision", directory, whole, "vision")
    if config.get("use_mean_pooling") is False:
        raise ValueError(
            f"start.vision: {directory!r} must have no final norm (use_mean_pooling true), because"
            " the tower of CoMemo has none"
        )
    settings = {key: whole[key] for key in OF_VISION if kind in WHOLE and key in whole}
    if kind == "internvl_chat":
        settings.setdefault("ps_version", "v1")  # as its published code
    if kind == "internvl":  # transformers' names; its raster order is that of "v2"
        settings["select_layer"] = whole.get("vision_feature_layer", -1)
    found = list(_name(directory, "start.vision", VISION))
    projector = [weight for weight in found if weight.name.startswith("mlp1.")]
    return Part(config, settings, [w for w in found if w not in projector], projector)


def read_language(directory: str) -> Part:
    """Read an InternLM2 or a Llama: alone, or in an InternVL or a CoMemo.

    Args:
        directory: of config.json and safetensors.

    Returns:
        The part; its config has the names of a published `llm_config`. Tied embeddings are read a
        second time as output layer.

    Raises:
        ValueError: another model, or files that cannot be read as data.
    """
    whole, kind = _read_config("start.language", directory, LANGUAGE_TYPES)
    config = whole if kind not in WHOLE else _part_of("start.language", directory, whole, "llm")
    named = config.get("architectures")
    named = named[0] if isinstance(named, list) and named else None
    architecture = named or ARCHITECTURES.get(str(config.get("model_type")))
    if architecture not in ARCHITECTURES.values():
        raise ValueError(
            f"start.language: {directory!r} must hold one of {sorted(ARCHITECTURES.values())}, got"
            f" {architecture or config.get('model_type')!r}"
        )
    weights = list(_name(directory, "start.language", LANGUAGE))
    heads = ("language_model.output.weight", "language_model.lm_head.weight")
    if config.get("tie_word_embeddings") and not any(w.name in heads for w in weights):
        tied = (
            "language_model.model.tok_embeddings.weight",
            "language_model.model.embed_tokens.weight",
        )
        weights += [Weight(w.file, w.key, heads[0]) for w in weights if w.name in tied]
    settings = {"template": whole["template"]} if "template" in whole else {}
    return Part(_llm_config(config, str(architecture)), settings, weights)


def read_projector(file: str) -> list[Weight]:
    """Read the names in a projector's file.

    Args:
        file: safetensors with keys `mlp1.{0,1,3}.*` or `{0,1,3}.*`.

    Raises:
        ValueError: not a safetensors file, or one with other keys.
    """
    path = Path(file)
    if path.suffix != ".safetensors":
        raise ValueError(f"start.projector: must be a safetensors file, got {file!r}: {CONVERT}")
    if not path.is_file():
        raise ValueError(f"start.projector: there is no file {file!r}")
    check_regular("start.projector", path)
    weights = [_named(path, key, PROJECTOR) for key in _keys(path)]
    unknown = [w.key for w in weights if w and not w.name.startswith("mlp1.")]
    if unknown:
        raise ValueError(
            f"start.projector: keys must be mlp1.{{0,1,3}}.* or {{0,1,3}}.*, got {unknown[:8]}"
        )
    return [weight for weight in weights if weight]


CONVERT = (
    "a pickle can execute code and is refused. Where you trust it, load it with torch.load(...,"
    " weights_only=True) or the model's own library, and write it with safetensors.torch.save_file"
    " or save_pretrained"
)


def weight_files(section: str, directory: str) -> list[Path]:
    """The safetensors files of a directory: those of its index, or the only one.

    Args:
        section: the name that an error begins with.
        directory: of the weights.

    Raises:
        ValueError: none, pickles, several without an index, or an index that names absent files.
    """
    folder = Path(directory)
    index = folder / "model.safetensors.index.json"
    single = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        named = read_json(directory, index.name).get("weight_map")
        names = sorted({str(name) for name in named.values()}) if isinstance(named, dict) else []
        outside = [name for name in names if Path(name).name != name]
        pickles = [name for name in names if not name.endswith(".safetensors")]
        absent = [name for name in names if not (folder / name).is_file()]
        if not names or outside or pickles or absent:
            raise ValueError(
                f"{section}: {str(index)!r} must name safetensors files beside it, got"
                f" {(outside or pickles or absent)[:8]}"
            )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if len(single) == 1:
        return single
    pickles = sorted(p.name for end in ("bin", "pt", "pth") for p in folder.glob(f"*.{end}"))
    if pickles and not single:
        raise ValueError(
            f"{section}: weights must be safetensors, got {pickles[:8]} in {directory!r}: {CONVERT}"
        )
    got = [path.name for path in single[:8]] or "none"
    raise ValueError(
        f"{section}: {directory!r} must hold model.safetensors, or several safetensors files and"
        f" their model.safetensors.index.json, got {got}"
    )


def _read_config(section: str, directory: str, known: tuple[str, ...]) -> tuple[dict, str]:
    """A directory's config.json, and its model type, which must be known."""
    check_checkpoint(directory)
    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"{section}: {directory!r} must hold a config.json")
    content = read_json(directory, "config.json")
    kind = content.get("model_type")
    if kind not in known:
        raise ValueError(
            f"{section}: model_type in the config.json of {directory!r} must be one of {known}, got"
            f" {kind!r}"
        )
    return content, kind


def _part_of(section: str, directory: str, whole: dict[str, Any], part: str) -> dict[str, Any]:
    names = ("llm_config", "text_config") if part == "llm" else ("vision_config",)
    for name in names:
        if isinstance(whole.get(name), dict):
            return whole[name]
    raise ValueError(f"{section}: the config.json of {directory!r} must hold {names[0]}")


def _llm_config(config: dict[str, Any], architecture: str) -> dict[str, Any]:
    """A published `llm_config` of a language model's config, also of one of transformers 5."""
    keys = (*LLM_KEYS, "bias", "attention_bias", "rope_theta", "rope_scaling")
    found = {key: config[key] for key in keys if key in config}
    rotary = config.get("rope_parameters")
    if isinstance(rotary, dict):
        found.setdefault("rope_theta", rotary.get("rope_theta"))
        scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
        found.setdefault("rope_scaling", None if scaling == {"rope_type": "default"} else scaling)
    found["tie_word_embeddings"] = False  # the output layer is read separately
    return {**found, "architectures": [architecture]}


def _name(directory: str, section: str, rules: Rules) -> Iterator[Weight]:
    for file in weight_files(section, directory):
        for key in _keys(file):
            weight = _named(file, key, rules)
            if weight is not None:
                yield weight


def _named(file: Path, key: str, rules: Rules) -> Weight | None:
    for pattern, name in rules:
        if re.search(pattern, key):
            return None if name is None else Weight(file, key, re.sub(pattern, name, key, count=1))
    return Weight(file, key, key)


def _keys(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as weights:
            return sorted(weights.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is not a whole safetensors file: {error}") from error
