"""The published sentencepiece tokenizer, exact to the id, that can also keep user text inert.

A control token is a token flagged special, such as `<|im_end|>` or `<IMG_CONTEXT>`. As published,
whoever types its name, or the name of the sentencepiece piece it replaced
(`[UNUSED_TOKEN_145]`), gets the control token. A `MARKER` inside the name keeps it text: no part
of the name can then match, and the marker's own pieces are dropped. `comemo.prompts.escape` places
the markers. A string without a marker gives the published ids.
"""

from itertools import groupby
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

MARKER = "\ufdd0"  # a Unicode noncharacter: no valid text holds one
MARKER_PIECES = [f"<0x{byte:02X}>" for byte in MARKER.encode()]

# Keywords that steer the loading, and the pointer to code inside a checkpoint: not to be saved.
LOADING_KEYS = ("auto_map", "trust_remote_code", "use_fast")


class InternLM2Tokenizer(SentencePieceBackend):
    """Sentencepiece tokenizer under the name that published `tokenizer_config.json` files give.

    Args:
        vocab_file: path of `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: names of the special tokens.
        add_bos_token: put `bos_token` before every text.
        add_eos_token: put `eos_token` after every text.
        clean_up_tokenization_spaces: clean up the joined text too; the parts always are.
        **kwargs: as of any transformers tokenizer.

    Raises:
        ValueError: there is no `vocab_file`, or it is no sentencepiece model.
    """

    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str | None = None,
        unk_token: Any = "<unk>",
        bos_token: Any = "<s>",
        eos_token: Any = "</s>",
        pad_token: Any = "</s>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        **kwargs,
    ):
        if not vocab_file:
            raise ValueError("InternLM2Tokenizer: wanted the path of a tokenizer.model, got none")
        try:
            super().__init__(
                vocab_file=vocab_file,
                unk_token=unk_token,
                bos_token=bos_token,
                eos_token=eos_token,
                pad_token=pad_token,
                clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                **{key: value for key, value in kwargs.items() if key not in LOADING_KEYS},
            )
        except RuntimeError as error:  # what sentencepiece raises
            raise ValueError(
                f"InternLM2Tokenizer: wanted a sentencepiece model, got {vocab_file}: {error}"
            ) from error
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        self.special_tokens_pattern = "prefix_suffix"

    @property
    def prefix_tokens(self) -> list[int]:
        """Ids before every text."""
        return [self.bos_token_id] if self.add_bos_token else []

    @property
    def suffix_tokens(self) -> list[int]:
        """Ids after every text."""
        return [self.eos_token_id] if self.add_eos_token else []

    @property
    def control_literals(self) -> set[str]:
        """What would become a control token if typed: their names and those they replaced."""
        ids = set(self.all_special_ids)
        ids |= {index for index, token in self._added_tokens_decoder.items() if token.special}
        replaced = {self.sp_model.IdToPiece(index) for index in ids if index < self.vocab_size}
        return {self.convert_ids_to_tokens(index) for index in ids} | replaced

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        pieces = self.sp_model.encode(text, out_type=str)
        return _drop_markers(pieces, self.unk_token) if MARKER in text else pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens that need no blank around them.

        Args:
            tokens: pieces and special tokens.

        Returns:
            The text. As published, each run of special tokens puts a blank, not before itself
            but before the ordinary text that it follows.
        """
        special = set(self.all_special_tokens)
        text = plain = ""
        for is_special, run in groupby(tokens, special.__contains__):
            if is_special:
                text += " " + plain + "".join(run)
                plain = ""
            else:
                plain = self.sp_model.decode(list(run))
        return self.clean_up_tokenization(text + plain)

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = True,
        **kwargs,
    ) -> str:
        tokens = self.convert_ids_to_tokens(token_ids, skip_special_tokens=skip_special_tokens)
        tokens = [tokens] if isinstance(tokens, str) else tokens
        parts: list[str] = []
        for is_apart, run in groupby(tokens, self._tokens_apart().__contains__):
            texts = list(run)
            parts += texts if is_apart else [self.convert_tokens_to_string(texts)]
        text = (" " if spaces_between_special_tokens else "").join(filter(None, parts))
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _tokens_apart(self) -> set[str]:
        """Tokens that decode with a blank on either side: those that sentencepiece lacks."""
        named, special = set(self.special_tokens_map.values()), set(self.all_special_tokens)
        return {
            token
            for token, index in self._added_tokens_encoder.items()
            if token not in named and (index >= self.vocab_size or token not in special)
        }


def _drop_markers(pieces: list[str], unk_token: str) -> list[str]:
    """`pieces` without those of the marker."""
    kept: list[str] = []
    for piece in pieces:
        if MARKER not in piece:
            kept.append(piece)
        elif piece != MARKER:
            # Without byte pieces a run of unknown characters is one piece; less its marker it
            # could spell a control token.
            kept.append(unk_token)
        if kept[-len(MARKER_PIECES) :] == MARKER_PIECES:
            del kept[-len(MARKER_PIECES) :]
    return kept
