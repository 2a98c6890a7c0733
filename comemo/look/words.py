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
    words: list[tuple[str, list[int]]] = []
    before, waiting = "", list[int]()
    for index, piece in enumerate(_pieces(tokenizer, tokens.tolist(), stop)):
        waiting.append(index)
        if not piece:  # a part of a character, or no text at all
            continue
        if not words or _begins(before, piece):
            words.append(("", []))
        text, own = words[-1]
        words[-1] = text + piece, [*own, *waiting]
        before, waiting = piece, []
    return [Word(text.strip(), tuple(own)) for text, own in words if text.strip()]


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


def _begins(before: str, piece: str) -> bool:
    """Whether a word begins with a piece of text that follows another one."""
    text = piece.strip()
    if text and all(unicodedata.category(char)[0] == "P" for char in text):
        return False
    wide = bool(text) and unicodedata.east_asian_width(text[0]) in "WF"
    return wide or piece[0].isspace() or before[-1].isspace()
