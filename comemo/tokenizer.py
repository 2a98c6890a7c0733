"""The published sentencepiece tokenizer, id by id, with a way to keep user text from being control.

A control token is a token flagged special, such as `<|im_end|>` or `<IMG_CONTEXT>`. As published,
its name in user text becomes the control token, and so does the name of the sentencepiece piece
that it replaced (`[UNUSED_TOKEN_145]`). A `MARKER` inside the name keeps it text: the name no
longer matches, and the marker's own pieces are dropped. `comemo.prompts.escape` inserts the
markers. A string without a marker gives the published ids.
"""

import inspect
import json
import os
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken
from transformers.processing_utils import TextKwargs
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from comemo.processing.streamed_text import streaming_tokenizer
from comemo.safety.files import check_class, hub_options, read_json

MARKER = "\ufdd0"  # a Unicode noncharacter: valid text does not contain it
MARKER_PIECES = [f"<0x{byte:02X}>" for byte in MARKER.encode()]

# Tokens of images and regions, which the published model has after those of its language model.
ADDED_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
)

_SURROGATE = re.compile("[\ud800-\udfff]")

# Keywords of loading, and the key that names code in a checkpoint: not saved.
LOADING_KEYS = ("auto_map", "trust_remote_code", "use_fast")
# What AutoTokenizer takes, with no effect here.
OF_AUTO = ("config", "code_revision", "tokenizer_type", "trust_remote_code", "use_fast")

# What transformers takes in addition to the keywords of the class and of a call.
OF_FILES = (
    "cache_dir",
    "code_revision",
    "config",
    "files_loaded",
    "force_download",
    "from_slow",
    "gguf_file",
    "local_files_only",
    "name_or_path",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "tokenizer_file",
    "user_agent",
)
OF_TOKENS = (
    "added_tokens_decoder",
    "additional_special_tokens",
    "cls_token",
    "extra_special_tokens",
    "mask_token",
    "model_specific_special_tokens",
    "sep_token",
    "spaces_between_special_tokens",
    "split_special_tokens",
)
OF_CLASS = (
    "backend",
    "chat_template",
    "do_lower_case",
    "legacy",
    "max_len",
    "model_input_names",
    "model_max_length",
    "padding_side",
    "processor_class",
    "response_schema",
    "response_template",
    "sp_model_kwargs",
    "tokenizer_class",
    "tokenizer_type",
    "truncation_side",
)


