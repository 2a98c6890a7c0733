"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) by peft, inside the model.

peft replaces linear layers by its own; the model keeps its class, so `chat`, `generate`, Trainer
and gradient checkpointing work as before. The directory that `save_adapters` writes is one of peft.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.safety.regular import check_checkpoint, read_json
from comemo.train.models.adapter_layers import (
    PARTS,
    PREFIX,
    adapted_layers,
    adapter_shapes,
    base_name,
    check_lora,
    has_adapters,
    make_peft_config,
    name_patterns,
    ranks_of,
    remove_adapters,
    replace_layer,
)
from comemo.train.models.freezing import is_adapter
from comemo.train.settings import LoraSettings

CONFIG, ADAPTER, TRAINED = "adapter_config.json", "adapter_model.safetensors", "trained.safetensors"
NAME = "default"  # of the adapter, in names of parameters
# Entries of peft's config that say what is computed.
COMPARED = (
    "peft_type",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "modules_to_save",
    "layers_to_transform",
)


def add_adapters(
    model: CoMemoForConditionalGeneration, lora: LoraSettings, seed: int
) -> CoMemoForConditionalGeneration:
    """Put adapters into a model: at first they change nothing that it computes.

    Vision: the projections of attention and the feed-forward network, as published; of the layers
    that run. Language: the same seven of each layer. Mixin: q, kv, o and the feed-forward network.

    Args:
        model: is changed.
        lora: ranks by part; a part of rank 0 gets none.
        seed: of their weights.

    Returns:
        The same model. Adapters are in float32, also in a model of a shorter dtype.

    Raises:
        ValueError: wrong settings, no rank above 0, or a model that has adapters already. Nothing
            is changed then.
    """
    check_lora(lora)
    if has_adapters(model):
        raise ValueError("add_adapters: the model must have no adapters, got some: merge_adapters")
    if hasattr(model, "peft_config"):  # of adapters that were merged by peft itself
        del model.peft_config
    config = make_peft_config(model, lora)
    from peft import inject_adapter_in_model

    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=NAME)
        for name, parameter in model.named_parameters():
            if is_adapter(name) and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
    except BaseException:
        remove_adapters(model, trained)
        raise
    return model


