"""Formulas of `bench.scaling` against real ranks: messages counted, links and steps timed.

Ranks are forks of this process that gloo joins over the loopback interface, one thread each.
"""

import functools
import itertools
import os
import pickle
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import comemo_kernels as ops
from bench.scaling_plans import Message, Plan
from bench.scaling_sizes import Pack
from comemo.conditional_generation import CoMemoForConditionalGeneration
from comemo.config import CoMemoConfig
from comemo.packing import prompt_positions
from comemo.train.parallel.plan import share
from comemo.train.parallel.shard import shard_model
from comemo.train.settings import ParallelSettings

PATIENCE = 300  # seconds until a message that does not come ends its rank
KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "broadcast_": "broadcast",
}


def on_ranks(count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Results of `function(*args)` on each of `count` forked ranks, in their order.

    Args:
        count: of ranks.
        function: may be a closure; its result can be pickled.
        args: of the function.

    Raises:
        RuntimeError: a rank raised or was killed; the message has its traceback.
    """
    with tempfile.TemporaryDirectory() as place:
        folder, pids = Path(place), []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, count, folder, function, args)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)
        found = []
        for rank in range(count):
            file = folder / f"{rank}.result"
            good, value = pickle.loads(file.read_bytes()) if file.exists() else (False, "killed")
            if not good:
                raise RuntimeError(f"on_ranks: rank {rank} failed: {value}")
            found.append(value)
        return found


def _be_rank(
    rank: int, count: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """The life of a forked rank, which never returns."""
    found: tuple[bool, Any] = (False, "ended")
    try:
        torch.set_num_threads(1)  # threads of the first process do not exist here
        store = dist.FileStore(str(folder / "store"), count)
        patience = timedelta(seconds=PATIENCE)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=patience)
        found = (True, function(*args))
        dist.destroy_process_group()
    except BaseException:  # whatever it is, the first process has to know
        found = (False, traceback.format_exc())
    finally:
        (folder / f"{rank}.result").write_bytes(pickle.dumps(found))
        os._exit(0)


class CountMessages(TorchDispatchMode):
    """Counts what this rank's collectives move, inside the `with` block.

    Attributes:
        nbytes: by kind, bytes of the whole tensors, as in `Message`.
        count: by kind, the number of collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes: Counter[str] = Counter()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            kind = KINDS[function.overloadpacket.__name__]
            self.nbytes[kind] += max(_nbytes(value) for value in args)
            self.count[kind] += 1
        return function(*args, **(kwargs or {}))


def _nbytes(value: Any) -> int:
    """Bytes of a tensor, or of tensors in lists; 0 of anything else."""
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def divide(model: CoMemoForConditionalGeneration, plan: Plan) -> nn.Module:
    """The model as a rank of the plan trains it in float32.

    Args:
        model: whole, the same on all ranks.
        plan: with gpus equal to the ranks.
    """
    if plan.shards * plan.tensor > 1:
        settings = ParallelSettings("fsdp", plan.tensor, plan.replicas)
        shard_model(model, share(settings, torch.device("cpu")), "float32", offload=False)
        return model
    return DistributedDataParallel(model) if plan.gpus > 1 else model


def make_step(
    config: CoMemoConfig, batch: dict[str, Any], stage: str, plan: Plan
) -> Callable[[], tuple[float, float]]:
    """A step of training in float32 with gradient checkpointing.

    Args:
        config: of the model, whose weights are random and the same on all ranks.
        batch: of `draw_batch`, which each rank reads.
        stage: "pretrain" or "finetune".
        plan: with gpus equal to the ranks.

    Returns:
        A function that takes a step, and returns its seconds and those of its update.
    """
    torch.manual_seed(0)
    whole = CoMemoForConditionalGeneration(config).train()
    whole.gradient_checkpointing_enable({"use_reentrant": False})
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            own = any(part in name for part in ("multi_modal_projector", "mixin"))
            parameter.requires_grad_(own or stage == "finetune")
            if name.endswith("_gate"):
                parameter.fill_(0.5)
    image = batch["input_ids"] == config.image_token_id
    bounds = torch.tensor(batch["cu_seqlens"])
    ids = prompt_positions(
        whole.model, image, bounds, batch["tile_grid"], lambda g: ops.image_tokens(g, config.side)
    )
    model = divide(whole, plan)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if plan.zero:
        optimizer = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, lr=1e-6)
    else:
        optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(**batch, position_ids=ids, use_cache=False, skip_logits=True).loss
        loss.backward()
        updating = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        end = time.perf_counter()
        return end - start, end - updating

    return run


