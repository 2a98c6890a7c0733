"""Files of requests, and runs over them with comemo-nano."""

import json
import os
import signal

from PIL import Image

from comemo.batch import BatchSettings, answer_file
from comemo.batch.ranks import Rank, read_rank
from comemo.store.store import MemoryStore

COLOURS = ("red", "green", "blue", "yellow")
QUESTIONS = ("Which colour is it?", "How many words are there?", "Is there a star?", "What is it?")


def write_requests(folder, rows, name="requests.jsonl"):
    """A file of requests; text stays as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def draw(folder):
    """Pictures of one tile, and a wide one of several."""
    for i, colour in enumerate(COLOURS):
        image = Image.new("RGB", (64, 64), "white")
        image.paste(colour, (8, 8 + 4 * i, 40, 56))
        image.save(folder / f"{i}.png")
    Image.new("RGB", (128, 64), "purple").save(folder / "wide.png")


def mixed_rows():
    """Requests of many kinds: other lengths, images and options."""
    return [
        {"question": QUESTIONS[0], "image": "0.png", "id": "a"},
        {"question": "Which of both is larger, and which colour has it?", "image": ["1.png"] * 2},
        {"question": "Hello."},
        "",
        {"question": QUESTIONS[1], "image": "wide.png", "id": {"n": [1, None]}},
        {"question": QUESTIONS[2], "image": "2.png", "max_new_tokens": 3},
        {"question": "What is a word?", "system": "Be brief."},
        {"question": "And now?", "image": "0.png", "history": [["What is it?", "a square"]]},
        {"question": QUESTIONS[3], "image": "3.png", "num_beams": 2},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "1.png"}, "What?"]}]},
        {"question": QUESTIONS[0], "image": "3.png", "repetition_penalty": 1.3},
        {"question": QUESTIONS[0], "image": "2.png", "repetition_penalty": 1.3},
    ]


def answer(folder, loaded, rank=None, store=None, name="answers.jsonl", tell=None, **settings):
    """A run over requests.jsonl; returns its summary and the lines of the output."""
    settings = {
        "model": "nano",
        "batch": 1,
        "options": {"max_new_tokens": 8},
        "patience": 20,
    } | settings
    output = folder / name
    summary = answer_file(
        folder / "requests.jsonl",
        output,
        lambda: (*loaded, MemoryStore() if store is None else store),
        BatchSettings(**settings),
        rank or Rank(),
        tell=tell,
    )
    return summary, read(output)


def read(path):
    """The lines of an output, without digests; None if there is no such file."""
    if not path.exists():
        return None
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(len(row.pop("digest")) == 25 for row in rows)
    return rows


def dying(model, call):
    """Make the process kill itself in the n-th call of `generate`, counted from 1."""
    generate, calls = model.generate, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return generate(*args, **kwargs)

    model.generate = killed
    return calls


def answer_as_rank(folder, loaded, **settings):
    """A run as one of the ranks of `run_ranks`."""
    return answer(folder, loaded, read_rank(), **settings)
