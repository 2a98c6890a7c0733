"""Run the command line in tests, and what it should print."""

import io
import shutil
import sys

import torch

import comemo
from comemo.cli import main as cli
from comemo.cli.terminal import plain

QUICK = ["--max-new-tokens", "6", "--dtype", "float32", "--device", "cpu"]


def run(capsys, *argv, stdin=None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    capsys.readouterr()
    status = cli.main([str(word) for word in argv])
    return status, *capsys.readouterr()


def fails(capsys, *argv):
    """The one line on stderr."""
    status, out, err = run(capsys, *argv)
    assert (status, out) == (2, "")
    assert err.startswith("comemo: error: ")
    assert err.count("\n") == 1
    return err


def expected(loaded, picture, question, pictures=1, grid=True, **options):
    model, tokenizer = loaded
    pixel_values, chosen = comemo.load_image(picture)
    tiles = len(pixel_values)
    answer = model.chat(
        tokenizer,
        torch.cat([pixel_values] * pictures),
        question,
        {"max_new_tokens": 6, **options},
        num_patches_list=[tiles] * pictures,
        target_aspect_ratio=[chosen] * pictures if grid else None,
    )
    return plain(answer, "\n\t")


def broken(checkpoint, tmp_path, name, content=None):
    """A copy without one file, or with other bytes in it."""
    copy = tmp_path / "broken"
    shutil.copytree(checkpoint, copy)
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    return copy
