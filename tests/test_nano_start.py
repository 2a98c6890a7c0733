"""The untrained comemo-nano: its tokenizer and its weights."""

import pytest
import torch

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor
from comemo.nano.start import PLACES, _lines, make_start
from comemo.nano.words import COLUMNS, ROWS
from comemo.processing.new_tokenizer import SPACE


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


def test_a_seed_gives_the_same_weights(folder, tmp_path):
    make_start(tmp_path, 3)
    for name in ("model.safetensors", "tokenizer.model"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_every_name_is_said_most_where_it_is():
    """Of the four rows of image tokens: a place covers one or more of them."""
    for names in (ROWS, COLUMNS):
        lines = [_lines(names, at) for at in range(4)]
        best = {name: max(range(4), key=lambda at, n=name: lines[at].get(n, 0)) for name in names}
        assert list(best.values()) == [0, 1, 1, 2, 3]
        middle = names[2]
        assert lines[1][middle] == lines[2][middle]
