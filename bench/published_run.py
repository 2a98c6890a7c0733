"""The published code beside ours: in a process with a Python of its own.

The published package has the name of ours and needs transformers 4.37 to 4.41. So it is not
imported here: `bench/published_child.py` runs it, with the same weights, widths, prompt and
pictures, and answers greedily. Without it `bench chat` times a stand-in, its way called
"published, as reimplemented here".
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from bench.ways import Row
from comemo.chat.driver import build_prompt

CHILD = Path(__file__).with_name("published_child.py")
WAY = "published code"
INSTALL = """\
python -m bench chat --published: {reason}
It needs the published code and its transformers, apart from this project:
  git clone https://github.com/LALBJ/CoMemo.git CoMemo
  python -m venv published && published/bin/pip install -r CoMemo/requirements.txt
  python -m bench chat --published --published-at CoMemo --published-python published/bin/python"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--published", action="store_true", help="time the published code, too")
    words = "the published repository, and folders with packages that it needs (pip --target)"
    parser.add_argument("--published-at", nargs="+", type=Path, default=[], help=words)
    words = "a Python with transformers 4.37 to 4.41, default: this one"
    parser.add_argument("--published-python", type=Path, default=Path(sys.executable), help=words)


def check(options: argparse.Namespace) -> dict[str, Any]:
    """Versions of the published code's environment.

    Raises:
        SystemExit: it is not there, with what to install.
    """
    if not options.published_at:
        raise SystemExit(INSTALL.format(reason="--published-at names no folder"))
    with tempfile.TemporaryDirectory() as folder:
        found = _child(options, Path(folder), {"check": True})
    if found["replaced"]:
        print(f"not installed beside the published code, and not called: {found['replaced']}")
    print(f"published code: transformers {found['transformers']}, torch {found['torch']}")
    return found


def time_published(
    model: Any,
    processor: Any,
    images: Sequence[tuple[torch.Tensor, tuple[int, int]]],
    history: Sequence[tuple[str, str]],
    question: str,
    options: argparse.Namespace,
) -> tuple[Row, list[int]]:
    """How the published code answers a question of a conversation: columns of a row, and tokens.

    Args:
        model: ours; its weights are written in the published layout.
        processor: its tokenizer makes the prompt.
        images: pixels [T, 3, 448, 448] and grid (cols, rows) of each.
        history: questions and answers before.
        question: the one that is answered.
        options: of `bench chat`.
    """
    config, counts = model.config, [len(pixels) for pixels, _ in images]
    tokens = [count * config.tokens_per_tile for count in counts]
    turns = [*history, (question, None)]
    grids = [grid for _, grid in images]
    prompt = build_prompt(model, processor.tokenizer, turns, None, tokens, grids)
    inputs = {
        "input_ids": prompt.input_ids,
        "attention_mask": torch.ones_like(prompt.input_ids),
        "position_ids": prompt.position_ids,
        "cross_attention_media_position_ids": prompt.position_ids[prompt.image_mask][None],
        "pixel_values": torch.cat([pixels for pixels, _ in images]),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _no_progress_bar():
            model.save_pretrained(folder / "checkpoint", save_original_format=True)
        save_file({n: t.contiguous() for n, t in inputs.items()}, folder / "inputs.safetensors")
        job = {
            "check": False,
            "checkpoint": str(folder / "checkpoint"),
            "dtype": options.dtype,
            "image_id": config.image_token_id,
            "threads": torch.get_num_threads(),
            "tokens": options.tokens,
        }
        found = _child(options, folder, job)
    times = found["times"]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    row: Row = {
        "way": WAY,
        "first_s": times[0],
        "token_s": statistics.median(gaps) if gaps else float("nan"),
        "read_tokens": prompt.input_ids.shape[1],
        "peak_gib": found["peak_gib"],
    }
    return row, found["tokens"]


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws none inside the block: stderr has the benchmark's own."""
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _child(options: argparse.Namespace, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What the child process found."""
    folders = [str(path.resolve()) for path in options.published_at]
    (folder / "job.json").write_text(json.dumps(job | {"folders": folders}))
    command = [str(options.published_python), str(CHILD), str(folder)]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise SystemExit(INSTALL.format(reason=f"{command[0]}: {error.strerror}")) from None
    result = folder / "result.json"
    if done.returncode or not result.is_file():
        raise RuntimeError(f"the published code failed:\n{done.stderr[-4000:]}")
    found = json.loads(result.read_text())
    if "error" in found:
        raise SystemExit(INSTALL.format(reason=found["error"]))
    return found
