"""The words of an answer: which tokens each consists of."""

import unicodedata
from itertools import takewhile
from typing import Any, NamedTuple

from torch import Tensor


class Word(NamedTuple):
    """One word.

    Attributes:
        text: without surrounding whitespace; punctuation after it belongs to it.
        tokens: indices of its tokens in the answer.
    """

    text: str
    tokens: tuple[int, ...]


def split_words(tokenizer: Any, tokens: Tensor, stop: str) -> list[Word]:
    """Divide an answer into words.

    A word is a token and all that follow it up to one that begins with a space or with a wide
    character, as of Chinese, which is written without spaces. Punctuation alone belongs to the
    word before. Tokens without text, for example the one that ends the answer, are left out.

    Args:
        tokenizer: of the checkpoint.
        tokens: integers [n], generated.
        stop: text that ends an answer, see `prompts.stop_text`.

    Returns:
        The words in order.
    """
    words: list[Word] = []
    waiting: tuple[int, ...] = ()
    for index, piece in enumerate(_pieces(tokenizer, tokens.tolist(), stop)):
        waiting = (*waiting, index)
        if not piece:  # a part of a character, or no text at all
            continue
        if not words or _begins(words[-1].text, piece):
            words.append(Word("", ()))
        text, own = words[-1]
        words[-1] = Word(text + piece, own + waiting)
        waiting = ()
    return [Word(text.strip(), own) for text, own in _joined(words) if text.strip()]


def _joined(words: list[Word]) -> list[Word]:
    """Words, each with the punctuation that follows it as words of its own."""
    joined: list[Word] = []
    for word in words:
        if joined and _is_punctuation(word.text):
            text, own = joined.pop()
            word = Word(text + word.text, own + word.tokens)
        joined.append(word)
    return joined


def _is_punctuation(text: str) -> bool:
    return bool(text.strip()) and all(unicodedata.category(char)[0] == "P" for char in text.strip())


def _pieces(tokenizer: Any, tokens: list[int], stop: str) -> list[str]:
    """What each token adds to the text; the last token of a character adds all of it."""
    pieces, known = [], ""
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end], skip_special_tokens=True)
        text = text.split(stop)[0].rstrip("\ufffd")  # half a character
        same = (mine == other for mine, other in zip(known, text, strict=False))
        pieces.append(text[sum(takewhile(bool, same)) :])
        known = text
    return pieces


def _begins(word: str, piece: str) -> bool:
    """Whether a new word begins with a piece of text, after the text of a word so far."""
    if not word.strip() or (_is_punctuation(piece) and not piece[0].isspace()):
        return False
    first = piece.strip()[:1]
    wide = bool(first) and unicodedata.east_asian_width(first) in "WF"
    return wide or piece[0].isspace() or word[-1].isspace()
