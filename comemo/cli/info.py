"""`comemo info`: describe a checkpoint by its config and the headers of its weights."""

import argparse
import json
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from comemo.cli import starting
from comemo.cli.arguments import find_checkpoint
from comemo.cli.hushing import hushed, unhushed
from comemo.cli.terminal import plain, tell
from comemo.config_plain import Sizes, read_plain
from comemo.safety.regular import check_checkpoint, check_path, read_json
from comemo.safety.settings import MODEL_TYPE, shorten

if TYPE_CHECKING:
    from comemo.config import CoMemoConfig

PARTS = {  # part -> pattern of its weights' names, published or transformers' own
    "vision tower": r"^(model\.)?vision_",
    "projector": r"^(mlp1|model\.multi_modal_projector)\.",
    "mixin layers": r"\.(gated_cross_attn_layer|mixin)\.",
    "language model": r"^(model\.)?(language_model|lm_head)",
}


def run(args: argparse.Namespace) -> int:
    """Print the description; returns the exit status.

    Raises:
        ValueError, OSError: see `describe_checkpoint`.
    """
    facts = describe_checkpoint(find_checkpoint(args.model), args.debug)
    tell(json.dumps(facts, indent=2) if args.json else table(facts))
    return 0


def read_config(directory: str | os.PathLike[str]) -> "CoMemoConfig":
    """Read the config of a checkpoint, or raise an error that says what is missing.

    Args:
        directory: of a checkpoint.

    Returns:
        The config.

    Raises:
        ValueError: no such directory, no readable config in it, or one of another model; files
            that are pipes or devices.
        OSError: a file that may not be read.
    """
    _read_content(directory)
    from comemo.config import CoMemoConfig  # imports transformers, which takes seconds

    return CoMemoConfig.from_pretrained(directory)


