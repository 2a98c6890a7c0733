"""The benchmark of photographs: rows, the time to a first token, and wrong pixels."""

import math

import pytest
from timed import options_of

from bench import images

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ("--size", "400", "300", "--pictures", "5", "--rounds", "1", "--threads", "1", "2")
OURS = ["ours, 1 thread", "ours, 2 threads"]


def test_rows_of_photographs():
    rows = list(images.run(options_of(images, *SMALL, "--first-token", "2")))
    assert [(row["pass"], row["way"]) for row in rows] == [
        *(("all", way) for way in ("plain Pillow", *OURS)),
        ("decode", "ours"),
        *(("resize and cut", way) for way in OURS),
        ("normalise", "ours"),
        *(("all", way) for way in ("plain Pillow", OURS[1])),
    ]
    assert rows[-1]["case"] == "folder of 5"
    for row in rows:
        assert math.isfinite(row["us"])
        assert row["us"] > 0
        if row["pass"] == "all":
            assert row["share"] == pytest.approx(row["us"] / 2e6)
            assert row["pictures_s"] == pytest.approx(1e6 / row["us"])


def test_time_to_a_first_token_is_read(tmp_path):
    file = tmp_path / "chat.csv"
    file.write_text("# cpu: any\npass,way,first_s\nnew picture,published,9\nnew picture,ours,4.5\n")
    assert images.first_token(file) == 4.5
    file.write_text("pass,way,first_s\n")
    with pytest.raises(SystemExit, match="no row of a new picture"):
        images.first_token(file)


def test_wrong_pixels_are_not_timed(monkeypatch):
    load = images.load_image
    monkeypatch.setattr(images, "load_image", lambda *a, **k: (load(*a, **k)[0] + 1e-6, None))
    with pytest.raises(SystemExit, match="not the pixels of plain Pillow"):
        list(images.run(options_of(images, *SMALL)))
