"""The untrained comemo-nano: its tokenizer and its weights."""

import pytest
import torch

from comemo import CoMemoForConditionalGeneration, CoMemoProcessor
from comemo.nano.start import _lines, make_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    make_start(folder, 3)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return CoMemoProcessor.from_pretrained(folder).tokenizer


@pytest.mark.parametrize("text", ["in row 2, column 3", "What is in row 4, column 1?"])
def test_rows_and_columns_are_one_token_each(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sum(piece[-1].isdigit() for piece in tokenizer.convert_ids_to_tokens(ids)) == 2
    assert len(ids) == len(text.split()) - 2 + ("?" in text) + 1
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


def test_lines_are_named_by_how_much_of_them_fits():
    """The second of four: in the lower half of the first of two, mostly the second of three."""
    named = _lines("row", 1)
    assert named == pytest.approx(
        {"top": 2 / 3, "bottom": 1 / 3, "row 1": (1 + 1 / 3) / 3, "row 2": (2 / 3 + 1) / 3}
    )
    assert _lines("column", 0) == pytest.approx({"left": 1, "column 1": 1})