def count_step(
    config: CoMemoConfig, batch: dict[str, Any], stage: str, plan: Plan
) -> tuple[Counter[str], Counter[str]]:
    """Bytes and numbers of the collectives of a third step, by kind; called on each rank."""
    run = make_step(config, batch, stage, plan)
    for _ in range(2):  # DDP arranges its buckets in the second step
        run()
    with CountMessages() as counted:
        run()
    return counted.nbytes, counted.count


class Timed(NamedTuple):
    """Seconds of a step, of its update, and of its messages alone, one after the other."""

    step: float
    update: float
    messages: float


def time_steps(
    config: CoMemoConfig,
    batch: dict[str, Any],
    stage: str,
    plans: dict[Plan, list[Message]],
    repeats: int,
) -> list[Timed]:
    """Times by plan, in their order; called on each rank.

    The plans take turns, after two steps of each, so that all of them find the machine as busy. The
    shortest times count: whatever else runs only adds to them.

    Args:
        config, batch, stage: as in `make_step`.
        plans: with gpus equal to the ranks or 1, and their messages.
        repeats: of each.
    """
    steps = [(make_step(config, batch, stage, plan), sent) for plan, sent in plans.items()]
    found: list[list[Timed]] = [[] for _ in plans]
    for turn in range(2 + repeats):
        for (run, sent), times in zip(steps, found, strict=True):
            dist.barrier()
            seconds = run()
            if turn >= 2:
                calls = [make_call(message) for message in sent]
                dist.barrier()
                start = time.perf_counter()
                for call in calls:
                    call()
                times.append(Timed(*seconds, time.perf_counter() - start))
    return [Timed(*map(min, zip(*times, strict=True))) for times in found]


def make_call(message: Message) -> Callable[[], Any]:
    """The collective of a message in float32, on new tensors."""
    part = torch.ones(round(message.nbytes / 4 / message.ranks))
    whole = torch.ones(len(part) * message.ranks)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": functools.partial(dist.all_reduce, whole),
        "all_gather": functools.partial(dist.all_gather_into_tensor, whole, part),
        "reduce_scatter": functools.partial(dist.reduce_scatter_tensor, part, whole),
        "broadcast": functools.partial(dist.broadcast, whole, 0),
    }
    return calls[message.kind]


def time_links(sizes: Sequence[int], repeats: int) -> list[tuple[Message, float]]:
    """Messages of each kind and size in bytes, with their shortest time; called on each rank."""
    found = []
    for size, kind in itertools.product(sizes, KINDS.values()):
        message, times = Message(kind, size, dist.get_world_size()), []
        for _ in range(1 + repeats):
            call = make_call(message)
            dist.barrier()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        found.append((message, min(times[1:])))
    return found


class Link(NamedTuple):
    """t = latency + bytes on the wire / bandwidth; `error` is the largest relative one."""

    latency: float
    bandwidth: float
    error: float

    def seconds(self, message: Message) -> float:
        """Of a message by this formula."""
        return self.latency + message.wire / self.bandwidth


def fit_link(points: list[tuple[Message, float]]) -> Link:
    """The formula of messages of one kind, by least squares of relative errors.

    Raises:
        ValueError: fewer than two messages, or times that do not grow with their sizes.
    """
    if len(points) < 2:
        raise ValueError(f"fit_link: points must be at least 2, got {len(points)}")
    rows = torch.tensor([[1 / t, m.wire / t] for m, t in points], dtype=torch.float64)
    ones = torch.ones(len(points), 1, dtype=torch.float64)
    latency, slope = torch.linalg.lstsq(rows, ones).solution.flatten().tolist()
    if slope <= 0:
        raise ValueError(f"fit_link: points must take longer with their sizes, got {points}")
    link = Link(max(latency, 0.0), 1 / slope, 0.0)
    return link._replace(error=max(abs(link.seconds(m) / t - 1) for m, t in points))


def pack_of(batch: dict[str, Any]) -> Pack:
    """Sizes of a batch of `draw_batch`."""
    labels = int((batch["labels"] != -100).sum())
    tokens, tiles = batch["input_ids"].numel(), len(batch["pixel_values"])
    return Pack(tokens, tiles, len(batch["cu_seqlens"]) - 1, labels)