def save_adapters(
    model: CoMemoForConditionalGeneration,
    directory: str | Path,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapters, and all other weights that are trained, to a directory.

    adapter_config.json and adapter_model.safetensors are as peft writes them; trained.safetensors
    has the parameters that require a gradient but are not of an adapter: projector, gates, ...

    Args:
        model: with adapters.
        directory: is created; other files in it stay. Adapters in it are replaced when all files
            are written; adapter_config.json comes last, and without it nothing is loaded.
        weights: gathered ones, if those of the model are divided.

    Raises:
        ValueError: a model without adapters.
    """
    if not has_adapters(model):
        raise ValueError("save_adapters: the model must have adapters, got none")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.peft_config[NAME].to_dict()
    config |= {"inference_mode": True, "base_model_name_or_path": None}
    text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
    adapter, trained = {}, {}
    for name, parameter in model.named_parameters():
        held = parameter.detach() if weights is None else weights[name]
        weight = held.to("cpu").contiguous()
        if is_adapter(name):
            adapter[PREFIX + name.replace(f".{NAME}.", ".")] = weight
        elif parameter.requires_grad:
            trained[base_name(name)] = weight
    parts = {file: folder / f"{file}.part" for file in (ADAPTER, TRAINED, CONFIG)}
    try:
        save_file(adapter, parts[ADAPTER], metadata={"format": "pt"})
        save_file(trained, parts[TRAINED], metadata={"format": "pt"})
        parts[CONFIG].write_text(text + "\n", encoding="utf-8")
        (folder / CONFIG).unlink(missing_ok=True)
        for file, part in parts.items():
            os.replace(part, folder / file)
    except BaseException:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise


def load_adapters(model: CoMemoForConditionalGeneration, directory: str | Path) -> None:
    """Load what `save_adapters` wrote into the model that it was trained from.

    Args:
        model: without adapters, or with those of the same settings; is changed.
        directory: of the files.

    Raises:
        ValueError: files of other adapters or of another model. Nothing is changed then.
    """
    folder = Path(directory)
    function = f"load_adapters({str(directory)!r})"
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{function}: the directory must have a complete {CONFIG}, got none")
    check_checkpoint(folder)
    lora = _read_settings(function, model, read_json(folder / CONFIG))
    present = has_adapters(model)
    if present and _compared(model.peft_config[NAME]) != _compared(make_peft_config(model, lora)):
        raise ValueError(f"{function}: the model must have no adapters or the same, got others")
    parameters = {base_name(name): p for name, p in model.named_parameters()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    wanted = adapter_shapes(model, lora)
    adapter = _read(function, folder / ADAPTER)
    trained = _read(function, folder / TRAINED)
    _compare(function, ADAPTER, {n: tuple(t.shape) for n, t in adapter.items()}, wanted)
    own = {name: shapes[name] for name in trained if name in shapes and not is_adapter(name)}
    _compare(function, TRAINED, {n: tuple(t.shape) for n, t in trained.items()}, own)
    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        if not present:
            add_adapters(model, lora, seed=0)
        parameters = {base_name(name): p for name, p in model.named_parameters()}
        for name, tensor in adapter.items():
            module, kind, _ = name.removeprefix(PREFIX).rsplit(".", 2)
            trained[f"{module}.{kind}.{NAME}.weight"] = tensor
        for name, tensor in trained.items():
            parameter = parameters[name]
            before.append((parameter, parameter.data))
            parameter.data = torch.empty_like(parameter.data).copy_(tensor)
    except BaseException:
        for parameter, old in before:
            parameter.data = old
        if not present:
            remove_adapters(model, trains)
        raise


def merge_adapters(model: CoMemoForConditionalGeneration) -> CoMemoForConditionalGeneration:
    """Add adapters to the weights of their layers and remove them.

    Args:
        model: with adapters; is changed. An interrupted call is completed by another one.

    Returns:
        The same model, with its own layers: `save_pretrained` writes the published layout.

    Raises:
        ValueError: no adapters, or weights that are not finite. Nothing is changed then.
    """
    if not has_adapters(model):
        raise ValueError("merge_adapters: the model must have adapters, got none")
    infinite = [n for n, p in model.named_parameters() if is_adapter(n) and not p.isfinite().all()]
    if infinite:
        raise ValueError(f"merge_adapters: weights must be finite, got others in {infinite[:8]}")
    for name, layer in adapted_layers(model):
        base = layer.get_base_layer()
        before = base.weight.data
        try:
            delta = layer.get_delta_weight(NAME)
            base.weight.data = (before.float() + delta.float()).to(before.dtype)
            base.train(layer.training)
            replace_layer(model, name, base)
        except BaseException:
            base.weight.data = before
            replace_layer(model, name, layer)
            raise
    del model.peft_config
    return model


def _read_settings(
    function: str, model: CoMemoForConditionalGeneration, content: Any
) -> LoraSettings:
    """The settings behind an adapter_config.json that `save_adapters` wrote."""
    if not isinstance(content, dict):
        raise ValueError(f"{function}: {CONFIG} must hold a JSON object, got {content!r:.80}")
    patterns = name_patterns(model)
    ranks, alphas = content.get("rank_pattern"), content.get("alpha_pattern")
    ranks, alphas = (x if isinstance(x, dict) else {} for x in (ranks, alphas))
    chosen = {part: ranks.get(patterns[part], 0) for part in PARTS}
    lora = LoraSettings(**chosen, dropout=content.get("lora_dropout", 0.0))
    try:
        check_lora(lora)
        given = [alphas.get(patterns[part]) for part in ranks_of(lora)]
        if given != [2 * rank for rank in ranks_of(lora).values()]:
            lora.alpha = given[0]
            check_lora(lora)
    except ValueError as error:
        raise ValueError(f"{function}: {CONFIG} must be that of save_adapters: {error}") from error
    wanted = _compared(make_peft_config(model, lora))
    got = json.loads(json.dumps({key: content.get(key) for key in COMPARED}))
    differ = [key for key in COMPARED if wanted[key] != got[key]]
    if differ:
        raise ValueError(
            f"{function}: {CONFIG} must be that of save_adapters for this model, it differs in"
            f" {differ}"
        )
    return lora


def _compared(config: Any) -> dict[str, Any]:
    content = config.to_dict()
    return json.loads(json.dumps({key: content.get(key) for key in COMPARED}, default=_plain))


def _plain(value: Any) -> Any:
    """What JSON does not know: enumerations of peft, sets."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _read(function: str, file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{function}: there must be a file {file.name}")
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{function}: {file.name} is not a whole safetensors file") from error


def _compare(function: str, file: str, got: dict[str, Any], wanted: dict[str, Any]) -> None:
    faults = {
        "missing": sorted(wanted.keys() - got.keys()),
        "unexpected": sorted(got.keys() - wanted.keys()),
        "of another shape": sorted(n for n in wanted.keys() & got.keys() if wanted[n] != got[n]),
    }
    if listed := "; ".join(f"{kind}: {names}" for kind, names in faults.items() if names):
        raise ValueError(f"{function}: the weights in {file} must fit the model, some are {listed}")
