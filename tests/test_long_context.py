"""`examples/long_context`: the six configurations differ as its page says, and in nothing else."""

import importlib.util
import re
import sys
from random import Random

import pytest
import torch

from comemo import CoMemoConfig, CoMemoForConditionalGeneration
from comemo.nano.scenes import SEEDS
from comemo.nano.start import make_start
from examples.long_context import __main__ as command
from examples.long_context import training
from examples.long_context.configurations import configurations, wanted_pictures
from examples.long_context.conversations import IGNORED, IMAGE, Sample, Writer, listing
from examples.long_context.evaluation import evaluate, grade
from examples.long_context.paths import PATHS, ROPES, arguments, collate, make_model
from examples.long_context.pictures import Pictures, make_shapes
from examples.long_context.reports import across_seeds, write_reports
from examples.long_context.training import Recipe, make_batch, train

TILES = (1, 5, 10)  # with thumbnails
END = 11  # a new line


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Like comemo-nano, but smaller."""
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    text = {"architectures": ["InternLM2ForCausalLM"], "vocab_size": 256, "num_hidden_layers": 1}
    text |= {"num_key_value_heads": 2, "bias": False}
    vision = {"num_hidden_layers": 1, "image_size": 64, "patch_size": 8}
    mixin = {"language_dim": 32, "vision_dim": 32, "head_dim": 16, "num_heads": 2}
    mixin |= {"intermediate_size": 64, "mixin_every_n_layers": 1}
    config = CoMemoConfig(llm_config=text | width, vision_config=vision | width, mixin_config=mixin)
    folder = tmp_path_factory.mktemp("small")
    CoMemoForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def writer():
    """About six pictures whose features are random."""
    counts = [TILES[i % 3] for i in range(6)]
    starts = torch.tensor([0, *counts]).cumsum(0).tolist()
    features = torch.randn(starts[-1], 16, 128, generator=torch.Generator().manual_seed(0)).half()
    grids = [(round((tiles - 0.5) ** 0.5),) * 2 for tiles in counts]
    pictures = Pictures([make_shapes(seed) for seed in range(6)], grids, features, starts)
    return Writer(lambda text: [1 + ord(letter) % 128 for letter in text], pictures)


def talk(writer, *indices):
    sample = Sample()
    for index in indices:
        writer.show(sample, index)
        writer.ask(sample, writer.choose(index, Random(0), 2))
    return sample


def given_for(checkpoint, writer, path, rope, *samples):
    model = make_model(checkpoint, rope, 0, END)
    return model, *arguments(model, collate(samples, writer.pictures), path)


# --- configurations ---


@pytest.mark.parametrize("rope", ROPES)
def test_paths_differ_in_what_they_read(checkpoint, writer, rope):
    """No memory, no image tokens, or both; the words, their ids and their labels are the same."""
    samples = talk(writer, 1, 2), talk(writer, 0)
    inputs = collate(samples, writer.pictures)
    found = {path: given_for(checkpoint, writer, path, rope, *samples) for path in PATHS}
    (model, context, labels), (_, memory, rest), (_, both, same) = found.values()
    assert context["image_memory"] is None
    assert torch.equal(context["inputs_embeds"], both["inputs_embeds"])
    assert torch.equal(context["position_ids"], both["position_ids"])
    assert torch.equal(labels, same)
    media = model.model.multi_modal_projector(inputs.features)
    assert torch.equal(both["image_memory"].media, media)
    assert torch.equal(memory["image_memory"].media, media)
    assert torch.equal(both["inputs_embeds"][inputs.image_mask], media)
    for row, sample in enumerate(samples):
        text = torch.tensor(sample.ids) != IMAGE
        (words,) = text.nonzero(as_tuple=True)
        for name in ("inputs_embeds", "position_ids"):
            assert torch.equal(memory[name][row, : len(words)], both[name][row, words]), name
        assert rest[row, : len(words)].tolist() == labels[row, words].tolist()
        assert (rest[row, len(words) :] == IGNORED).all()
    most = max(sum(i != IMAGE for i in sample.ids) for sample in samples)
    assert memory["inputs_embeds"].shape[1] == most


def test_only_the_memory_path_runs_mixin_layers(checkpoint, writer, monkeypatch):
    for path in PATHS:
        model, given, labels = given_for(checkpoint, writer, path, "dhr", talk(writer, 1))
        model(**given, labels=labels).loss.backward()
        mixin = [p.grad for name, p in model.named_parameters() if ".mixin." in name]
        assert all(grad is None for grad in mixin) == (path == "context")
        assert model.model.multi_modal_projector[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("path", PATHS)
def test_ropes_differ_in_ids_alone(checkpoint, writer, path):
    """An image of 5 or 10 tiles takes 16 ids or all 80 or 160."""
    spans = {}
    for rope in ROPES:
        _, given, _ = given_for(checkpoint, writer, path, rope, talk(writer, 1, 2))
        ids = given["position_ids"][0]
        spans[rope] = int(ids.max()) + 1
        if path != "context":
            biases = given["image_memory"].biases[0]
            assert given["image_memory"].ids.max() == (15 if rope == "dhr" else 159)
            assert int(biases[0]) == len("<img>")
    words = sum(i != IMAGE for i in talk(writer, 1, 2).ids)
    assert spans == {"dhr": words + 2 * 16, "original": words + 80 + 160}


def test_a_seed_has_one_start_for_all(checkpoint):
    """New layers are those of the seed; projector and words are the trained ones."""
    one, two, other = (
        make_model(checkpoint, *a, END) for a in (("dhr", 1), ("original", 1), ("dhr", 2))
    )
    assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))
    new = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one.state_dict()[new], other.state_dict()[new])
    trained = CoMemoForConditionalGeneration.from_pretrained(checkpoint)
    assert torch.equal(one.lm_head.weight, trained.lm_head.weight)
    assert torch.equal(
        one.model.multi_modal_projector[1].weight, trained.model.multi_modal_projector[1].weight
    )


def test_every_configuration_is_one_of_eighteen():
    chosen = configurations(3)
    assert len(set(map(str, chosen))) == 18
    assert {(c.path, c.rope) for c in chosen[:6]} == {(p, r) for p in PATHS for r in ROPES}


# --- pictures and conversations ---


def test_no_picture_is_learnt_and_asked_about():
    learnt, asked, sets = wanted_pictures(50, 10)
    assert all(w.seed in SEEDS["train"] for w in learnt)
    assert all(w.seed in SEEDS["held-out"] for w in asked)
    held = [[asked[i].seed for i in sets[name]] for name in ("tiles 1", "tiles 4", "tiles 9")]
    assert held[0] == held[1] == held[2]
    assert [asked[i].tiles for i in sets["tiles 9"]] == [9] * 10
    assert not {asked[i].seed for i in sets["short"]} & {asked[i].seed for i in sets["long"]}
    with pytest.raises(ValueError, match="make_shapes: the seed must be in one of"):
        make_shapes(-1)


def test_answers_are_what_is_learnt(writer):
    """Questions, pictures and what is between have no label."""
    sample = Sample()
    writer.show(sample, 4)
    writer.fill(sample, Random(0), 37)
    start = len(sample.ids)
    assert start == len("<img></img>\n") + writer.pictures.count(4) + 37
    assert set(sample.labels) == {IGNORED}
    writer.ask(sample, writer.choose(4, Random(0)))
    scene = writer.pictures.scenes[4]
    text = "".join(chr(i - 1) for i in sample.ids[start:])
    asked = text.splitlines()
    told = dict(zip(asked[::2], asked[1::2], strict=True))
    assert told == {
        f"Which colour is the {item.text}?": item.colour for item in scene.items.values()
    }
    counted = ["".join(chr(i - 1) for i in sample.ids[slice(*a)]) for a in sample.answers]
    assert counted == asked[1::2]
    learnt = "".join(chr(i - 1) for i in sample.labels if i != IGNORED)
    assert learnt.splitlines() == counted


def test_lists_are_counted_thing_by_thing(writer):
    sample = Sample()
    writer.describe(sample, 3)
    things = ["".join(chr(i - 1) for i in sample.ids[slice(*a)]) for a in sample.answers]
    assert [thing.strip() for thing in things] == listing(writer.pictures.scenes[3])
    text = "".join(chr(i - 1) for i in sample.labels if i != IGNORED)
    assert text.count(" and ") == 1
    assert text.endswith(things[-1] + "\n")


def test_other_pictures_lack_what_is_asked_for(writer):
    for index in range(6):
        sample, asked = Sample(), writer.choose(index, Random(index), 3)
        others = iter([*range(6)] * 1000)
        writer.chat(sample, 200, lambda others=others: next(others), asked)
        assert 1 <= len(asked) <= 3
        assert sample.pictures
        for other in sample.pictures:
            shown = {item.text for item in writer.pictures.scenes[other].items.values()}
            assert shown.isdisjoint(item.text for item in asked)
        assert not sample.answers
    with pytest.raises(ValueError, match="chat: wanted pictures without a"):
        writer.chat(Sample(), 200, lambda: 4, writer.choose(4, Random(0)))


@pytest.mark.parametrize("near", [True, False])
def test_paths_learn_from_the_same_conversations(writer, near):
    batches = [make_batch(writer, range(6), Random(3), near) for _ in range(2)]
    assert batches[0] == batches[1]
    assert len({len(sample.pictures) for sample in batches[0]}) >= 1
    assert not near or all(len(sample.pictures) == 1 for sample in batches[0])


# --- training and results ---


@pytest.mark.parametrize("path", PATHS)
def test_a_configuration_learns_a_picture(checkpoint, writer, path, monkeypatch):
    monkeypatch.setattr(training, "TOKENS", 300)
    monkeypatch.setattr(training, "NEAR", 1.0)  # there are no other pictures
    model = make_model(checkpoint, "dhr", 0, END)
    curve = train(model, path, writer, range(1, 2), 0, Recipe(steps=20, lr=1e-2))
    assert curve[-1][1] < 0.7 * curve[0][1]


def test_grades_are_those_of_a_model_that_knows(checkpoint, writer, monkeypatch):
    """All right if each label is the likeliest token; one wrong token makes its answer wrong."""
    model = make_model(checkpoint, "dhr", 0, END)
    samples = [talk(writer, 1), talk(writer, 2, 0)]

    for path in PATHS:
        _, labels = arguments(model, collate(samples, writer.pictures), path)
        likely = torch.nn.functional.one_hot(labels.roll(-1, 1).clamp(min=0), 256).float()
        (row, place) = (1, (labels[1] >= 0).nonzero()[0].item() - 1)
        likely[row, place] = 0  # the likeliest is now token 0
        monkeypatch.setattr(type(model), "forward", lambda *a, x=likely, **k: Answers(x))
        grades = grade(model, path, writer, samples)
        monkeypatch.undo()
        assert grades == [[True, True], [False, True, True, True]]


class Answers:
    def __init__(self, logits):
        self.logits = logits


def test_results_are_reported(checkpoint, writer, tmp_path, monkeypatch, capsys):
    """Numbers of the table and of the summary are right; no plots are no fault."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    sets = {"any": range(4), "tiles 4": range(2), "short": range(2), "long": range(2)}
    results = evaluate(make_model(checkpoint, "dhr", 0, END), "memory", writer, sets, (0, 20))
    asked = {(r.task, r.at): r.asked for r in results}
    count = sum(min(len(scene.items), training.MOST) for scene in writer.pictures.scenes[:4])
    assert asked["distance text", 20] == count
    assert 4 <= asked["distance pictures", 20] <= count  # few pictures lack more than one shape
    found = []
    for chosen in configurations(2):
        alone = 0.5 if chosen.rope == "dhr" else 0.4
        share = {"context": alone, "memory": 0.6, "both": 0.7 + chosen.seed / 10}[chosen.path]
        own = [r._replace(right=round(share * 100), asked=100)._asdict() for r in results]
        own.append({"task": "distance text", "at": 4096, "right": 1, "asked": 4})
        same = {"recipe": {"steps": 3}, "curve": [(3, 1.5)], "seconds": {"training": 1.0}}
        found.append(chosen._asdict() | same | {"results": own})
    files = write_reports(tmp_path, found)
    assert [file.name for file in files] == ["results.csv", "losses.csv", "summary.md"]
    assert "no matplotlib" in capsys.readouterr().out
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert len(lines) == 1 + 12 * (len(results) + 1)
    assert lines[1].split(",") == ["context", "dhr", "0", "distance text", "0", "50", "100"]
    summary = (tmp_path / "summary.md").read_text()
    caption, gain = re.findall(r"^\| caption \| (.*) \|$", summary, re.MULTILINE)
    assert caption.split(" | ")[:3] == ["50.0 ± 0.0", "60.0 ± 0.0", "75.0 ± 5.0"]
    over = ["+50.0 ± 10.0", "+87.5 ± 12.5", "+87.5 ± 12.5", "+25.0 ± 0.0"]
    assert gain.split(" | ") == [*over, "17.2"]


def test_errors_are_those_of_a_mean():
    assert across_seeds([0.5]) == (0.5, 0.0)
    assert across_seeds([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


@pytest.mark.slow  # 20 s: a tokenizer, pictures, six trainings and plots
def test_the_whole_command_runs_and_resumes(tmp_path, monkeypatch, capsys):
    make_start(tmp_path / "nano")
    options = ["--out", str(tmp_path / "run"), "--checkpoint", str(tmp_path / "nano"), "--smoke"]
    monkeypatch.setattr(sys, "argv", ["long_context", *options, "--seeds", "1", "--jobs", "1"])
    command.main()
    printed = capsys.readouterr().out
    assert "6/6" in printed
    if importlib.util.find_spec("matplotlib"):
        assert "distances.png" in printed
        assert (tmp_path / "run" / "results" / "tiles_and_lists.png").stat().st_size
    first = (tmp_path / "run" / "results" / "results.csv").read_text()
    command.main()
    assert "/6" not in capsys.readouterr().out
    assert (tmp_path / "run" / "results" / "results.csv").read_text() == first
    monkeypatch.setattr(sys, "argv", ["long_context", *options[:-1], "--jobs", "1"])
    with pytest.raises(SystemExit, match="use another --out"):
        command.main()
