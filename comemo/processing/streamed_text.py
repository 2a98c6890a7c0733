"""Text of an answer token by token, for streamers that want a tokenizer of the package tokenizers.

The server of transformers decodes with `DecodeStream` of that package: for every token it decodes
the last few tokens, and gives out what was added. It keeps back text that ends with U+FFFD, the
sign of an incomplete character.
"""

import functools
import re
from typing import Any

from tokenizers import Tokenizer, models
from tokenizers.decoders import Decoder

INCOMPLETE = "\ufffd"
END = "<|im_end|>"  # ends an answer, as does the tokenizer's `eos_token`

# The beginning of what `clean_up_tokenization` shortens, such as " ." and " n't".
_UNDECIDED = re.compile(r" ('[rv]?|n'?)?$")


def streaming_tokenizer(tokenizer: Any) -> Tokenizer:
    """A tokenizer of the package `tokenizers` that decodes as `tokenizer` does, token by token.

    The parts that a `DecodeStream` gives out make the text that `tokenizer.decode` has for the
    whole answer with `skip_special_tokens=True`. Names of special tokens are never in it. An answer
    that no end token ends, because its length was limited, may lack its last few characters, as in
    any `DecodeStream`.

    Args:
        tokenizer: an `InternLM2Tokenizer`.

    Returns:
        A `Tokenizer` for decoding alone: its tokens are ids as text.
    """
    numbers = Tokenizer(_numbers(len(tokenizer)))
    numbers.decoder = Decoder.custom(_Decoder(tokenizer))
    return numbers


@functools.lru_cache(maxsize=2)  # it takes 0.1 s for the published vocabulary
def _numbers(size: int) -> models.WordLevel:
    return models.WordLevel({str(index): index for index in range(size)}, unk_token="0")


class _Decoder:
    """From ids as text to text, in the form that `Decoder.custom` asks for."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def decode_chain(self, tokens: list[str]) -> list[str]:
        ids = [int(token) for token in tokens]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        names = self.tokenizer.convert_ids_to_tokens(ids)
        if names and names[-1] in (END, self.tokenizer.eos_token):
            return [text]
        pieces = self.tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
        raw = self.tokenizer.sp_model.decode(pieces)
        undecided = _UNDECIDED.search(text) or _UNDECIDED.search(raw)
        return [text + INCOMPLETE if undecided else text]
