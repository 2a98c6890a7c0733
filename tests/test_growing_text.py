"""The text of a long answer, token by token, at a cost that does not grow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comemo.chat.streamers import GrowingText, answer_text

STOP = "<|im_end|>"
WORDS = [
    "the",
    "quick",
    ",",
    "brown",
    ".",
    "fox",
    "doesn",
    "'t",
    "do",
    "n't",
    "say",
    "'",
    "hello",
    "'",
    "!",
    "it",
    "'s",
    "we",
    "'ve",
    "中文",
    "字符",
    "漢",
    "é",
    "ü",
    "🙂",
    "👩\u200d👧",
    "a1b2",
    "x",
    "<img>",
    "\n\n",
    "",
    "tabs\t",
    "-",
    ";",
    "?",
    "you",
    "'re",
    "I",
    "'m",
    "end",
]


@settings(max_examples=max(5, settings.default.max_examples // 4))
@given(st.lists(st.sampled_from(WORDS), min_size=60, max_size=140))
def test_every_text_is_that_of_all_tokens(tokenizer, words):
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    text = GrowingText(tokenizer, STOP)
    for count, token in enumerate(ids, 1):
        assert text.add([token]) == answer_text(tokenizer, ids[:count], STOP)


@settings(max_examples=max(5, settings.default.max_examples // 4))
@given(st.lists(st.integers(0, 499), min_size=100, max_size=200))
def test_any_tokens(tokenizer, ids):
    """Bytes that are no character, control tokens and all."""
    ids = [index % len(tokenizer) for index in ids]
    text = GrowingText(tokenizer, STOP)
    for count, token in enumerate(ids, 1):
        assert text.add([token]) == answer_text(tokenizer, ids[:count], STOP)


def test_few_tokens_are_decoded_for_each(tokenizer, monkeypatch):
    counted = []
    decode = type(tokenizer).decode

    def counting(self, ids, **options):
        counted.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(tokenizer), "decode", counting)
    text = GrowingText(tokenizer, STOP)
    for token in tokenizer("the quick brown fox " * 200, add_special_tokens=False)["input_ids"]:
        text.add([token])
    assert len(text.ids) > 800
    assert max(counted) <= 128
    assert sum(counted) < 100 * len(text.ids)


@pytest.mark.parametrize("end", ["", STOP])
def test_the_end(tokenizer, end):
    ids = tokenizer("a word " * 40, add_special_tokens=False)["input_ids"]
    ids += [tokenizer.convert_tokens_to_ids(STOP)] if end else []
    text = GrowingText(tokenizer, STOP)
    text.add(ids)
    assert text.add([]) == answer_text(tokenizer, ids, STOP) == ("a word " * 40).strip()
