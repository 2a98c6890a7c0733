"""One stage of a run: its settings as transformers' arguments, its model, its training."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from comemo.train.data.loader import make_loader
from comemo.train.models.of_stages import divided_model, save_stage, trainable_model
from comemo.train.monitor import make_callbacks, make_watch
from comemo.train.parallel.plan import Sharing, share
from comemo.train.rank_faults import Work
from comemo.train.stage import Stage
from comemo.train.trainer import RecipeTrainer

MUCH = 64e9  # bytes of pixels
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}


def train_stage(stage: Stage, device: torch.device, say: Callable[[str], None], work: Work) -> Path:
    """Train a stage from its checkpoint, or from the stage before, to its end.

    Args:
        stage: `steps` is counted; `checkpoint` is None for a stage that begins.
        device: of this rank.
        say: takes a line for the user.
        work: learns what this rank is doing.

    Returns:
        The last checkpoint.

    Raises:
        ValueError: see `recipe.train`.
        OSError: the last checkpoint could not be written.
    """
    own, data = stage.settings, stage.run.data
    sharing, precision = share(stage.run.parallel, device), stage.precision(device)
    if stage.run.parallel.plan == "fsdp" and not sharing.is_sharded:
        say("one process: parallel.plan fsdp divides nothing")
    if sharing.is_sharded:
        model, processor = divided_model(stage, sharing, precision, device)
    else:
        model, processor = trainable_model(stage, precision)
    streams = list(range(sharing.reader, own.packs_per_step, sharing.readers))
    tokenizer, config = processor.tokenizer, model.config
    common: dict[str, Any] = {"seed": stage.seed, "cache": stage.index}
    loader = make_loader(
        data,
        tokenizer,
        config,
        streams=streams,
        total=own.packs_per_step,
        epochs=own.epochs,
        **common,
    )

    def held_out() -> Any:
        own, total = [sharing.reader], sharing.readers
        return make_loader(
            data, tokenizer, config, streams=own, total=total, held_out=True, **common
        )

    most = len(streams) * data.buffer * data.max_tiles * 3 * config.vision_config.image_size[0] ** 2
    if most > MUCH:
        say(
            f"packs that are being filled hold up to {most / 1e9:,.0f} GB of pixels in each"
            " process: a smaller data.buffer or packs_per_step, or more processes, need less"
        )
    arguments = make_arguments(stage, device, sharing)
    if arguments.n_gpu > 1:
        say(
            f"{arguments.n_gpu} GPUs are visible and one is used; for all of them:"
            f" torchrun --nproc-per-node {arguments.n_gpu} -m comemo train ..."
        )
        arguments._n_gpu = 1  # otherwise Trainer would copy the model in every step (DataParallel)
    trainer = RecipeTrainer(
        model,
        arguments,
        loader=loader,
        streams=streams,
        save=lambda folder, weights=None: save_stage(stage, model, processor, folder, weights),
        watch=make_watch(own),
        held_out=held_out if data.eval else None,
        eval_every=own.eval_every,
        shard_optimizer=stage.run.shard_optimizer,
        sharing=sharing,
        in_parts=stage.in_parts(sharing.is_sharded),
        tell=say,
    )
    work.trainer = trainer
    callbacks = make_callbacks(stage.run, stage.name, processor, trainer)
    for callback in callbacks:
        trainer.add_callback(callback)
    resume = None
    if stage.checkpoint is not None:
        trainer.load_data_state(stage.checkpoint)
        resume = str(stage.checkpoint)
    try:
        with warnings.catch_warnings():
            # Nobody writes into the outputs that FSDP warns of.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            trainer.train(resume_from_checkpoint=resume)
    finally:
        for callback in callbacks:
            callback.close()
        loader.close()
    if trainer.not_written is not None:
        raise OSError(f"{trainer.not_written}: make room and run the same command again")
    return stage.folder / f"checkpoint-{stage.steps}"


def make_arguments(stage: Stage, device: torch.device, sharing: Sharing) -> TrainingArguments:
    """A stage's settings as transformers' arguments.

    Args:
        stage: `steps` is counted.
        device: of this rank.
        sharing: how ranks share the model and the data.
    """
    own = stage.settings
    first, second = own.betas
    warmup = math.ceil(own.warmup * stage.steps) if own.warmup < 1 else int(own.warmup)
    return TrainingArguments(
        str(stage.folder),
        max_steps=stage.steps,
        per_device_train_batch_size=1,  # a pack
        gradient_accumulation_steps=own.packs_per_step // sharing.readers,
        learning_rate=own.learning_rate,
        lr_scheduler_type=SCHEDULES[own.schedule],
        warmup_steps=warmup,
        weight_decay=own.weight_decay,
        adam_beta1=first,
        adam_beta2=second,
        adam_epsilon=own.eps,
        max_grad_norm=own.max_grad_norm,
        neftune_noise_alpha=own.neftune_alpha,
        gradient_checkpointing=own.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        # Divided weights are sent and computed in bfloat16 by themselves.
        bf16=stage.precision(device) == "bfloat16" and not sharing.is_sharded,
        use_cpu=device.type == "cpu",
        seed=stage.seed,
        save_steps=own.save_every,
        save_total_limit=own.keep,
        logging_steps=own.log_every,
        logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,
        ignore_data_skip=True,  # the loader has its own place
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
    )
