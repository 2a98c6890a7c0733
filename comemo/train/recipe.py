"""The recipe: the stages of a run one after the other, from where an earlier call stopped."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import distributed as dist

from comemo.device import parse_device
from comemo.parallel.environment import complete_environment
from comemo.train import ranks
from comemo.train.accelerated import refuse_accelerate
from comemo.train.checkpoints import clean_up, discard, find_checkpoint, step_of, write_folder
from comemo.train.config import difference, read_settings, write_settings
from comemo.train.config.conflicts import parallel_faults
from comemo.train.data.plan import Plan, plan
from comemo.train.launchers import await_ranks
from comemo.train.models.of_stages import save_model, trained_by
from comemo.train.models.start import start_config
from comemo.train.parallel.plan import check_ranks
from comemo.train.rank_faults import Work
from comemo.train.settings import TrainSettings
from comemo.train.stage import Stage, start_of
from comemo.train.training import train_stage
from comemo.train.watch_ranks import watch_ranks

SETTINGS = "settings.yaml"  # of a run, in its folder
MODEL = "model"  # the trained model, in its folder
ORIGIN = "training.json"  # in the trained model: the stage that it comes from
LOCK = ".lock"
TIMEOUT = timedelta(hours=2)  # ranks wait while the first counts what it will read, or writes
LOCK_SECONDS = 20.0  # for a process that was killed to be gone

Tell = Callable[[str], None]


def train(settings: TrainSettings, tell: Tell = print) -> Path:
    """Train all stages of `settings.run`; a run that was interrupted goes on where it was.

    On several ranks (torchrun, `accelerate launch`, srun) all call it; when one of them fails, all
    end, see `watch_ranks`. The folder has the settings, for each stage its checkpoints and logs,
    and after the last stage the model.

    Args:
        settings: what `read_settings` returns.
        tell: takes a line for the user, on the first rank; on others one that says which failed.

    Returns:
        The folder of the trained model, a checkpoint in the published layout.

    Raises:
        ValueError: wrong settings or data, settings that differ from those of the run that goes
            on, a loss that is not finite.
        OSError: a missing file, a full disk at the end, another process that trains in the folder.
        OtherRankFailed: this rank could not go on without another one, which failed.
    """
    device = _join(settings)
    say = tell if ranks.is_first() else _quiet
    output = Path(settings.output)
    with watch_ranks(tell) as work, _locked(output, say):
        ranks.on_first(lambda: _keep_settings(settings, output))
        finished: list[Stage] = []
        for name in settings.run:
            stage = Stage(settings, name, output / name, tuple(finished))
            _run(stage, device, say, work)
            finished.append(stage)
        target = output / MODEL
        ranks.on_first(lambda: _export(finished[-1], device, target))
    return target


def check(settings: TrainSettings, name: str | None = None) -> Plan:
    """Read all texts and the sizes of all images, and count what a stage will read.

    Args:
        settings: what `read_settings` returns; `output` is not needed.
        name: of a stage; None for the first.

    Returns:
        Numbers of samples, tokens, tiles, packs and steps, and bad samples by kind, of all epochs
        of the stage; of one if it has `steps`.

    Raises:
        ValueError, OSError: as `train`.
    """
    stage = settings.stages[settings.run[0] if name is None else name]
    config, tokenizer = start_config(start_of(settings))
    return plan(
        settings.data,
        tokenizer,
        config,
        total=stage.packs_per_step,
        seed=settings.seed,
        epochs=stage.epochs or 1.0,
    )


def _run(stage: Stage, device: torch.device, say: Tell, work: Work) -> None:
    """Train one stage to its end, if it is not there yet."""
    work.begin(stage.name)
    stage.steps = ranks.on_first(lambda: _count_steps(stage))
    stage.checkpoint, faults = ranks.on_first(lambda: _find(stage.folder))
    for fault in faults:
        say(f"{fault}; it is removed")
    if stage.checkpoint is not None:
        done = step_of(stage.checkpoint)
        if done >= stage.steps:
            say(f"stage {stage.name}: finished, {done:,} steps")
            return
        say(f"stage {stage.name}: goes on after step {done:,} of {stage.steps:,}")
    stage.checkpoint = train_stage(stage, device, say, work)
    _free()


def _free() -> None:
    """Free a stage's model and optimizer, which are in cycles of objects, for the next stage."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)


