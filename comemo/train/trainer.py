"""transformers' Trainer for packs: what differs from its loop, and nothing else.

A step takes one pack of each stream. This rank handles the streams rank, rank + ranks, ...: one
micro-batch each. Random numbers of a micro-batch (drop path, noise, dropout) come from the seed,
the step and the stream. So neither the number of ranks nor a resumed run changes what is computed.
"""

import hashlib
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from comemo.images import normalise_pixels
from comemo.train.checkpoints import NotWritten
from comemo.train.keeping import KeepingTrainer, Loader, Saver
from comemo.train.parallel.gradients import clip, split_by_mesh, squares_by_name
from comemo.train.parallel.plan import Sharing
from comemo.train.parallel.state import Groups
from comemo.train.sharding import shard
from comemo.train.steps import (
    Sample,
    StepReport,
    over_ranks,
    read_of,
    sample_sums,
    sum_by_dataset,
    weight_of,
)

_PRIVATE = ("samples", "stream")  # keys of a batch that the model does not take


class Watcher(Protocol):
    """Is asked about each step before the optimizer changes weights, on all ranks."""

    def __call__(self, trainer: "RecipeTrainer", report: StepReport) -> None: ...


class RecipeTrainer(KeepingTrainer):
    """Trains on packs.

    Args:
        model: on any device.
        args: `max_steps` is set; the micro-batches of a step are the streams of this rank.
        loader: gives this rank's packs.
        streams: indices of this rank's streams, in the order of `loader`.
        save: writes the weights of a checkpoint.
        watch: may refuse a step.
        held_out: a function that makes a loader of held-out packs, or None.
        eval_every: steps between evaluations; 0 for one at the end.
        shard_optimizer: whether ranks divide the optimizer's state.
        sharing: how ranks share the model and the data.
        in_parts: whether each rank writes its part of checkpoints.
        tell: prints a line for the user.

    Attributes:
        step_report: of the last step.
        batches: packs of the current step, on the CPU.
        in_work: samples of the pack that is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loader: Loader,
        streams: list[int],
        save: Saver,
        watch: Watcher,
        held_out: Any = None,
        eval_every: int = 0,
        shard_optimizer: bool = False,
        sharing: Sharing | None = None,
        in_parts: bool = False,
        tell: Any = print,
    ) -> None:
        self.sharing, self.in_parts = sharing or Sharing(), in_parts
        self.names: Groups = []
        self.loader, self.streams = loader, streams
        self.save, self.watch, self.tell = save, watch, tell
        self.held_out, self.eval_every = held_out, eval_every
        self.shard_optimizer = shard_optimizer
        self.step_report = StepReport()
        self.batches: list[dict[str, Any]] = []
        self.in_work: list[Sample] = []
        self.not_written: NotWritten | None = None
        self._sums: list[tuple[Tensor, Tensor]] = []
        self._norm: Any = None
        self._clock = time.perf_counter()
        super().__init__(model, args, callbacks=[_Hooks(self)])
        handler = self.accelerator.ddp_handler
        if handler is not None:
            handler.gradient_as_bucket_view = True  # else DDP keeps a copy of all gradients
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the divisor below is that of the whole step

    # --- what is read ---

    def get_train_dataloader(self) -> Any:
        return self.loader

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """The packs of a step, and the sum of all weights of its labels over all ranks."""
        start = time.perf_counter()
        batches = []
        for stream in self.streams:
            batches.append({**next(epoch_iterator), "stream": stream})
        report = read_of(batches)
        report.data_seconds = time.perf_counter() - start
        self.step_report, self.batches, self._sums = report, batches, []
        weight = sum(self.sharing.gather(sum(map(weight_of, batches))))
        # Without any label the loss is 0, not 0 / 0.
        return batches, torch.tensor(weight or 1.0, dtype=torch.float32, device=device)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        tiles = inputs.get("pixel_values")
        inputs = {name: value for name, value in inputs.items() if name not in _PRIVATE}
        inputs["cu_seqlens"] = inputs["cu_seqlens"].tolist()  # read on the CPU, without a sync
        inputs = super()._prepare_inputs(inputs)
        if tiles is not None:
            inputs["pixel_values"] = normalise_pixels(inputs["pixel_values"])
        return inputs

    # --- what is computed ---

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        torch.manual_seed(seed_of(self.args.seed, self.state.global_step, inputs["stream"]))
        self.in_work = inputs["samples"]
        if self.sharing.is_sharded:
            # Replicas exchange gradients once for all packs of a step.
            self.model.set_requires_all_reduce(inputs["stream"] == self.streams[-1])
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.in_work = []
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """sum(w * l) of a pack divided by sum(w) of the whole step.

        Ranks that read different packs average gradients, therefore times their number.
        """
        out = model(**inputs, skip_logits=True, num_items_in_batch=num_items_in_batch)
        bounds, weights = inputs["cu_seqlens"], inputs["loss_weights"]
        losses = out.label_losses.detach()
        self._sums.append((sample_sums(losses * weights, bounds), sample_sums(weights, bounds)))
        loss = out.loss * self.sharing.readers
        if not loss.requires_grad:  # text alone, and no trained weight reads text
            loss = loss.detach().requires_grad_()
        return (loss, out) if return_outputs else loss

    def again(self, batch: dict[str, Any]) -> Tensor:
        """The loss of one of `batches` with the same random numbers, not reduced over ranks."""
        torch.manual_seed(seed_of(self.args.seed, self.state.global_step, batch["stream"]))
        inputs = self._prepare_inputs(batch)
        return self.model(**inputs, skip_logits=True).loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.sharing.is_sharded:
            self._norm = self._measure()
            clip(self.model, self._norm, self.args.max_grad_norm)
        else:
            self._norm = super()._clip_grad_norm(model)
        return self._norm

    def _measure(self) -> Tensor:
        """The norm of all gradients, of divided weights."""
        return torch.stack([*squares_by_name(self.model).values()]).sum().sqrt()

    def before_optimizer(self) -> None:
        """Complete the step's report, and let the watcher refuse the step."""
        for weight in self.model.parameters():
            if weight.requires_grad and weight.grad is None:
                # As on several ranks: the optimizer's averages and the decay go on without images.
                weight.grad = torch.zeros_like(weight)
        report, kept = self.step_report, self._sums
        with_samples = [pair for pair, b in zip(kept, self.batches, strict=True) if b["samples"]]
        losses, weights = [a for a, _ in with_samples], [b for _, b in with_samples]
        report.losses = sum_by_dataset(report, losses, weights)
        norm = self._norm
        if norm is None and self.sharing.is_sharded:
            norm = self._measure()
        if norm is None:  # no clipping
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        report.grad_norm, report.step = float(norm), self.state.global_step + 1
        over_ranks(report, self.sharing.gather)
        now = time.perf_counter()
        report.seconds, self._clock, self._norm = now - self._clock, now, None
        self.watch(self, report)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.sharing.is_sharded:
            decayed = set(self.get_decay_parameter_names(self.model))
            trained = [n for n, p in self.model.named_parameters() if p.requires_grad]
            self.names = [
                [name for name in trained if name in decayed],
                [name for name in trained if name not in decayed],
            ]
            optimizer.param_groups[:] = split_by_mesh(optimizer.param_groups)
        elif self.shard_optimizer:
            self.optimizer = optimizer = shard(optimizer)
        return optimizer

    # --- held-out data ---

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss over the held-out samples, of all and by dataset, and log it."""
        if self.held_out is None:
            return {}
        training, losses = self.model.training, []
        self.model.eval()
        report = StepReport()
        try:
            for batch, counts in self._held_out_batches():
                report.samples += batch["samples"]
                self.in_work = batch["samples"]
                inputs = self._prepare_inputs(batch)
                out = self.model(**inputs, skip_logits=True, num_items_in_batch=1)
                bounds, weights = inputs["cu_seqlens"], inputs["loss_weights"]
                weighted = sample_sums(out.label_losses * weights, bounds)
                if counts:
                    losses.append((weighted, sample_sums(weights, bounds)))
            self.in_work = []
        finally:
            self.model.train(training)
        report.losses = sum_by_dataset(report, [a for a, _ in losses], [b for _, b in losses])
        over_ranks(report, self.sharing.gather)
        metrics = {"eval_loss": report.loss}
        if len(report.losses) > 1:
            for name, (loss, weight) in report.losses.items():
                metrics[f"eval_loss/{name}"] = loss / weight if weight else 0.0
        self.log(metrics)
        self._clock = time.perf_counter()
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _held_out_batches(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Held-out packs, and whether they count: with divided weights as many on every rank."""
        batches = iter(self.held_out())
        while True:
            batch = next(batches, None)
            if not self.sharing.is_sharded and batch is None:
                return
            if self.sharing.is_sharded and not any(self.sharing.gather(batch is not None)):
                return
            yield (self.loader.filler(), False) if batch is None else (batch, True)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.sharing.is_sharded:  # whose parts have their places
            super()._move_model_to_device(model, device)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # Trainer's epoch is the share of all steps, which is not what it says.
        self.state.epoch = None
        super().log(logs, *args, **kwargs)


class _Hooks(TrainerCallback):
    """Moments of Trainer's loop that have no method to override."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._clock = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.before_optimizer()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        if trainer.held_out is None:
            return
        due = trainer.eval_every and step % trainer.eval_every == 0
        if due or step >= state.max_steps:
            control.should_evaluate = True


def seed_of(seed: int, step: int, stream: int) -> int:
    """The seed of the random numbers of one micro-batch."""
    digest = hashlib.blake2b(f"{seed} {step} {stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
