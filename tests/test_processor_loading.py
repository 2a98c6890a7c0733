"""Options for loading a processor and its parts: each has an effect or is refused by name."""

import json
import shutil

import pytest
import torch
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from comemo import CoMemoImageProcessor, CoMemoProcessor, InternLM2Tokenizer


@pytest.mark.parametrize("name", ["max_num", "use_thumbnail", "published", "image_mean"])
def test_loading_honours_options_of_images(checkpoint, tmp_path, name):
    value = {"max_num": 2, "use_thumbnail": False, "published": True, "image_mean": [0.5] * 3}[name]
    for door in (AutoProcessor, CoMemoProcessor):
        processor = door.from_pretrained(checkpoint, **{name: value})
        assert getattr(processor.image_processor, name) == value
    processor.save_pretrained(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    assert getattr(AutoProcessor.from_pretrained(tmp_path).image_processor, name) == value
    for door in (AutoImageProcessor, CoMemoImageProcessor):
        for directory in (checkpoint, tmp_path):
            images = door.from_pretrained(directory, **{name: value})
            assert isinstance(images, CoMemoImageProcessor)
            assert getattr(images, name) == value
            assert images.input_size == 448
    images.save_pretrained(tmp_path / "alone")
    again = AutoImageProcessor.from_pretrained(tmp_path / "alone")
    assert again.to_dict() == images.to_dict()


def test_loading_honours_options_of_text(checkpoint, tmp_path):
    given = {"padding_side": "right", "add_bos_token": False, "add_eos_token": True}
    processor = AutoProcessor.from_pretrained(checkpoint, **given, max_num=3)
    assert {name: getattr(processor.tokenizer, name) for name in given} == given
    processor.save_pretrained(tmp_path)
    del given["padding_side"]
    for directory in (tmp_path, tmp_path / "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(directory if directory.exists() else tmp_path)
        assert {name: getattr(tokenizer, name) for name in given} == given
        tokenizer.save_pretrained(tmp_path / "tokenizer")
    tokenizer.add_bos_token = tokenizer.add_eos_token = not tokenizer.add_bos_token
    tokenizer.save_pretrained(tmp_path)
    again = InternLM2Tokenizer.from_pretrained(tmp_path)
    assert again.add_bos_token
    assert again("a")["input_ids"] == tokenizer("a")["input_ids"]


def test_padding_is_left_whatever_the_files_say(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "right")
    file = tmp_path / "right" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    assert "padding_side" not in config
    file.write_text(json.dumps(config | {"padding_side": "right"}))
    for directory in (checkpoint, tmp_path / "right"):
        for tokenizer in (
            AutoTokenizer.from_pretrained(directory),
            AutoProcessor.from_pretrained(directory).tokenizer,
        ):
            assert tokenizer.padding_side == "left"
            assert tokenizer(["a", "a b"], padding=True)["attention_mask"][0][0] == 0
        right = AutoTokenizer.from_pretrained(directory, padding_side="right")
        assert right.padding_side == "right"
    assert InternLM2Tokenizer(str(checkpoint / "tokenizer.model")).padding_side == "left"


@pytest.mark.parametrize(
    ("doors", "options"),
    [
        ((AutoProcessor, CoMemoProcessor), {"max_nmu": 2}),
        ((AutoImageProcessor, CoMemoImageProcessor), {"max_nmu": 2}),
        ((AutoTokenizer, InternLM2Tokenizer), {"max_nmu": 2}),
        ((AutoProcessor, AutoImageProcessor, CoMemoImageProcessor), {"do_resize": False}),
        ((AutoProcessor, AutoImageProcessor), {"device": "cpu"}),
    ],
)
def test_loading_refuses_unknown_options(checkpoint, doors, options):
    for door in doors:
        with pytest.raises(ValueError, match=next(iter(options))):
            door.from_pretrained(checkpoint, **options)


def test_a_file_of_another_image_processor_does_not_matter(checkpoint, tmp_path):
    # Models of this family have the file of the vision tower that they were made from.
    shutil.copytree(checkpoint, directory := tmp_path / "with")
    clip = {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 448, "size": 448}
    (directory / "preprocessor_config.json").write_text(json.dumps(clip))
    for door in (AutoImageProcessor, CoMemoImageProcessor):
        images = door.from_pretrained(directory, max_num=3)
        assert isinstance(images, CoMemoImageProcessor)
        assert (images.max_num, images.input_size) == (3, 448)
    assert AutoProcessor.from_pretrained(directory).image_processor.max_num == 12
    images.save_pretrained(directory)
    assert AutoProcessor.from_pretrained(directory).image_processor.max_num == 3
    (directory / "preprocessor_config.json").write_text('{"min_num": 2}')  # by hand
    for images in (
        AutoProcessor.from_pretrained(
            directory, _from_pipeline="x", dtype=torch.float32
        ).image_processor,
        AutoImageProcessor.from_pretrained(directory, _from_pipeline="x", dtype=torch.float32),
    ):
        assert (images.min_num, images.max_num, images.input_size) == (2, 12, 448)
    (directory / "config.json").unlink()
    (directory / "preprocessor_config.json").write_text(json.dumps(clip))
    assert not isinstance(AutoImageProcessor.from_pretrained(directory), CoMemoImageProcessor)
    with pytest.raises(ValueError, match="holds another image processor, CLIPFeatureExtractor"):
        CoMemoImageProcessor.from_pretrained(directory)


def test_an_image_processor_needs_files_of_a_comemo_model(tmp_path):
    for door in (AutoImageProcessor, CoMemoImageProcessor):
        with pytest.raises(OSError, match=r"preprocessor_config\.json"):
            door.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"preprocessor_config\.json"):
        CoMemoProcessor.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got max_nmu"):
        CoMemoImageProcessor(max_nmu=2)
    with pytest.raises(ValueError, match="wanted at least one image"):
        CoMemoImageProcessor()([])
    _, rest = CoMemoImageProcessor.from_dict({}, max_nmu=2, return_unused_kwargs=True)
    assert rest == {"max_nmu": 2}
