"""What the tower of comemo-nano is taught before it meets text."""

import pytest
import torch

from comemo import CoMemoForConditionalGeneration
from comemo.nano import tower
from comemo.nano.dataset import ALBUM, write_albums
from comemo.nano.scenes import Item
from comemo.nano.start import make_start

TOKENS = tower.GRID**2
THINGS = 50


def test_each_token_is_asked_for_what_it_shows():
    """Things of one brightness each: a token's pixels tell which thing it must name."""
    side = 2 * tower.GRID
    tiles = torch.arange(THINGS, dtype=torch.uint8).view(-1, 1, 1, 1) * 5
    tiles = tiles.expand(THINGS, side, side, 3).contiguous()
    names = torch.full((THINGS, tower.GRID + 1, tower.MOST), -1)
    for thing in range(THINGS):
        names[thing, : tower.GRID, 0] = 100 * thing + torch.arange(tower.GRID)
        names[thing, tower.GRID, 0] = 100 * thing + 99
    generator = torch.Generator().manual_seed(0)
    pixels, ids = tower.make_batch(tiles, names, torch.ones(THINGS), 16, generator)
    assert pixels.shape == (16, side, side, 3)
    assert ids.shape == (16, TOKENS, tower.MOST)
    mixed = 0
    for tile, own in zip(pixels, ids[..., 0].tolist(), strict=True):
        cells = tile[..., 0].unflatten(0, (tower.GRID, 2)).unflatten(2, (tower.GRID, 2))
        shown = [thing // 5 for thing in cells[:, 0, :, 0].flatten().tolist()]
        assert [one // 100 for one in own] == shown
        small = own[0] % 100 == 99
        columns = [99] * TOKENS if small else [column % tower.GRID for column in range(TOKENS)]
        assert [one % 100 for one in own] == columns
        mixed += len(set(shown)) > 1
    assert mixed >= 2


def test_shares_say_how_often_a_thing_is_shown():
    tiles = torch.zeros(THINGS, tower.GRID, tower.GRID, 3, dtype=torch.uint8)
    names = torch.arange(THINGS).view(-1, 1, 1).expand(-1, tower.GRID + 1, tower.MOST)
    shares = torch.zeros(THINGS)
    shares[THINGS // 2 :] = 1
    _, ids = tower.make_batch(tiles, names, shares, 12, torch.Generator().manual_seed(0))
    assert ids.min() >= THINGS // 2
    assert ids[:, 0, 0].unique().numel() > 6


@pytest.mark.parametrize(
    ("item", "first", "last"),
    [
        (Item("shape", "star", "red"), ["shape", "red", "star"], ["shape", "red", "star"]),
        (Item("letter", "Q", "blue"), ["letter", "blue", "Q"], ["letter", "blue", "Q"]),
        (
            Item("number", "37", "blue"),
            ["number", "blue", "3", "first"],
            ["number", "blue", "7", "second"],
        ),
        (
            Item("word", "FOX", "red"),
            ["word", "red", "FOX", "FOX", "F"],
            ["word", "red", "FOX", "FOX", "X"],
        ),
        (None, ["nothing"], ["nothing"]),
    ],
)
def test_columns_are_named_by_what_is_in_them(item, first, last):
    *columns, small = tower._said(item)
    assert len(columns) == tower.GRID
    assert (columns[0], columns[-1]) == (first, last)
    text = item is not None and item.kind != "shape"
    assert small == ([item.kind, item.colour] if text else first)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_tower_alone_learns(tmp_path):
    make_start(tmp_path / "start")
    write_albums(tmp_path / "data", 4, 0)
    before = CoMemoForConditionalGeneration.from_pretrained(tmp_path / "start")
    said = []
    seeds = range(4 * ALBUM)
    tower.teach_tower(tmp_path / "start", tmp_path / "data", seeds, 100, batch=16, say=said.append)
    assert [line.split()[1] for line in said] == ["50/100", "100/100"]
    first, last = (float(line.split()[-1]) for line in said)
    assert last < 0.8 * first
    after = CoMemoForConditionalGeneration.from_pretrained(tmp_path / "start").state_dict()
    for name, weight in before.state_dict().items():
        same = torch.equal(weight, after[name])
        assert same or "vision" in name or "projector" in name, name