class InternLM2Tokenizer(SentencePieceBackend):
    """Sentencepiece tokenizer under the name that published `tokenizer_config.json` files give.

    Args:
        vocab_file: path of `tokenizer.model`.
        unk_token, bos_token, eos_token, pad_token: names of the special tokens.
        add_bos_token: put `bos_token` before every text.
        add_eos_token: put `eos_token` after every text.
        clean_up_tokenization_spaces: clean up the joined text too; its parts always are.
        **kwargs: as in any transformers tokenizer. Padding is on the left unless `padding_side` is
            "right": an answer follows the last token of its prompt.

    Decoding puts a space before text that is followed by a special token, as published: text can
    change when such a token comes. A streamer of transformers gives the same text as decoding at
    the end if it has `skip_special_tokens=True` and no punctuation follows a space.

    Raises:
        ValueError: there is no `vocab_file`, or it is not a sentencepiece model. Later: text with
            a lone surrogate, which UTF-8 cannot encode.
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
        except RuntimeError as error:  # from sentencepiece
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
        """As in transformers, but `trust_remote_code` has no effect: code is never loaded.

        Padding is on the left unless `padding_side` is given here. The side in the files of a
        checkpoint is that of training, where it does not matter: a prompt padded on the right is
        answered wrongly.

        Raises:
            ValueError: an unknown keyword, files of another tokenizer, or as the class.
        """
        function, path = f"{cls.__name__}.from_pretrained", pretrained_model_name_or_path
        if "_from_pipeline" not in kwargs:  # a pipeline also passes options of the model
            check_keywords(function, kwargs)
        for name in OF_AUTO:
            kwargs.pop(name, None)
        settings = read_json(path, "tokenizer_config.json", **hub_options(kwargs))
        known = (cls.__name__, "InternLM2TokenizerFast", "InternLM2Tokenizer")
        check_class(function, path, settings.get("tokenizer_class"), known)
        side = kwargs.pop("padding_side", None) or "left"
        return super().from_pretrained(path, *args, padding_side=side, **kwargs)

    def _save_pretrained(
        self, save_directory: Any, file_names: tuple[str, ...], *args: Any, **kwargs: Any
    ) -> tuple[str, ...]:
        """Also write `add_bos_token` and `add_eos_token`, which transformers does not."""
        path = Path(file_names[0])
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """As in transformers.

        Raises:
            ValueError: the text contains a lone surrogate.
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
        """Whether the model puts a space before every text, also before single words."""
        return self.sp_model.encode("a", out_type=str)[0].startswith("▁")

    @property
    def _tokenizer(self) -> Tokenizer:
        """What the server of transformers decodes with while it streams, under its own name."""
        return streaming_tokenizer(self)

    @property
    def control_literals(self) -> set[str]:
        """Texts that would become control tokens: their names and those of replaced pieces."""
        ids = set(self.all_special_ids)
        ids |= {index for index, token in self._added_tokens_decoder.items() if token.special}
        replaced = {self.sp_model.IdToPiece(index) for index in ids if index < self.vocab_size}
        return {self.convert_ids_to_tokens(index) for index in ids} | replaced

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        pieces = self.sp_model.encode(text, out_type=str)
        return _drop_markers(pieces, self.unk_token) if MARKER in text else pieces

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join tokens that need no space around them.

        Args:
            tokens: pieces and special tokens.

        Returns:
            The text. As published, each run of special tokens puts a space before the ordinary
            text in front of it, not before itself.
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
        """Tokens that decode with a space on either side: those that sentencepiece lacks."""
        named, special = set(self.special_tokens_map.values()), set(self.all_special_tokens)
        return {
            token
            for token, index in self._added_tokens_encoder.items()
            if token not in named and (index >= self.vocab_size or token not in special)
        }


def _drop_markers(pieces: list[str], unk_token: str) -> list[str]:
    """`pieces` without the pieces of the marker."""
    kept: list[str] = []
    for piece in pieces:
        if MARKER not in piece:
            kept.append(piece)
        elif piece != MARKER:
            # Without byte pieces a run of unknown characters is one piece; without its marker it
            # could spell a control token.
            kept.append(unk_token)
        if kept[-len(MARKER_PIECES) :] == MARKER_PIECES:
            del kept[-len(MARKER_PIECES) :]
    return kept


def check_unicode(function: str, text: str) -> None:
    """Refuse text that UTF-8 cannot encode, such as one half of an emoji.

    Args:
        function: the name that the error begins with.
        text: any.

    Raises:
        ValueError: the text contains a lone surrogate.
    """
    if found := _SURROGATE.search(text):
        raise ValueError(
            f"{function}: wanted text of whole characters, got a lone surrogate {found[0]!r} at"
            f" {found.start()}"
        )


def check_keywords(function: str, keywords: dict[str, Any]) -> None:
    """Refuse keywords of `from_pretrained` that no tokenizer has.

    Args:
        function: the name that the error begins with.
        keywords: as given.

    Raises:
        ValueError: names the first unknown keyword.
    """
    for name, value in keywords.items():
        # Names of methods are left to transformers, which refuses them.
        known = (
            name in _keyword_names() or name.startswith("_") or hasattr(InternLM2Tokenizer, name)
        )
        # Any name may be that of a token.
        if not known and not (name.endswith("_token") and isinstance(value, (str, AddedToken))):
            raise ValueError(f"{function}: there is no option {name}")


def _keyword_names() -> set[str]:
    own = set(inspect.signature(InternLM2Tokenizer.__init__).parameters) - {"self", "kwargs"}
    return own.union(OF_FILES, OF_TOKENS, OF_CLASS, LOADING_KEYS, TextKwargs.__annotations__)