def _find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint; what is newer, and what a killed process left, is removed."""
    clean_up(folder)
    checkpoint, faults = find_checkpoint(folder)
    for path in folder.glob("checkpoint-*"):
        if checkpoint is None or step_of(path) > step_of(checkpoint):
            discard(path)
    return checkpoint, faults


def _export(stage: Stage, device: torch.device, target: Path) -> None:
    """Write the model after the last stage, if it is not there yet."""
    origin = json.dumps({"stage": stage.name, "steps": stage.steps})
    note = target / ORIGIN
    if note.is_file() and note.read_text(encoding="utf-8") == origin:
        return
    model, processor = trained_by(stage)
    if stage.precision(device) == "bfloat16":
        model = model.to(torch.bfloat16)

    def fill(folder: Path) -> None:
        save_model(model, processor, folder)
        (folder / ORIGIN).write_text(origin, encoding="utf-8")

    write_folder(target, fill)


def _count_steps(stage: Stage) -> int:
    own = stage.settings
    if own.steps is not None:
        return own.steps
    config, tokenizer = start_config(start_of(stage.run))
    counted = plan(
        stage.run.data,
        tokenizer,
        config,
        total=own.packs_per_step,
        seed=stage.seed,
        epochs=own.epochs or 1.0,
        cache=stage.index,
    )
    if not counted.steps:
        raise ValueError(f"train: stage {stage.name}: there is no good sample in the data")
    return counted.steps


def _join(settings: TrainSettings) -> torch.device:
    """Join the other ranks, if this process was launched as one of several."""
    from accelerate import PartialState

    if not settings.output:
        raise ValueError("train: output must be the folder of the run, got ''")
    if not settings.run or not set(settings.run) <= settings.stages.keys():
        names = ", ".join(settings.stages) or "none"
        raise ValueError(f"train: run must name stages of {names}, got {list(settings.run)}")
    if faults := parallel_faults(settings):
        raise ValueError(f"train: {'; '.join(faults)}")
    refuse_accelerate(os.environ)
    device = parse_device(None if settings.device == "auto" else settings.device)
    complete_environment()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not dist.is_initialized():
            await_ranks()
            if settings.parallel.offload and device.type != "cpu":
                # Weights on the CPU are exchanged by gloo, where accelerate starts NCCL alone.
                dist.init_process_group("cpu:gloo,cuda:nccl", timeout=TIMEOUT)
        device = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT).device
    world = ranks.world_size()
    try:
        check_ranks(settings.parallel, world)
    except ValueError as error:
        raise ranks.on_all(error)  # noqa: B904  (the same exception)
    readers = world // settings.parallel.tensor
    for name in settings.run:
        packs = settings.stages[name].packs_per_step
        if packs % readers:
            fits = ", ".join(str(n) for n in range(1, packs + 1) if not packs % n)
            raise ranks.on_all(
                ValueError(
                    f"train: stages.{name}.packs_per_step must be a multiple of the number of"
                    f" ranks that read different packs, {readers}, got {packs}, which these"
                    f" numbers divide: {fits}"
                )
            )
    return device


@contextlib.contextmanager
def _locked(output: Path, say: Tell) -> Iterator[None]:
    """Only one run writes into a folder; one that was killed has a moment to be gone."""
    lock = FileLock(output / LOCK, timeout=0)

    def acquire() -> None:
        output.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=LOCK_SECONDS / 10)
            return
        say(f"{output}: waiting for another process that trains in it to end")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise OSError(
                f"train: another process trains in {output}, and did not end within"
                f" {LOCK_SECONDS:.0f} s: stop it, or choose another output"
            ) from error

    ranks.on_first(acquire)
    try:
        yield
    finally:
        lock.release()


def _keep_settings(settings: TrainSettings, output: Path) -> None:
    """Write the settings of a new run; refuse to go on with others, or where somebody's files are.

    In the folder of a run, checkpoints that are not whole and an older model are removed.
    """
    file = output / SETTINGS
    if not file.exists():
        for name in (*settings.run, MODEL):
            if (output / name).exists():
                raise ValueError(
                    f"train: {output} has {name!r} but no {SETTINGS}, so it is not the folder of a"
                    " run: choose another output"
                )
    else:
        changed = difference(read_settings(file), settings)
        if changed:
            raise ValueError(
                f"train: {output} has a run with other settings: {'; '.join(changed)}. Take them"
                " back to go on with it, or choose another output"
            )
    partial = file.with_suffix(".partial")
    write_settings(settings, partial)
    partial.replace(file)


def _quiet(line: str) -> None:
    """What other ranks than the first tell."""
