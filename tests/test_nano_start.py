"""The untrained comemo-nano: its tokenizer and its weights."""

from collections import Counter

import pytest
import torch

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor
from comemo.nano.heads import _directions
from comemo.nano.questions import plural
from comemo.nano.start import COUNTED, PLACES, SIDE, _lines, _names, make_start
from comemo.nano.words import _CHOSEN
from comemo.processing.new_tokenizer import SPACE
from comemo_kernels.reference import image_position_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder, 3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CoMemoProcessor.from_pretrained(folder).tokenizer


@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_one_token(tokenizer, place):
    for text, at in ((f"What is {place}?", -2), (place, 0)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        piece = tokenizer.convert_ids_to_tokens(ids)[at]
        assert piece.replace(SPACE, " ").strip() == place
        assert tokenizer.decode(ids) == text


def test_digits_are_tokens_of_their_own(tokenizer):
    ids = tokenizer("the number 85", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["8", "5"]


def test_a_word_is_much_the_same_after_a_space(folder, tokenizer):
    words = CoMemoForConditionalGeneration.from_pretrained(folder).get_input_embeddings().weight
    words = (words - words.mean(0)).detach().float()
    one, two = (tokenizer(x, add_special_tokens=False)["input_ids"][-1] for x in ("red", "a red"))
    other = tokenizer("blue", add_special_tokens=False)["input_ids"][-1]
    cosine = torch.nn.functional.cosine_similarity
    assert one != two
    assert cosine(words[one], words[two], 0) > 0.8
    assert cosine(words[one], words[other], 0) < 0.4


@pytest.mark.parametrize("noun", COUNTED)
def test_more_than_one_is_much_the_same(folder, tokenizer, noun):
    words = CoMemoForConditionalGeneration.from_pretrained(folder).get_input_embeddings().weight
    words = (words - words.mean(0)).detach().float()
    ids = [tokenizer(f"a {x}", add_special_tokens=False)["input_ids"] for x in (noun, plural(noun))]
    assert [len(own) for own in ids] == [2, 2]
    assert torch.nn.functional.cosine_similarity(words[ids[0][1]], words[ids[1][1]], 0) > 0.7


def test_a_seed_gives_the_same_weights(folder, tmp_path):
    make_start(tmp_path, 3)
    for name in ("model.safetensors", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("sides", [2, 3, 4])
def test_a_place_has_its_own_name_most(sides):
    """Of the image tokens of a tile, in a row of so many: its column is said most often."""
    ids = image_position_ids((sides, 1), SIDE, thumbnail=False)
    for tile, own in zip(_CHOSEN[sides], ids.view(sides, -1).tolist(), strict=True):
        said = Counter()
        for index in own:
            said.update(_lines(index % SIDE, 0))
        assert said.most_common(1)[0][0] == tile


@pytest.mark.slow
def test_names_of_places_are_alike_by_rows_and_columns(folder, tokenizer):
    model = CoMemoForConditionalGeneration.from_pretrained(folder).float()
    words, (shared, *_) = model.get_input_embeddings().weight.detach(), _directions(model)
    words = words - (words @ shared)[:, None] * shared
    ids = [tokenizer(f"is {place}", add_special_tokens=False)["input_ids"][-1] for place in PLACES]
    found = words[ids] @ words[ids].T / words[ids[0]].norm() ** 2
    for one in range(25):
        for other in range(25):
            alike = (one // 5 == other // 5) + (one % 5 == other % 5)
            assert abs(found[one, other] - (0.27, 0.54, 1.0)[alike]) < 0.1
    others = words[[i for i in range(len(words)) if i not in _names(folder)]]
    assert (others @ words[ids].T / words[ids[0]].norm() ** 2).abs().max() < 0.2
