"""Distributed training and inference on paper: memory and time by formula, for each plan.

Tables: `memory` of a GPU in training; `steps`, the time of a step by number of GPUs; `serving`,
memory of a GPU in inference and the least time of a token; `check`, the formulas against two real
ranks on this machine.

The time of a step begins with that of one pack on one GPU, measured for the 2B model on an H200;
other models and stages by the ratio of their FLOPs. Links have the bandwidths of datasheets. So
`steps` is computed, not measured, and what it assumes is in `bench/scaling_steps.py`. `efficiency`
is the packs per second and GPU divided by those of one GPU that takes as many packs in a step
(`--packs-per-gpu`), or all of them (`--packs`). It may exceed 1, because an update is divided, too.

`check` counts the bytes of the real collectives and times those of gloo by size. A step of two
ranks is predicted from one without communication and from its messages, sent alone (`messages_s`;
`formula_s` by their sizes): `low_s` if they overlap with computing, `high_s` if not. On a CPU they
need the same cores. Copies into and out of the messages are in none of them.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from bench.models import SIZES
from bench.recipe_batch import draw_batch
from bench.scaling_measured import (
    Timed,
    count_step,
    fit_link,
    on_ranks,
    pack_of,
    time_links,
    time_steps,
)
from bench.scaling_memory import Prompt, serving_memory, training_memory
from bench.scaling_plans import Links, Message, Plan
from bench.scaling_sizes import TRAINED, Pack, Sizes, config_of, make_units, total_flops
from bench.scaling_steps import messages, step

Row = dict[str, Any]
MEASURED = 1.104  # seconds of `finetune` of 2B, one pack, H200: results/h200/bench-b19f164
TABLES = ("memory", "steps", "serving", "check")
KIB = 2**10
LINK_SIZES = tuple(4 * KIB * 4**i for i in range(8))  # bytes of the messages that are timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    packs = parser.add_mutually_exclusive_group()
    parser.add_argument("--table", choices=TABLES, default="steps")
    parser.add_argument("--model", choices=tuple(SIZES), default="2B")
    parser.add_argument("--stage", choices=tuple(TRAINED), default="finetune")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 16, 64, 256, 1024])
    packs.add_argument("--packs", type=int, default=1024, help="of a step, over all GPUs")
    packs.add_argument("--packs-per-gpu", type=int, help="of a step; weak scaling")
    parser.add_argument("--step-seconds", type=float, help="of one pack on one GPU")
    parser.add_argument("--tokens", type=int, default=Pack().tokens, help="of a pack")
    parser.add_argument("--tiles", type=int, default=Pack().tiles, help="of a pack")
    parser.add_argument("--drop-path", action="store_true", help="in the vision tower")
    for name in ("within", "between"):
        default = getattr(Links(), name) / 1e9
        words = f"GB/s and direction of a GPU {name} nodes"
        parser.add_argument(f"--{name}", type=float, default=default, help=words)
    parser.add_argument("--repeats", type=int, default=5, help="of what `check` times")


def run(options: argparse.Namespace) -> Iterator[Row]:
    tables = {"memory": _memory, "steps": _steps, "serving": _serving, "check": _check}
    return tables[options.table](options)


def make_plans(gpus: int, of: Sizes, per_node: int = Links().per_node) -> list[Plan]:
    """Plans for so many GPUs: ddp, ZeRO-1, fsdp over all, within nodes, and with tensor."""
    if gpus == 1:
        return [Plan(1)]
    plans = [Plan(gpus), Plan(gpus, zero=True), Plan(gpus, shards=gpus)]
    together = min(gpus, per_node)
    if gpus > together and gpus % together == 0:
        plans.append(Plan(gpus, shards=together))
    for tensor in (2, 8):
        heads = (of.heads, of.kv_heads, of.mixin_heads)
        if together % tensor == 0 == gpus % together and not any(n % tensor for n in heads):
            plans.append(Plan(gpus, shards=together // tensor, tensor=tensor))
    return plans


def step_seconds(size: str, stage: str, pack: Pack) -> float:
    """Seconds of a step of one pack on one GPU: `MEASURED` by the ratio of FLOPs.

    Args:
        size: "2B" or "9B".
        stage: "pretrain" or "finetune".
        pack: what is read.
    """
    measured = total_flops(Sizes.of(config_of("2B")), Pack(), "finetune")
    return MEASURED * total_flops(Sizes.of(config_of(size)), pack, stage) / measured


def _pack(options: argparse.Namespace) -> Pack:
    return Pack()._replace(tokens=options.tokens, tiles=options.tiles, drop_path=options.drop_path)


def _memory(options: argparse.Namespace) -> Iterator[Row]:
    config = config_of(options.model)
    of, units = Sizes.of(config), make_units(config)
    for gpus in options.gpus:
        for plan in make_plans(gpus, of):
            found = training_memory(plan, units, of, _pack(options), options.stage)
            row = {f"{name}_gb": nbytes / 1e9 for name, nbytes in found._asdict().items()}
            yield _labels(options, plan) | row | {"total_gb": found.total / 1e9}


def _steps(options: argparse.Namespace) -> Iterator[Row]:
    config = config_of(options.model)
    of, units, pack = Sizes.of(config), make_units(config), _pack(options)
    alone = options.step_seconds or step_seconds(options.model, options.stage, pack)
    links = Links(within=1e9 * options.within, between=1e9 * options.between)
    each, whole = options.packs_per_gpu, options.packs

    def time(plan: Plan, packs: int) -> Any:
        return step(plan, units, of, pack, options.stage, alone, packs, links)

    base = each or whole  # packs of one GPU, which the efficiency is relative to
    rate = base / time(Plan(1), base).seconds
    for gpus in options.gpus:
        for plan in make_plans(gpus, of):
            packs = each * plan.tensor if each else whole // plan.readers
            if not packs or (not each and whole % plan.readers):
                print(f"{gpus} GPUs, {plan.name}: {plan.readers} readers do not divide {whole}")
                continue
            found, total = time(plan, packs), packs * plan.readers
            yield _labels(options, plan) | {
                "packs": total,
                "step_s": found.seconds,
                "exposed_s": found.exposed,
                "update_s": found.update,
                "wire_gb": found.wire / 1e9,
                "efficiency": total / found.seconds / gpus / rate,
                "memory_gb": training_memory(plan, units, of, pack, options.stage).total / 1e9,
            }


def _labels(options: argparse.Namespace, plan: Plan) -> Row:
    return {"model": options.model, "stage": options.stage, "gpus": plan.gpus, "plan": plan.name}


def _serving(options: argparse.Namespace) -> Iterator[Row]:
    config, links = config_of(options.model), Links()
    of, units = Sizes.of(config), make_units(config)
    for prompt in (Prompt(), Prompt(tokens=32768, tiles=52), Prompt(batch=32)):
        for tensor in (t for t in (1, 2, 4, 8) if not (of.kv_heads % t or of.mixin_heads % t)):
            row = Message("all_reduce", 2 * prompt.batch * of.width, tensor).seconds(links)
            for stages in (1, 2, 4):
                found = serving_memory(config, units, prompt, tensor, stages, links.memory, row)
                yield {
                    "model": options.model,
                    "tensor": tensor,
                    "stages": stages,
                    "prompts": f"{prompt.batch} of {prompt.tokens}, {prompt.tiles} tiles",
                    **{f"{name}_gb": n / 1e9 for name, n in found._asdict().items() if n > 1},
                    "total_gb": found.total / 1e9,
                    "token_ms": 1e3 * found.token_seconds,
                }


def _check(options: argparse.Namespace) -> Iterator[Row]:
    config = config_of("tiny")
    of, units = Sizes.of(config), make_units(config)
    batch = draw_batch(config, 1024, 3, 4)
    points = on_ranks(2, time_links, LINK_SIZES, 4 * options.repeats)[0]
    for message, seconds in points:
        yield {
            "check": message.kind,
            "kib": message.nbytes / KIB,
            "measured_s": seconds,
            "gb_s": message.wire / seconds / 1e9,
        }
    links = {
        kind: fit_link([point for point in points if point[0].kind == kind])
        for kind in dict.fromkeys(message.kind for message, _ in points)
    }
    for kind, link in links.items():
        yield {
            "check": f"{kind}, formula",
            "latency_us": 1e6 * link.latency,
            "gb_s": link.bandwidth / 1e9,
            "largest_error": link.error,
        }
    stage, pack = options.stage, pack_of(batch)
    plans = {
        plan: messages(plan, units, of, pack, stage, itemsize=4)
        for plan in (Plan(1), Plan(2), Plan(2, zero=True), Plan(2, shards=2))
    }
    ranks = on_ranks(2, time_steps, config, batch, stage, plans, options.repeats)
    # The slower rank; the other one waits for it.
    alone, *times = (Timed(*map(max, *both)) for both in zip(*ranks, strict=True))
    yield {"check": "two ranks that do not communicate", "measured_s": alone.step}
    for (plan, wanted), timed in zip(list(plans.items())[1:], times, strict=True):
        counted, _ = on_ranks(2, count_step, config, batch, stage, plan)[0]
        yield {
            "check": plan.name,
            "formula_mb": sum(m.nbytes for m in wanted) / 1e6,
            "counted_mb": sum(counted.values()) / 1e6,
            "formula_s": sum(links[m.kind].seconds(m) for m in wanted),
            "messages_s": timed.messages,
            **_predicted(plan, timed.messages, alone),
            "measured_s": timed.step,
        }


def _predicted(plan: Plan, talking: float, alone: Timed) -> Row:
    """Seconds of a step of two ranks, if communication overlaps as far as it can, or not at all."""
    divided = plan.zero or plan.shards > 1
    computing = alone.step - alone.update * (1 - 1 / plan.gpus) * divided
    return {"low_s": max(computing, talking), "high_s": computing + talking}
