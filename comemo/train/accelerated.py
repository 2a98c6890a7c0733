"""What `accelerate launch` asks for by the environment, as settings of a run.

accelerate would wrap the model by its own rules. Here ranks share it by `parallel`, which knows the
image memory; so the same wishes become settings, and the variables are removed.
"""

from collections.abc import Callable, MutableMapping

USES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_PARALLELISM_CONFIG")
SIZES = {"DP_REPLICATE_SIZE": "replicas", "TP_SIZE": "tensor", "CP_SIZE": "context"}

Environment = MutableMapping[str, str]


def take_accelerate(environment: Environment, note: Callable[[str], None]) -> list[str]:
    """Words of a command line for what an `accelerate launch` was given.

    Args:
        environment: of this process; variables that accelerate would act on are removed.
        note: takes a line that says what became of an option, or why it has no effect.

    Returns:
        Such as `parallel.plan=fsdp`.

    Raises:
        ValueError: an option that has no counterpart; the environment is then as before.
    """
    found: list[str] = []
    notes: list[str] = []
    if _is_on(environment, "ACCELERATE_USE_DEEPSPEED"):
        found += _of_deepspeed(environment)
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        found += _of_fsdp(environment, notes)
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        found += _of_sizes(environment)
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "bf16":
        found.append("precision=bfloat16")
    elif precision != "no":
        raise ValueError(
            f"accelerate launch: mixed_precision must be bf16 or no, got {precision}: precision is"
            " bfloat16 or float32 here"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise ValueError(f"accelerate launch: dynamo_backend must be no, got {backend}")
    for name in (*USES, "ACCELERATE_MIXED_PRECISION"):
        environment.pop(name, None)
    if found:
        notes.append(f"what accelerate launch was given is {' '.join(found)} here")
    for line in notes:
        note(line)
    return found


def refuse_accelerate(environment: Environment) -> None:
    """Refuse what accelerate would still do by itself, in a program that did not take it before.

    Raises:
        ValueError: FSDP, DeepSpeed or a parallelism config of accelerate.
    """
    found = [name for name in USES if _is_on(environment, name)]
    if found:
        raise ValueError(
            f"train: {', '.join(found)} must be unset, because ranks share the model by"
            " settings.parallel: set that instead; `comemo train` does so by itself"
        )


def _is_on(environment: Environment, name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")


def _of_fsdp(environment: Environment, notes: list[str]) -> list[str]:
    strategy = environment.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if strategy in ("3", "NO_SHARD"):
        return []
    if "HYBRID" in strategy or strategy in ("4", "5"):
        raise ValueError(
            "accelerate launch: fsdp_sharding_strategy must be FULL_SHARD, got"
            f" {strategy}: set parallel.replicas to the number of groups that have the model once"
            " each"
        )
    found = ["parallel.plan=fsdp"]
    if _is_on(environment, "FSDP_OFFLOAD_PARAMS"):
        found.append("parallel.offload=true")
    if "SHARDED" in environment.get("FSDP_STATE_DICT_TYPE", "").upper():
        found.append("parallel.checkpoints=sharded")
    if _is_on(environment, "FSDP_ACTIVATION_CHECKPOINTING"):
        found.append("gradient_checkpointing=true")
    reshard = environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()
    if strategy in ("2", "SHARD_GRAD_OP") or reshard in ("false", "shard_grad_op"):
        notes.append("fsdp: weights of a layer are always divided again after its forward pass")
    return found


def _of_deepspeed(environment: Environment) -> list[str]:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
    words: dict[str, list[str]] = {
        "0": [],
        "1": ["shard_optimizer=true"],
        "2": ["parallel.plan=fsdp"],
        "3": ["parallel.plan=fsdp"],
    }
    if stage not in words:
        raise ValueError(
            f"accelerate launch: zero_stage must be from 0 to 3, got {stage or 'a file'}: DeepSpeed"
            " is not used, and stages are shard_optimizer (1) and parallel.plan fsdp (2 and 3)"
        )
    found = list(words[stage])
    kinds = ("OPTIMIZER", "PARAM")
    names = [f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE" for kind in kinds]
    places = {environment.get(name, "none").lower() for name in names}
    if places & {"cpu", "nvme"} and "parallel.plan=fsdp" in found:
        found.append("parallel.offload=true")
    return found


def _of_sizes(environment: Environment) -> list[str]:
    found = []
    for name, setting in SIZES.items():
        size = environment.get(f"PARALLELISM_CONFIG_{name}", "1")
        if size not in ("1", "None", ""):
            found.append(f"parallel.{setting}={size}")
    size = environment.get("PARALLELISM_CONFIG_SP_SIZE", "1")
    if size not in ("1", "None", ""):
        raise ValueError(
            f"accelerate launch: parallelism_config_sp_size must be 1, got {size}: sequences are"
            " not divided among ranks"
        )
    sharded = environment.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", "1") not in ("1", "None", "")
    return ["parallel.plan=fsdp", *found] if found or sharded else []
