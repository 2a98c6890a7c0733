"""transformers' Trainer with checkpoints of our own, which are whole or in parts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer

from comemo.train import ranks
from comemo.train.checkpoints import NotWritten, staging_of, write_checkpoint
from comemo.train.parallel.plan import Sharing
from comemo.train.parallel.saving import DividedStates
from comemo.train.parallel.state import Groups, is_in_parts
from comemo.train.sharding import ShardedOptimizer, whole_state

DATA_STATE = "data.pt"


class Loader(Protocol):
    """Packs of this rank's streams, one stream after the other; see `train.data.loader`."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def filler(self) -> dict[str, Any]: ...


class Saver(Protocol):
    """Writes the weights and whatever belongs to them into a folder, on the first rank.

    `weights` are those to write, None for those of the model; no weights at all if it is empty.
    """

    def __call__(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None: ...


class KeepingTrainer(Trainer):
    """Trainer that writes and reads checkpoints of a run.

    Attributes:
        loader: gives this rank's packs.
        save: writes the weights of a checkpoint.
        tell: prints a line for the user.
        sharing: how ranks share the model and the data.
        in_parts: whether each rank writes its part of checkpoints.
        names: of the parameters in each group of one process; of divided models.
        not_written: why the last checkpoint was not written, or None.
    """

    loader: Loader
    save: Saver
    tell: Any
    sharing: Sharing
    in_parts: bool
    names: Groups
    not_written: NotWritten | None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A whole checkpoint or none; a disk that is full does not end the run."""
        parts = self.sharing.gather(self.loader.state_dict())
        step, folder = self.state.global_step, Path(self.args.output_dir)
        states = self._states()
        weights: dict[str, Tensor] | None = None
        optimizer: dict[str, Any] | None = None
        if self.in_parts:
            weights = {}
        elif self.sharing.is_sharded:
            weights, optimizer = states.gather()
        else:
            optimizer = whole_state(self.optimizer)
        if ranks.is_first():

            def fill(staging: Path) -> None:
                self.save(staging) if weights is None else self.save(staging, weights)
                if self.in_parts:
                    states.write(staging)
                else:
                    torch.save(optimizer, staging / "optimizer.pt")
                torch.save(self.lr_scheduler.state_dict(), staging / "scheduler.pt")
                torch.save(parts, staging / DATA_STATE)
                self.state.save_to_json(str(staging / "trainer_state.json"))

            try:
                write_checkpoint(folder, step, fill, keep=self.args.save_total_limit)
                self.not_written = None
            except NotWritten as error:
                self.not_written = error
                self.tell(f"{error}; training goes on, older checkpoints are as they were")
        if self.in_parts:
            states.finish(staging_of(folder, step))
        ranks.wait()

    def _states(self) -> DividedStates:
        return DividedStates(self.model, self.optimizer, self.names, self.sharing.tensor)

    def load_data_state(self, checkpoint: Path) -> None:
        """Continue reading where a checkpoint was written, with any number of ranks."""
        parts = torch.load(checkpoint / DATA_STATE, weights_only=True)
        merged = {**parts[min(self.sharing.reader, len(parts) - 1)], "streams": {}}
        for part in parts:
            merged["streams"] |= part["streams"]
        if len(parts) != self.sharing.readers:
            merged.pop("faults", None)  # counted by rank
        self.loader.load_state_dict(merged)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Through the CPU; a sharded optimizer takes its own part of the state."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)

        def read(name: str) -> Any:
            return torch.load(folder / name, map_location="cpu", weights_only=True)

        schedule, groups = read("scheduler.pt"), len(self.optimizer.param_groups)
        for name in ("base_lrs", "_last_lr", "lr_lambdas"):  # the same in all groups
            schedule[name] = schedule[name][:1] * groups
        self.lr_scheduler.load_state_dict(schedule)
        if is_in_parts(folder):
            if isinstance(getattr(self.optimizer, "optimizer", None), ShardedOptimizer):
                raise ValueError(
                    f"train: {folder} was written in parts: to go on with it, choose parallel.plan"
                    " fsdp, or shard_optimizer false"
                )
            self._states().read(folder)
        elif self.sharing.is_sharded:
            self._states().hand_out(read("optimizer.pt") if ranks.is_first() else None)
        else:
            self.optimizer.load_state_dict(read("optimizer.pt"))

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the model was made from the checkpoint."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: random numbers come from the step."""
