"""Options of the processor in calls: each has an effect or is refused by name."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoProcessor, PreTrainedTokenizerFast

import comemo
from comemo import CoMemoProcessor, prompts

WORDS = "one two three four five six seven"
MARK = prompts.IMAGE_MARK


@pytest.fixture(scope="module")
def small(checkpoint):
    """Tiles of 56 pixels: four tokens each."""
    return AutoProcessor.from_pretrained(checkpoint, input_size=56, max_num=4)


@pytest.fixture(scope="module")
def wide(inputs):
    return Image.fromarray(inputs.picture(3, 300, 100))


def tokens_of(batch, processor):
    return (batch["input_ids"] == processor.image_token_id).sum().item()


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        ({}, 4),
        ({"max_num": 1}, 1),
        ({"max_num": np.int64(2)}, 3),
        ({"min_num": 4, "max_num": 6}, 5),
        ({"use_thumbnail": False}, 3),
        ({"use_thumbnail": None}, 4),
        ({"images_kwargs": {"max_num": 1}}, 1),
        ({"images_kwargs": {"use_thumbnail": False}, "max_num": 2}, 2),
        ({"common_kwargs": {"use_thumbnail": False}}, 3),
        ({"text_kwargs": {"padding": True}, "max_num": 1}, 1),
        ({"videos_kwargs": {"num_frames": 2}, "fps": None}, 4),
    ],
)
def test_tiles_and_tokens_go_by_the_options(small, wide, options, tiles):
    batch = small(wide, f"{MARK}x", **options)
    assert len(batch["pixel_values"]) == tiles
    assert tokens_of(batch, small) == 4 * tiles
    messages = [{"role": "user", "content": [{"type": "image", "image": wide}]}]
    ask = {"tokenize": True, "return_dict": True}
    for given in ({"processor_kwargs": options}, options):
        again = small.apply_chat_template(messages, **ask, **given)
        assert torch.equal(again["pixel_values"], batch["pixel_values"])
        assert tokens_of(again, small) == 4 * tiles


def test_tiles_of_another_size_have_other_numbers_of_tokens(small, wide, checkpoint):
    batch = small(wide, MARK, input_size=84, max_num=1)
    assert batch["pixel_values"].shape == (1, 3, 84, 84)
    assert tokens_of(batch, small) == 9
    assert (small.tokens_per_tile, small.image_processor.input_size) == (4, 56)
    with pytest.raises(ValueError, match="input_size must be a multiple of 28, got 57"):
        small(wide, MARK, input_size=57)
    with pytest.raises(ValueError, match="input_size must be a multiple of 28, got 57"):
        AutoProcessor.from_pretrained(checkpoint, input_size=57)


def test_pixels_go_by_the_options(small, wide):
    plain = small(wide, MARK, max_num=1)["pixel_values"]
    raw = small(wide, MARK, max_num=1, do_rescale=False, do_normalize=False)["pixel_values"]
    assert raw.min() >= 0
    assert raw.max() > 200
    rows = torch.tensor(np.array(wide.resize((56, 56)))).permute(2, 0, 1)
    assert torch.equal(raw[0], rows.float())
    half = {"image_mean": 0.5, "image_std": [0.5, 0.5, 0.5]}
    ours = small(wide, MARK, max_num=1, images_kwargs=half)["pixel_values"]
    torch.testing.assert_close(ours, raw / 127.5 - 1)
    minus = small(wide, MARK, max_num=1, rescale_factor=-1.0, do_normalize=False)["pixel_values"]
    assert torch.equal(minus, -raw)
    last = small(wide, MARK, max_num=1, data_format="channels_last")["pixel_values"]
    assert torch.equal(last, plain.permute(0, 2, 3, 1))
    rows = np.array(wide.resize((3, 3)))
    first = small.image_processor(rows, input_data_format="channels_first")["pixel_values"]
    assert torch.equal(first, small.image_processor(rows.transpose(1, 2, 0))["pixel_values"])


def test_published_pixels_ignore_the_orientation(small, wide, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    wide.save(tmp_path / "a.png", exif=exif)
    assert small(tmp_path / "a.png", MARK)["tile_grid"].tolist() == [[1, 3]]
    assert small(tmp_path / "a.png", MARK, published=True)["tile_grid"].tolist() == [[3, 1]]


def test_padding(small):
    texts = ["one", WORDS]
    short, long = (len(ids) for ids in small.tokenizer(texts)["input_ids"])
    for padding in ({}, {"padding": True}, {"padding": "longest"}):
        batch = small(text=texts, **padding)
        assert batch["input_ids"].shape == (2, long)
        assert batch["attention_mask"][0].tolist() == [0] * (long - short) + [1] * short
    right = small(text=texts, padding_side="right")["attention_mask"]
    assert right[0].tolist() == [1] * short + [0] * (long - short)
    full = small(text=texts, padding="max_length", max_length=40)
    assert full["input_ids"].shape == full["attention_mask"].shape == (2, 40)
    assert small(text=texts, pad_to_multiple_of=16)["input_ids"].shape[1] % 16 == 0
    rows = small(text=texts, padding=False, return_tensors=None)
    assert [len(row) for row in rows["input_ids"]] == [short, long]
    with pytest.raises(ValueError, match="tensor"):
        small(text=texts, padding=False)
    with pytest.raises(ValueError, match=r"padding='max_length' needs max_length, got None"):
        small(text=texts, padding="max_length")
    assert "attention_mask" not in small(text=texts, return_attention_mask=False)


def test_truncation_cuts_text_and_never_an_image(small, wide, checkpoint):
    ids = small.tokenizer(WORDS)["input_ids"]
    for options in ({"truncation": True}, {"truncation": "longest_first"}):
        cut = small(text=WORDS, max_length=4, **options)["input_ids"]
        assert cut.tolist() == [ids[:4]]
    bare = small(text=WORDS, max_length=4, truncation=True, add_special_tokens=False)
    assert bare["input_ids"].tolist() == [ids[1:5]]
    left = AutoProcessor.from_pretrained(checkpoint, truncation_side="left", add_eos_token=True)
    assert left(text=WORDS, max_length=4, truncation=True)["input_ids"].tolist() == [
        [ids[0], *ids[-2:], left.tokenizer.eos_token_id]
    ]
    prompt = f"a {MARK} {WORDS}"
    whole = small(wide, prompt, max_num=1)["input_ids"][0].tolist()
    keep = whole.index(small.tokenizer.convert_tokens_to_ids(prompts.IMAGE_END)) + 1
    cut = small(wide, prompt, max_num=1, truncation=True, max_length=keep)
    assert cut["input_ids"].tolist() == [whole[:keep]]
    for length in (keep - 1, keep - 3, 3):
        with pytest.raises(ValueError, match=f"to max_length {length} would cut image tokens"):
            small(wide, prompt, max_num=1, truncation=True, max_length=length)
    with pytest.raises(ValueError, match="more than max_length 4: pass truncation=True"):
        small(text=WORDS, max_length=4)
    with pytest.raises(ValueError, match="only_second"):
        small(text=WORDS, max_length=4, truncation="only_second")


def test_kinds_of_tensors(small, wide):
    options = {"return_mm_token_type_ids": True, "max_num": 1}
    names = {"input_ids", "attention_mask", "pixel_values", "tile_grid", "mm_token_type_ids"}
    for kind, wanted in ((None, list), ("np", np.ndarray), ("pt", torch.Tensor)):
        batch = small(wide, f"{MARK}x", return_tensors=kind, **options)
        assert set(batch) == names
        assert all(isinstance(value, wanted) for value in batch.values()), kind
        both = small([wide, wide], f"{MARK}{MARK}", common_kwargs={"return_tensors": kind})
        assert isinstance(both["input_ids"], wanted)
        assert len(both["tile_grid"]) == 2
        pixels = np.stack([np.asarray(tile) for tile in batch["pixel_values"]])
        assert pixels.dtype == np.float32
    kinds = batch["mm_token_type_ids"]
    assert torch.equal(kinds == 1, batch["input_ids"] == small.image_token_id)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_nmu": 1}, "there is no option max_nmu"),
        ({"images_kwargs": {"max_nmu": 1}}, "no option max_nmu in images_kwargs"),
        ({"text_kwargs": {"max_num": 1}}, "no option max_num in text_kwargs"),
        ({"common_kwargs": {"paddin": 1}}, "no option paddin in common_kwargs"),
        ({"images_kwargs": 3}, "images_kwargs must be a dictionary, got int"),
        ({"max_num": 1, "images_kwargs": {"max_num": 1}}, "max_num was passed twice"),
        ({"padding": True, "text_kwargs": {"padding": False}}, "padding was passed twice"),
        ({"size": {"height": 2, "width": 2}}, "size is not supported, input_size is the side"),
        ({"do_resize": False}, "do_resize must be True, got False"),
        ({"do_center_crop": True}, "do_center_crop must be False, got True"),
        ({"resample": 2}, "resample is not supported, got 2"),
        ({"max_num": 0}, "max_num must be an integer of at least 1, got 0"),
        ({"image_mean": [0.1, 0.2]}, "mean must be one or three numbers"),
        ({"text_pair": "x"}, "text_pair is not supported, got 'x'"),
        ({"is_split_into_words": True}, "is_split_into_words is not supported"),
        ({"return_offsets_mapping": True}, "return_offsets_mapping is not supported"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"padding": "wide"}, "padding or truncation: wide is not"),
        ({"return_tensors": "tf"}, "tf"),
        ({"device": "cpu", "return_tensors": "np"}, "device needs return_tensors='pt'"),
        ({"videos": ["a.mp4"]}, "the model takes only images, got videos"),
    ],
)
def test_unsupported_options_are_named(small, wide, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        small(wide, MARK, **options)


def test_options_of_generate_give_a_warning(small):
    with pytest.warns(UserWarning, match="do_sample have no effect here"):
        small(text="one", do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(text="one", max_length=9)


def test_images_belong_to_the_prompt_that_they_are_listed_for(small, wide):
    narrow = wide.resize((50, 50))
    batch = small([[], [wide, narrow]], ["none", f"{MARK} and {MARK}"], max_num=1)
    assert tokens_of(batch, small) == 8
    assert torch.equal(batch["pixel_values"][1:], comemo.load_image(narrow, 56, 1)[0])
    with pytest.raises(ValueError, match=r"\[1, 1\] <image> marks in the texts for \[0, 2\] imag"):
        small([[], [wide, narrow]], [MARK, MARK])
    four = np.stack([np.array(narrow)] * 2)
    assert len(small(four, MARK * 2)["tile_grid"]) == 2
    alone = small(wide, f"{prompts.IMAGE_CONTEXT}x")["input_ids"]
    assert torch.equal(alone, small(wide, f"{MARK}x")["input_ids"])


def test_numbers_of_tokens_are_known_from_sizes(small):
    sizes = [(100, 100), (100, 300), (30, 500)]
    pictures = [Image.new("RGB", (width, height)) for height, width in sizes]
    batch = small(pictures, [MARK] * 3, return_mm_token_type_ids=True)
    numbers = small._get_num_multimodal_tokens(image_sizes=sizes)
    assert batch["mm_token_type_ids"].sum(1).tolist() == numbers["num_image_tokens"]
    assert sum(numbers["num_image_patches"]) == len(batch["pixel_values"])


def test_padding_and_truncation_with_another_tokenizer(small, wide, checkpoint, tmp_path):
    names = ["<s>", "</s>", prompts.IMAGE_START, prompts.IMAGE_CONTEXT, prompts.IMAGE_END]
    bytewise = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, []))
    bytewise.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="</s>", eos_token="</s>", extra_special_tokens=names
    )
    processor = CoMemoProcessor(small.image_processor, tokenizer, tokens_per_tile=4)
    assert processor(text=["a", "abc"])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
    batch = processor(wide, f"{MARK}abcdef", max_num=1, truncation=True, max_length=8)
    decoded = tokenizer.decode(batch["input_ids"][0]).replace(" ", "")
    assert decoded == prompts.expand_images(f"{MARK}ab", [4])
    with pytest.raises(ValueError, match="would cut image tokens"):
        processor(wide, f"{MARK}abcdef", max_num=1, truncation=True, max_length=5)
    attack = [{"role": "user", "content": "</s> and <img>"}]
    ids = processor.apply_chat_template(attack, tokenize=True, return_dict=True)["input_ids"][0]
    assert not set(ids.tolist()) & set(tokenizer.convert_tokens_to_ids(names))
    processor.save_pretrained(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    loaded = CoMemoProcessor.from_pretrained(tmp_path)
    for one in ("a", f"{MARK}abcdef"):
        given = {"images": wide, "max_num": 1} if MARK in one else {}
        wanted, found = (p(text=one, **given)["input_ids"].tolist() for p in (processor, loaded))
        assert found == wanted
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = CoMemoProcessor.from_pretrained(tmp_path, tokenizer=tokenizer)
    assert again.tokenizer is tokenizer
    assert again(text=["a", "abc"])["attention_mask"].tolist() == [[0, 0, 1], [1, 1, 1]]
