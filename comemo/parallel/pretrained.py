"""`from_pretrained` and `save_pretrained` of a model that ranks divide."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch import distributed as dist
from transformers import GenerationConfig
from transformers import initialization as init

from comemo.parallel.launch import Division
from comemo.parallel.loading import places_of, read_into, weight_files
from comemo.parallel.split import Split
from comemo.parallel.stages import LastStage, divide_stages
from comemo.parallel.tensor import check_divisible, divide_head, divide_layers, kinds_of, paste
from comemo.safety.files import find_file

Convert = Callable[[dict[str, Tensor], Any], dict[str, Any]]
# Options of `from_pretrained` that a divided model takes, beside those of files.
TAKEN = ("config", "dtype", "torch_dtype", "attn_implementation", "output_loading_info")
OF_A_STAGE = ("model.language_model.layers.", "model.language_model.norm.", "lm_head.")
WITHOUT_EFFECT = (
    "low_cpu_mem_usage",
    "use_safetensors",
    "weights_only",
    "ignore_mismatched_sizes",
    "adapter_kwargs",  # of the Auto classes; an adapter beside the weights is refused before
)


def load_divided(
    cls: Any, path: Any, division: Division, options: dict[str, Any], convert: Convert, hub: Any
) -> Any:
    """Load this rank's part of a checkpoint; no rank ever has the whole model in memory.

    Args:
        cls: a class with a language modelling head.
        path: directory or repository.
        division: of the ranks.
        options: of `from_pretrained`.
        convert: weights by published names, and the config -> by the names here.
        hub: where to look for files.

    Returns:
        The model in evaluation mode on this rank's device, without gradients.

    Raises:
        ValueError: an option that a divided model does not take, numbers of ranks that do not
            divide it, missing, unexpected or wrongly shaped weights.
    """
    function = f"{cls.__name__}.from_pretrained({path})"
    known = {*TAKEN, *WITHOUT_EFFECT, *hub}
    if unknown := sorted(name for name in options if name not in known and options[name]):
        raise ValueError(f"{function}: a model that ranks divide takes {TAKEN}, got {unknown}")
    if not hasattr(cls, "generate"):
        raise ValueError(f"{function}: only a model with an output layer can be divided")
    config = options.get("config") or cls.config_class.from_pretrained(path, **hub)
    split, stages = division.tensor, division.stages
    if split is not None:
        check_divisible(function, config, split.size)

    def find(name: str) -> Any:
        return find_file(path, name, **hub)

    files = weight_files(find)
    dtype = options.get("dtype", options.get("torch_dtype", "auto"))
    dtype = dtype_of(config, files) if dtype in ("auto", None) else dtype
    chosen = {n: options[n] for n in ("attn_implementation",) if options.get(n) is not None}
    with torch.device("meta"), init.no_init_weights():
        model = cls._from_config(config, dtype=dtype, **chosen)
    names = {name for name, _ in model.named_parameters()}
    if split is not None:
        divide_layers(model, split)
        divide_head(model, split)
    if stages is not None:
        divide_stages(function, model, stages)
    model.to_empty(device=division.device)
    places = places_of(model, split)
    faults = read_into(
        places, files, lambda weights: convert(weights, config), names - places.keys()
    )
    if faults:
        raise ValueError(f"{function}: {'; '.join(faults)}")
    if find("generation_config.json") is not None:
        model.generation_config = GenerationConfig.from_pretrained(path, **hub)
    model.division = division
    return model.requires_grad_(False).eval()


def dtype_of(config: Any, files: list[Any]) -> torch.dtype:
    """The dtype of a config, else that of the first weight in files, as transformers chooses."""
    if isinstance(config.dtype, str):
        return getattr(torch, config.dtype)
    if config.dtype is not None:
        return config.dtype
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                if (dtype := weights.get_tensor(key).dtype).is_floating_point:
                    return dtype
    return torch.float32


@torch.no_grad()
def whole_state(model: Any) -> dict[str, Tensor] | None:
    """The weights of a model that ranks divide, by their names in a whole model, on the CPU.

    All ranks must call. One weight at a time is sent.

    Args:
        model: what `load_divided` returned.

    Returns:
        The weights on the first rank of each copy of the model, None on others.
    """
    division: Division = model.division
    split, stages = division.tensor, division.stages
    state = _own_stage(model, split)
    if stages is None:
        return state
    parts: list[Any] = [None] * stages.size
    first = dist.get_global_rank(stages.group, 0)
    # Stages follow one another in memory only on the first rank.
    for place in range(1, stages.size):
        box = [state if stages.rank == place else None]
        if stages.rank in (0, place):
            box = _pass_on(box, stages, place, first)
        parts[place] = box[0]
    if state is None or stages.rank:
        return None
    for part in parts[1:]:
        state |= {name: weight for name, weight in part.items() if name not in state}
    return state


def _pass_on(box: list[Any], stages: Split, place: int, first: int) -> list[Any]:
    if stages.rank == place:
        own = {n: w for n, w in (box[0] or {}).items() if n.startswith(OF_A_STAGE)}
        box = [own if box[0] is not None else None]
        dist.send_object_list(box, first, group=stages.group)
        return [None]
    found: list[Any] = [None]
    source = dist.get_global_rank(stages.group, place)
    dist.recv_object_list(found, source, group=stages.group)
    return found


def _own_stage(model: Any, split: Split | None) -> dict[str, Tensor] | None:
    """The whole weights of this stage's layers, on the first of the ranks that divide them."""
    kinds = {} if split is None else kinds_of(model)
    head: Any = model.lm_head.module if isinstance(model.lm_head, LastStage) else model.lm_head
    state: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        name = name.replace("lm_head.module.", "lm_head.")
        kind = kinds.get(id(weight))
        whole: Tensor | None = weight.detach()
        if split is not None and (kind is not None or weight is getattr(head, "weight", None)):
            parts = _gather(weight.detach(), split)
            if parts is None:
                whole = None
            elif kind is None:
                whole = torch.cat(parts)[: head.out_features]
            else:
                whole = paste(parts, kind)
        if whole is not None:
            state[name] = whole.cpu()
    return state if split is None or split.rank == 0 else None


def _gather(weight: Tensor, split: Split) -> list[Tensor] | None:
    """The parts of all ranks on the first, None on others."""
    first = dist.get_global_rank(split.group, 0)
    parts = [torch.empty_like(weight) for _ in range(split.size)] if split.rank == 0 else None
    dist.gather(weight.contiguous(), parts, first, group=split.group)
    return parts


@contextlib.contextmanager
def saved_whole(model: Any, options: dict[str, Any]) -> Any:
    """Options of `save_pretrained` with the gathered weights; None on ranks that write nothing.

    The ranks leave the `with` block together, after the files are written.
    """
    division = getattr(model, "division", None)
    if division is None:
        yield options
        return
    state = whole_state(model)
    writes = state is not None and dist.get_rank() == 0
    try:
        yield {**options, "state_dict": state} if writes else None
    finally:
        dist.barrier()
