"""Samples of training data: ids, labels, positions, tiles, cuts."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from harness import recorded
from PIL import Image
from small import make_model, place
from train_lines import (  # noqa: F401
    loader_of,
    pictures,
    read,
    reader_of,
    settings_for,
    small_config,
    talk,
    words,
    write_lines,
)

import comemo
from comemo import CoMemoConfig, load_image
from comemo.images import normalise_pixels, read_size, split_tiles, stack_tiles
from comemo.train.data.faults import BadSample
from comemo.train.data.meta import Collection
from comemo.train.data.samples import weigh
from comemo.train.settings import DataSettings

pytestmark = pytest.mark.usefixtures("one_thread")


def learnt_text(words, sample):
    """Each run of labels as text."""
    is_label = sample.labels != -100
    assert (sample.labels[is_label] == sample.ids[is_label]).all()
    runs = np.split(sample.ids, np.flatnonzero(np.diff(is_label)) + 1)
    marks = np.split(is_label, np.flatnonzero(np.diff(is_label)) + 1)
    return [
        words.convert_ids_to_tokens(run.tolist())
        for run, mark in zip(runs, marks, strict=True)
        if mark[0]
    ]


@pytest.mark.parametrize("name", ["text", "single", "multi"])
def test_samples_equal_the_published(golden, tokenizer, name):
    config = CoMemoConfig.from_pretrained(golden / "ckpt_a")
    path = golden / "train_data" / f"{name}.jsonl"
    settings = DataSettings(eval=str(path), workers=0, max_dynamic_patch=4)
    (batch,) = loader_of(tokenizer, settings, config=config, held_out=True)
    theirs = recorded(golden, "packed.safetensors", f"sample/{name}/")
    for key in ("input_ids", "labels", "position_ids"):
        assert batch[key].dtype == torch.int64
        assert torch.equal(batch[key][0], theirs[key].long())
    notes = json.loads((golden / "packed.json").read_text())[f"sample/{name}"]
    if name == "text":  # the published sample has a white picture outside the sequence
        assert "pixel_values" not in batch
        return
    tiles = batch["pixel_values"].permute(0, 2, 3, 1).contiguous().numpy()
    hashes = [hashlib.sha256(tile.tobytes()).hexdigest() for tile in tiles]
    assert hashes == notes["tile_u8_sha256"]


def test_a_pack_equals_the_published(golden, tokenizer, tmp_path):
    config = CoMemoConfig.from_pretrained(golden / "ckpt_a")
    folder = golden / "train_data"
    lines = [(folder / f"{name}.jsonl").read_bytes() for name in ("text", "single", "multi")]
    (tmp_path / "all.jsonl").write_bytes(b"".join(line.strip() + b"\n" for line in lines))
    settings = DataSettings(
        eval=str(tmp_path / "all.jsonl"), root=str(folder), workers=0, max_dynamic_patch=4
    )
    (batch,) = loader_of(tokenizer, settings, config=config, held_out=True)
    theirs = recorded(golden, "packed.safetensors", "packed3/")
    for key in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[key], theirs[key].long())
    assert torch.equal(batch["loss_weights"], theirs["loss_weight"])
    assert batch["cu_seqlens"].tolist() == theirs["cu_seqlens"][0].tolist()
    assert torch.equal(batch["pixel_values"].permute(0, 2, 3, 1), theirs["pixel_u8"][1:])
    assert batch["tile_grid"] == [(2, 1), (1, 2), (1, 1)]
    assert batch["samples"] == [("all", settings.eval, line) for line in (1, 2, 3)]


def test_pixels_are_normalised_bit_by_bit(photograph):
    tiles, _ = split_tiles(photograph, max_num=6)
    whole, _ = load_image(photograph, max_num=6)
    pixels = torch.from_numpy(stack_tiles(tiles))
    assert pixels.dtype == torch.uint8
    assert torch.equal(normalise_pixels(pixels), whole)
    for wrong in (pixels.float(), pixels[0], pixels.transpose(1, 2)):
        with pytest.raises(ValueError, match="normalise_pixels: pixels must be uint8"):
            normalise_pixels(wrong)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_size_is_read_without_decoding(tmp_path, orientation, kind):
    path, exif = tmp_path / f"a.{kind}", Image.Exif()
    if orientation is not None:
        exif[274] = orientation
    Image.new("RGB", (30, 20)).save(path, exif=exif)
    for published in (False, True):
        opened = comemo.images.open_image(path, published=published)
        assert read_size(path, published=published) == opened.size
    with pytest.raises(FileNotFoundError):
        read_size(tmp_path / "none.png")
    path.write_bytes(b"none")
    with pytest.raises(ValueError, match="not an image"):
        read_size(path)


@pytest.mark.parametrize("rope", ["dhr", "original"])
@pytest.mark.parametrize(("order", "thumbnail"), [("row", True), ("column", True), ("row", False)])
def test_positions_are_those_of_the_model(words, pictures, rope, order, thumbnail):
    model = make_model(vocab_size=words.convert_tokens_to_ids("</box>") + 1)
    config = model.config
    config.rope, config.tile_order, config.use_thumbnail = rope, order, thumbnail
    config.image_token_id = words.convert_tokens_to_ids("<IMG_CONTEXT>")
    lines = [
        talk("what?", "a boat", image="w.png"),
        talk("no picture?", "none"),
        talk("<image> or\n<image>?", "one", "which?", "two", image=["t.png", "w.png"]),
    ]
    path = write_lines(pictures / "a.jsonl", lines)
    settings = settings_for("", eval=path, max_tokens=2000, max_sample_tokens=2000)
    (batch,) = loader_of(words, settings, config=config, held_out=True)
    batch = place(batch)
    pixels = normalise_pixels(batch["pixel_values"])
    given = {"input_ids": batch["input_ids"], "pixel_values": pixels, "use_cache": False}
    given |= {"tile_grid": batch["tile_grid"], "cu_seqlens": batch["cu_seqlens"]}
    ours = model(**given, position_ids=batch["position_ids"]).logits
    assert torch.equal(ours, model(**given).logits)
    others = batch["position_ids"].flip(1)
    assert not torch.equal(ours, model(**given, position_ids=others).logits)


def test_labels_are_answers_with_their_stop_token(words, tmp_path):
    sample = read(words, tmp_path, talk("one?", " it is 1 ", "two?", "2\nand more."))
    first, second = learnt_text(words, sample)
    assert words.convert_tokens_to_string(first[:-1]).strip() == "it is 1"
    assert words.convert_tokens_to_string(second[:-1]).strip() == "2\nand more."
    assert first[-1] == second[-1] == "<|im_end|>"
    assert sample.weight == weigh("square", len(first) + len(second))


def test_weights_of_labels():
    assert [weigh(rule, 4) for rule in ("token", "sample", "square")] == [1, 0.25, 0.5]
    with pytest.raises(ValueError, match="loss_weight must be one of"):
        weigh("mean", 4)


def test_control_tokens_in_text(words, pictures):
    context, stop = words.convert_tokens_to_ids(["<IMG_CONTEXT>", "<|im_end|>"])
    line = talk("what is <IMG_CONTEXT>?", "a <|im_end|> token")
    sample = read(words, pictures, line)
    assert context not in sample.ids
    assert (sample.labels == stop).sum() == 1
    with pytest.raises(BadSample, match="marks and images differ"):
        read(words, pictures, line, published_text=True)
    line = talk("what?", "a <|im_end|> token")
    assert (read(words, pictures, line, published_text=True).labels == stop).sum() == 2


def test_roles_and_content_of_chat_messages(words, pictures):
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    messages = [
        {"role": "system", "content": "short."},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "a boat"},
    ]
    ours = read(words, pictures, {"image": "w.png", "conversations": messages})
    plain = read(words, pictures, talk("<image>\nwhat?", "a boat", image="w.png", id=7))
    assert (ours.ids == plain.ids).all()
    bare = read(words, pictures, talk("what?", "a boat", image=["w.png"]))
    assert (ours.ids == bare.ids).all()
    later = talk("hi", "hi", "what is <image>?", "a boat", image="w.png")
    assert read(words, pictures, later).grids == [(2, 1)]


def test_a_reader_is_pickled(words, pictures):
    reader, line = reader_of(words), json.dumps(talk("<image>?", "a", image="w.png")).encode()
    collection = Collection("data", "data.jsonl", str(pictures), augment=True)
    ours, theirs = (
        either.read(collection, line, np.random.default_rng(3), augment=True)
        for either in (reader, pickle.loads(pickle.dumps(reader)))
    )
    assert (ours.ids == theirs.ids).all()
    assert (ours.tiles == theirs.tiles).all()


def test_several_images_share_the_tiles(words, pictures):
    def grids(count, **more):
        names = ["w.png", "t.png", "w.png"][:count]
        line = talk("<image>" * count, "a", image=names)
        return read(words, pictures, line, max_tokens=2000, max_sample_tokens=2000, **more).grids

    assert grids(1) == [(2, 1)]
    assert grids(3, max_dynamic_patch=6) == [(2, 1), (1, 2), (2, 1)]
    assert grids(3, max_dynamic_patch=5) == [(1, 1)] * 3
    assert grids(3, max_dynamic_patch=2) == [(1, 1)] * 3
    assert grids(2, max_dynamic_patch=2, patch=4) == [(2, 1), (1, 2)]  # of the meta file
    assert grids(2, patch=2) == [(1, 1)] * 2
    assert grids(1, min_dynamic_patch=6) != [(2, 1)]
    assert grids(1, config=small_config(dynamic_image_size=False)) == [(1, 1)]
    assert grids(2, config=small_config(max_dynamic_patch=2)) == [(1, 1)] * 2


def test_augmentation_compresses_tiles(words, pictures):
    line = talk("what?", "a", image="w.png")
    plain = read(words, pictures, line)
    first, again, other = (
        read(words, pictures, line, rng=seed, augment=True) for seed in (1, 1, 2)
    )
    assert (first.tiles == again.tiles).all()
    assert (first.tiles != other.tiles).any()
    difference = np.abs(first.tiles.astype(int) - plain.tiles)
    assert 0 < difference.mean() < 40  # noise is the worst for JPEG
    with pytest.raises(ValueError, match="augment needs rng"):
        reader_of(words).read(Collection("a", "a", "."), b"{}", None, augment=True)


def test_long_samples(words, pictures):
    line = talk("a?", "b", "what is <image>?", "c", "d?", "e", image=["s.png"])
    whole = read(words, pictures, line)
    length = len(whole.ids)
    context = words.convert_tokens_to_ids("<IMG_CONTEXT>")
    first, last = np.flatnonzero(whole.ids == context)[[0, -1]]
    outcomes = {}
    for limit in range(2, length + 1):
        try:
            cut = read(words, pictures, line, max_sample_tokens=limit)
        except BadSample as error:
            outcomes[limit] = error.kind
            continue
        outcomes[limit] = "cut"
        assert (cut.ids == whole.ids[:limit]).all()
        assert (cut.labels == whole.labels[:limit]).all()
        assert (cut.positions == whole.positions[:limit]).all()
        assert cut.grids == ([(1, 1)] if limit > last else [])
        assert cut.weight == weigh("square", int((cut.labels != -100).sum()))
        if limit < length:
            with pytest.raises(BadSample, match="too long"):
                read(words, pictures, line, max_sample_tokens=limit, too_long="refuse")
    answer = np.flatnonzero(whole.labels != -100)[0]
    assert answer < first - 1
    for limit, outcome in outcomes.items():
        if limit <= answer:
            assert outcome == "cut leaves no label"
        elif first <= limit <= last + 1:
            assert outcome == "cut through an image"
        else:
            assert outcome == "cut"


def test_samples_that_no_pack_holds(words, pictures):
    line = talk("what?", "b", image="w.png")
    for few in ({"max_tiles": 2}, {"max_tokens": 30, "too_long": "refuse"}):
        with pytest.raises(BadSample, match="larger than a pack"):
            read(words, pictures, line, **few)
    assert read(words, pictures, line, max_tiles=3).size[1] == 3
    cut = read(words, pictures, talk("what?", "b" * 99), max_tokens=60)
    assert cut.size == (60, 0)