def _read_content(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of config.json, if it is a config of this model."""
    check_path("read_config", directory)
    if not os.path.isdir(directory):
        raise ValueError(
            f"there is no directory {str(directory)!r}; MODEL is the directory of a checkpoint, for"
            " example from `hf download OWNER/NAME --local-dir DIRECTORY`"
        )
    file = Path(directory) / "config.json"
    if not file.exists():
        raise ValueError(f"{str(directory)!r} holds no config.json: it is not a checkpoint")
    check_checkpoint(directory)
    content = read_json(file)
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != MODEL_TYPE:
        raise ValueError(
            f"{str(directory)!r} is a checkpoint of another model: wanted model_type"
            f" {MODEL_TYPE!r}, got {shorten(kind)}"
        )
    return content


def _describe_config(directory: str | os.PathLike[str], debug: bool) -> Any:
    """The config, without transformers if nothing in it is unusual and nobody asks for warnings."""
    plain_config = read_plain(_read_content(directory))
    if plain_config is not None and not debug:
        return plain_config
    starting.interruptible(False)  # Ctrl-C ends the process at once: nothing is half-done
    import transformers  # noqa: F401  (what it logs is hidden from here on)

    with unhushed() if debug else hushed(True):
        return read_config(directory)


def describe_checkpoint(directory: str | os.PathLike[str], debug: bool = False) -> dict[str, Any]:
    """Describe a checkpoint from its config and the headers of its weights.

    Args:
        directory: of a checkpoint.
        debug: whether warnings of transformers are shown.

    Returns:
        Facts that can be written as JSON.

    Raises:
        ValueError: not a checkpoint of this model, no safetensors in it, or damaged ones.
    """
    config = _describe_config(directory, debug)
    text, vision, mixin = config.text_config, config.vision_config, config.mixin_config
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{str(directory)!r} holds no safetensors: its weights are missing")
    parts: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, shape, dtype in _headers(file):
            _add(parts, name, math.prod(shape), dtype)
    total = {
        "parameters": sum(part["parameters"] for part in parts.values()),
        "bytes": sum(part["bytes"] for part in parts.values()),
        "dtypes": sorted({dtype for part in parts.values() for dtype in part["dtypes"]}),
    }
    numbers = memory_numbers(config, config.tokens_per_tile)
    return {
        "directory": str(directory),
        "language_model": {
            "architecture": config.llm_architecture,
            "layers": text.num_hidden_layers,
            "width": text.hidden_size,
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
            "vocabulary": text.vocab_size,
        },
        "vision_tower": {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "heads": vision.num_attention_heads,
            "tile_pixels": config.force_image_size,
        },
        "mixin": {
            "before_layers": [index + 1 for index in config.mixin_layers],  # counted from 1
            "heads": mixin.num_heads,
            "head_dim": mixin.head_dim,
        },
        "quantisation": _quantisation(config),
        "template": config.template,
        "tokens_per_tile": config.tokens_per_tile,
        "max_tiles": config.max_dynamic_patch,
        "use_thumbnail": config.use_thumbnail,
        **{
            name: getattr(config, name)
            for name in ("rope", "tile_order", "decode_positions", "ntk_length")
        },
        "memory_bytes_per_tile": {"float32": 4 * numbers, "bfloat16": 2 * numbers},
        "parts": {name: parts[name] for name in (*PARTS, "other") if name in parts},
        "total": total,
    }


def _quantisation(config: Any) -> str | None:
    """How the weights were quantised, in the names of the library that did it; None if not."""
    facts = getattr(config, "quantization_config", None)
    if not isinstance(facts, dict):
        return None
    kinds = re.findall(r"\w+Config\b", json.dumps(facts.get("quant_type", "")))
    return " ".join([str(facts.get("quant_method")), *dict.fromkeys(kinds)])


def memory_numbers(config: Sizes, tokens: int) -> int:
    """How many numbers the keys and values of all mixin layers have, for so many image tokens."""
    mixin = config.mixin_config
    return 2 * len(config.mixin_layers) * tokens * mixin.num_heads * mixin.head_dim


def _headers(file: Path) -> list[tuple[str, list[int], str]]:
    """Name, shape and dtype of every tensor in a file."""
    try:
        with safe_open(file, framework="np") as weights:  # which reads no tensor, without torch
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            return [(name, s.get_shape(), s.get_dtype()) for name, s in slices.items()]
    except SafetensorError as error:
        raise ValueError(f"{str(file)!r} is not a whole safetensors file: {error}") from error


def _part_of(weight: str) -> str:
    return next((part for part, names in PARTS.items() if re.search(names, weight)), "other")


def _add(parts: dict[str, dict[str, Any]], name: str, size: int, dtype: str) -> None:
    part = parts.setdefault(_part_of(name), {"parameters": 0, "bytes": 0, "dtypes": []})
    bits = re.search(r"\d+", dtype)  # BF16, F32, F8_E4M3
    if not re.search(r"\._weight_(scale|zero_point)$", name):  # of a quantised weight
        part["parameters"] += size
    part["bytes"] += size * (int(bits[0]) if bits else 8) // 8
    part["dtypes"] = sorted({*part["dtypes"], dtype})


def table(facts: dict[str, Any]) -> str:
    """Format the facts as a table.

    Args:
        facts: from `describe_checkpoint`.

    Returns:
        Lines of text.
    """
    directory, template = plain(facts["directory"]), plain(facts["template"])
    llm, vision, mixin = (facts[name] for name in ("language_model", "vision_tower", "mixin"))
    memory = facts["memory_bytes_per_tile"]
    rows = {
        "language model": f"{llm['architecture']}, {llm['layers']} layers, width {llm['width']:,},"
        f" {llm['heads']} heads ({llm['kv_heads']} of keys and values)",
        "vocabulary": f"{llm['vocabulary']:,} tokens, template {template}",
        **({"weights": plain(facts["quantisation"])} if facts["quantisation"] else {}),
        "vision tower": f"{vision['layers']} layers, width {vision['width']:,},"
        f" {vision['heads']} heads, tiles of {vision['tile_pixels']} px",
        "mixin layers": f"{len(mixin['before_layers'])}, before layers"
        f" {', '.join(map(str, mixin['before_layers']))}; {mixin['heads']} heads of"
        f" {mixin['head_dim']}",
        "tokens per tile": f"{facts['tokens_per_tile']}, up to {facts['max_tiles']} tiles"
        + (" and a thumbnail" if facts["use_thumbnail"] else ""),
        "positions": ", ".join(
            f"{name} {facts[name]}"
            for name in ("rope", "tile_order", "decode_positions", "ntk_length")
        ),
        "image memory": f"{memory['float32'] / 1e6:,.1f} MB per tile in float32,"
        f" {memory['bfloat16'] / 1e6:,.1f} MB in bfloat16",
    }
    lines = [directory, *(f"  {name:16}{text}" for name, text in rows.items())]
    lines += ["", f"  {'':16}{'parameters':>16}{'bytes':>18}   dtype"]
    for name, part in {**facts["parts"], "total": facts["total"]}.items():
        dtypes = ", ".join(part["dtypes"])
        lines.append(f"  {name:16}{part['parameters']:16,}{part['bytes']:18,}   {dtypes}")
    return "\n".join(lines)
