"""Ranks that get other things than others: no picture, fewer samples, nothing to evaluate."""

import json

import pytest
from rank_runs import train_on
from train_runs import entries_of, make_start, settings_of, weights_of

pytest.importorskip("accelerate")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.no_virtual_gpu("forks")]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder)
    return folder


def said(text):
    turns = [{"from": "human", "value": f"{text}?"}, {"from": "gpt", "value": f"It is {text}."}]
    return {"conversations": turns}


def write(file, pictures, texts):
    rows = [said(f"{i}") | {"image": f"{i % 10}.png"} for i in range(pictures)]
    rows += [said("red" * (i + 1)) for i in range(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def of_log(output, key):
    """Values by step."""
    lines = (output / "pretrain" / "log.jsonl").read_text().splitlines()
    return {entry["step"]: entry[key] for entry in map(json.loads, lines) if key in entry}


@pytest.fixture
def run(start, tmp_path, monkeypatch):
    """A run over some pictures and texts, on one rank and on two: the folders of both."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # accelerate would give one rank all cores

    def run_both(pictures, texts, held_out=(0, 0), **stage):
        folders = []
        for count in (1, 2):
            folders.append(tmp_path / str(count))
            settings = settings_of(start, folders[-1], steps=None, **stage)
            settings.data.train = write(start / "train.jsonl", pictures, texts)
            if any(held_out):
                settings.data.eval = write(start / "eval.jsonl", *held_out)
            train_on(count, settings, group=count > 1)
        return folders

    return run_both


def assert_same(one, two):
    wanted, found = entries_of(one), entries_of(two)
    assert found == pytest.approx(wanted, rel=1e-5)
    weights = weights_of(two / "model")
    for name, weight in weights_of(one / "model").items():
        assert (weights[name] - weight).abs().max() < 1e-5, name


@pytest.mark.slow
def test_pictures_on_one_rank_alone(run):
    """One in an epoch: the rank that computes it is another one each time."""
    one, two = run(1, 6, epochs=4)
    assert_same(one, two)
    steps = entries_of(one)
    assert len(steps) >= 4
    seconds = {step: of_log(two, "seconds_per_step")[step] for step in steps}
    tiles = [round(per * seconds[step]) for step, per in of_log(two, "tiles_per_second").items()]
    assert set(tiles) <= {0, 1, 2}  # of one picture
    assert any(tiles)


@pytest.mark.slow
def test_no_picture_at_all(run):
    assert_same(*run(0, 6, epochs=2))


@pytest.mark.slow
def test_a_rank_runs_out_of_data_first(run):
    """Each picture fills a pack: 3 of them for the first rank, 2 for the other, which waits."""
    one, two = run(5, 0, epochs=1)
    assert_same(one, two)
    assert len(entries_of(two)) == 3
    padding = of_log(two, "padding_share")
    assert [step for step, share in padding.items() if share > 0] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("held_out", [(3, 2), (1, 0), (3, 0)])
def test_evaluation_of_fewer_packs_on_one_rank(run, held_out):
    """With one sample the other rank has nothing to evaluate."""
    one, two = run(2, 0, held_out, epochs=2, eval_every=1)
    assert_same(one, two)
    losses = of_log(one, "eval_loss")
    assert len(losses) >= 2
    assert of_log(two, "eval_loss") == pytest.approx(losses, rel=1e-5)
