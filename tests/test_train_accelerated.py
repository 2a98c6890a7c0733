"""`accelerate launch`: its options become settings, and accelerate itself does nothing."""

import pytest

pytest.importorskip("accelerate")
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from comemo.train.accelerated import take_accelerate
from comemo.train.recipe import train
from comemo.train.settings import StageSettings, TrainSettings


def environment_of(*options):
    """The variables that `accelerate launch` sets for these options."""
    parser = launch_command_parser()
    machine = ["--num_processes", "2", "--num_machines", "1", "--machine_rank", "0"]
    args = parser.parse_args([*machine, "--main_process_port", "1", *options, "script.py"])
    args.multi_gpu, args.mixed_precision = True, args.mixed_precision or "no"
    args.dynamo_backend = args.dynamo_backend or "no"
    args.num_cpu_threads_per_process = 1
    args.deepspeed_fields_from_accelerate_config = []
    before = prepare_multi_gpu_env(args)
    assert isinstance(before, dict)
    return before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], []),
        (["--mixed_precision", "bf16"], ["precision=bfloat16"]),
        (["--use_fsdp", "--fsdp_version", "2"], ["parallel.plan=fsdp"]),
        (
            [
                *("--use_fsdp", "--fsdp_version", "2", "--fsdp_offload_params", "true"),
                *("--fsdp_state_dict_type", "SHARDED_STATE_DICT"),
                *("--fsdp_activation_checkpointing", "true"),
            ],
            [
                "parallel.plan=fsdp",
                "parallel.offload=true",
                "parallel.checkpoints=sharded",
                "gradient_checkpointing=true",
            ],
        ),
        (["--use_fsdp", "--fsdp_sharding_strategy", "NO_SHARD"], []),
        (
            [
                *("--use_parallelism_config", "--parallelism_config_tp_size", "2"),
                *("--parallelism_config_dp_replicate_size", "2"),
            ],
            ["parallel.plan=fsdp", "parallel.replicas=2", "parallel.tensor=2"],
        ),
    ],
)
def test_options_become_settings(options, words, monkeypatch):
    for name in list(environment_of()):
        if name.startswith(("ACCELERATE", "FSDP", "PARALLELISM")):
            monkeypatch.delenv(name, raising=False)
    environment, notes = environment_of(*options), []
    assert take_accelerate(environment, notes.append) == words
    assert not [name for name in environment if name.startswith("ACCELERATE_USE")]
    assert bool(notes) == bool(words)


def test_a_program_sets_its_own_plan(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="ACCELERATE_USE_FSDP must be unset"):
        train(TrainSettings(output="o", run=("finetune",), stages={"finetune": StageSettings()}))


@pytest.mark.parametrize(("stage", "words"), [("1", ["shard_optimizer=true"]), ("0", [])])
def test_stages_of_zero(stage, words):
    given = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage}
    assert take_accelerate(given, [].append) == words
    given = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    given["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] = "cpu"
    assert take_accelerate(given, [].append) == ["parallel.plan=fsdp", "parallel.offload=true"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixed_precision", "fp16"], "mixed_precision must be bf16 or no, got fp16"),
        (["--dynamo_backend", "inductor"], "dynamo_backend must be no"),
        (
            ["--use_fsdp", "--fsdp_sharding_strategy", "HYBRID_SHARD"],
            "got HYBRID_SHARD: set parallel.replicas",
        ),
        (
            ["--use_parallelism_config", "--parallelism_config_sp_size", "2"],
            "sp_size must be 1, got 2",
        ),
    ],
)
def test_options_without_a_counterpart(options, message):
    environment = environment_of(*options)
    before = dict(environment)
    with pytest.raises(ValueError, match=message):
        take_accelerate(environment, [].append)
    assert environment == before
