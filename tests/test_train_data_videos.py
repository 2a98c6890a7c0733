"""Videos in training data: which frames, and how they are written."""

import numpy as np
import pytest
from PIL import Image
from train_lines import (
    read,
    talk,
    words,  # noqa: F401
)

from comemo.train.data.frames import choose_frames

pytestmark = pytest.mark.usefixtures("one_thread")


def write_frames(folder, count):
    """Frame j has brightness 10 * j."""
    for j in range(count):
        Image.new("RGB", (60, 50), (10 * j,) * 3).save(folder / f"f{j}.png")
    return [f"f{j}.png" for j in range(count)]


def brightness(sample):
    return [int(tile.mean()) for tile in sample.tiles]


def test_videos(words, tmp_path):
    folder = tmp_path / "film"
    folder.mkdir()
    names = write_frames(folder, 12)
    (folder / ".hidden").write_text("none")
    frames = [Image.open(folder / name) for name in names]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    ways = {
        "folder": "film",
        "animation": "film.gif",
        "list": [f"film/{name}" for name in names],
    }
    for path in ways.values():
        line = talk("<video>\nwhat?", "a film", video=path)
        held_out = read(words, tmp_path, line, min_frames=2, max_frames=4)
        assert brightness(held_out) == [10, 40, 70, 100]  # the middle of each three
        assert held_out.grids == [(1, 1)] * 4
        marks = "\n".join(f"Frame{number}:<image>" for number in range(1, 5))
        images = [f"film/{names[j]}" for j in (1, 4, 7, 10)]
        plain = read(words, tmp_path, talk(f"{marks}what?", "a film", image=images), patch=4)
        assert (held_out.ids == plain.ids).all()
        assert (held_out.tiles == plain.tiles).all()
        assert (held_out.positions == plain.positions).all()
        few = read(words, tmp_path, line, rng=5, min_frames=2, max_frames=4)
        assert brightness(few) == brightness(
            read(words, tmp_path, line, rng=5, min_frames=2, max_frames=4)
        )
        every = read(words, tmp_path, line, min_frames=12, max_frames=20)
        assert brightness(every) == [10 * j for j in range(12)]
    for question in ("what?", "<video>what?"):
        line = talk(question, "a film", video="film")
        assert (read(words, tmp_path, line, max_frames=4, min_frames=2).ids == held_out.ids).all()
    twice = talk("<video>\n<video>\nwhat?", "a film", video="film")
    assert read(words, tmp_path, twice, max_frames=4, min_frames=2).grids == [(1, 1)] * 4


def test_frames_are_chosen_as_published():
    rng = np.random.default_rng(0)
    counts = set()
    for _ in range(200):
        chosen = choose_frames(100, rng, 4, 8)
        counts.add(len(chosen))
        bounds = np.linspace(0, 100, len(chosen) + 1).astype(int)
        inside = [
            first <= index < last - 1  # the published code never takes the last of an interval
            for index, first, last in zip(chosen, bounds[:-1], bounds[1:], strict=True)
        ]
        assert all(inside)
        near = choose_frames(9, rng, 5, 8)
        assert near == sorted(set(near))
        assert 5 <= len(near) <= 8
    assert counts == {4, 5, 6, 7, 8}
    assert choose_frames(3, rng, 4, 8) == [0, 1, 2]
    assert choose_frames(8, None, 4, 4) == [0, 2, 4, 6]
