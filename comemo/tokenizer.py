"""The published sentencepiece tokenizer, exact to the id, that can also keep user text inert.

A control token is a token flagged special, such as `<|im_end|>` or `<IMG_CONTEXT>`. As published,
whoever types its name, or the name of the sentencepiece piece it replaced
(`[UNUSED_TOKEN_145]`), gets the control token. A `MARKER` inside the name keeps it text: no part
of the name can then match, and the marker's own pieces are dropped. `comemo.prompts.escape` places
the markers. A string without a marker gives the published ids.
"""

import inspect
import json
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AddedToken
from transformers.processing_utils import TextKwargs
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from comemo.safety.files import check_class, hub_options, read_json

MARKER = "\ufdd0"  # a Unicode noncharacter: no valid text holds one
MARKER_PIECES = [f"<0x{byte:02X}>" for byte in MARKER.encode()]

_SURROGATE = re.compile("[\ud800-\udfff]")

# Keywords that steer the loading, and the pointer to code inside a checkpoint: not to be saved.
LOADING_KEYS = ("auto_map", "trust_remote_code", "use_fast")
# What AutoTokenizer takes, and here is of no use.
OF_AUTO = ("config", "code_revision", "tokenizer_type", "trust_remote_code", "use_fast")

# What transformers takes beside those of the class and of a call: to find files, to set up.
KEYWORDS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder"),
    *("token", "code_revision", "config", "from_slow", "gguf_file", "tokenizer_file"),
    *("tokenizer_type", "user_agent", "added_tokens_decoder", "additional_special_tokens"),
    *("extra_special_tokens", "model_specific_special_tokens", "sep_token", "cls_token"),
    *("mask_token", "backend", "chat_template", "files_loaded", "legacy", "model_input_names"),
    *("model_max_length", "max_len", "name_or_path", "padding_side", "processor_class"),
    *("response_schema", "response_template", "sp_model_kwargs", "split_special_tokens"),
    *("spaces_between_special_tokens", "tokenizer_class", "truncation_side", "do_lower_case"),
)


class InternLM2Tokenizer(SentencePieceBackend):
    """Sentencepiece tokenizer under the name that published `tokenizer_config.json` files give.

    Args:
        vocab_file: path of `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: names of the special tokens.
        add_bos_token: put `bos_token` before every text.
        add_eos_token: put `eos_token` after every text.
        clean_up_tokenization_spaces: clean up the joined text too; the parts always are.
        **kwargs: as of any transformers tokenizer. Padding is on the left unless `padding_side`
            says "right": an answer follows the last token of its prompt.

    Decoding puts a blank before the text that a special token follows, as published, so that text
    can change when one comes. A streamer of transformers puts out what is decoded in the end if it
    has `skip_special_tokens=True`, and punctuation follows no blank.

    Raises:
        ValueError: there is no `vocab_file`, or it is no sentencepiece model. Later: text that
            holds half a surrogate pair, which no UTF-8 can.
    """

    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

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
                add_bos_token=add_bos_token,
                add_eos_token=add_eos_token,
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

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> Any:
        """As of transformers, but that `trust_remote_code` changes nothing: no code is looked for.

        Padding is on the left unless `padding_side` is given here.

        What the files of a checkpoint say of the side is how it was trained, where the side does
        not matter: a prompt padded on the right is answered wrongly.

        Raises:
            ValueError: a keyword that no tokenizer has, files of another tokenizer, or as of the
                class.
        """
        function, path = f"{cls.__name__}.from_pretrained", pretrained_model_name_or_path
        if "_from_pipeline" not in kwargs:  # which hands on what is for the model
            check_keywords(function, kwargs)
        for name in OF_AUTO:
            kwargs.pop(name, None)
        told = read_json(path, "tokenizer_config.json", **hub_options(kwargs))
        known = (cls.__name__, "InternLM2TokenizerFast", "InternLM2Tokenizer")
        check_class(function, path, told.get("tokenizer_class"), known)
        side = kwargs.pop("padding_side", None) or "left"
        return super().from_pretrained(path, *args, padding_side=side, **kwargs)

    def _save_pretrained(
        self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write down too what goes around a text: transformers leaves it out of what it wrote."""
        path = Path(file_names[0])
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """As of transformers.

        Raises:
            ValueError: the text holds half a surrogate pair.
        """
        check_unicode("InternLM2Tokenizer", text)
        return super().tokenize(text, **kwargs)

    @property
    def prefix_tokens(self) -> list[int]:
        """Ids before every text."""
        return [self.bos_token_id] if self.add_bos_token else []

    @property
    def suffix_tokens(self) -> list[int]:
        """Ids after every text."""
        return [self.eos_token_id] if self.add_eos_token else []

    @property
    def add_prefix_space(self) -> bool:
        """Whether the model puts a blank before every text, so before words that are alone too."""
        return self.sp_model.encode("a", out_type=str)[0].startswith("▁")

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


def check_unicode(function: str, text: str) -> None:
    """Refuse text that no UTF-8 holds, such as half of a picture character cut in two.

    Args:
        function: whose name the error begins with.
        text: any.

    Raises:
        ValueError: the text holds half a surrogate pair.
    """
    if found := _SURROGATE.search(text):
        raise ValueError(
            f"{function}: wanted text of whole characters, got half a surrogate pair"
            f" {found[0]!r} at {found.start()}"
        )


def check_keywords(function: str, keywords: dict[str, Any]) -> None:
    """Refuse keywords of `from_pretrained` that no tokenizer has.

    Args:
        function: whose name the error begins with.
        keywords: as given.

    Raises:
        ValueError: naming the first.
    """
    for name, value in keywords.items():
        # A name of a method is refused by transformers, in its own words.
        known = (
            name in _keyword_names() or name.startswith("_") or hasattr(InternLM2Tokenizer, name)
        )
        # Any name may be a token's.
        if not known and not (name.endswith("_token") and isinstance(value, (str, AddedToken))):
            raise ValueError(f"{function}: there is no option {name}")


def _keyword_names() -> set[str]:
    own = set(inspect.signature(InternLM2Tokenizer.__init__).parameters) - {"self", "kwargs"}
    return own | set(KEYWORDS) | set(LOADING_KEYS) | set(TextKwargs.__annotations__)
