"""Load a tokenizer from the files of a directory: as data, with no class of another package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from comemo.safety.files import find_file, hub_options, read_json
from comemo.tokenizer import InternLM2Tokenizer

# A tokenizer.json is read by this class, which has its name in the files that it writes.
GENERAL = ("PreTrainedTokenizerFast", "TokenizersBackend")
OWN = ("InternLM2Tokenizer", "InternLM2TokenizerFast")


class CheckpointTokenizer:
    """`from_pretrained` of the tokenizer of a CoMemo checkpoint."""

    @staticmethod
    def from_pretrained(path: Any, **kwargs: Any) -> PreTrainedTokenizerBase:
        """The published sentencepiece tokenizer, or the one in a `tokenizer.json`.

        Args:
            path: directory or repository. Its files must name no class, `InternLM2Tokenizer`, or,
                beside a tokenizer.json, a class of `GENERAL`.
            kwargs: see `InternLM2Tokenizer.from_pretrained`. Padding is on the left.

        Raises:
            ValueError: files of another tokenizer.
        """
        hub = hub_options(kwargs)
        named = read_json(path, "tokenizer_config.json", **hub).get("tokenizer_class")
        if named in GENERAL and find_file(path, "tokenizer.json", **hub):
            side = kwargs.pop("padding_side", None) or "left"
            for name in ("trust_remote_code", "code_revision", "config", "use_fast"):
                kwargs.pop(name, None)
            options = kwargs | {"padding_side": side}
            return _load("CheckpointTokenizer", path, PreTrainedTokenizerFast, options)
        return InternLM2Tokenizer.from_pretrained(path, **kwargs)


def read_tokenizer(section: str, directory: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a language model.

    `InternLM2Tokenizer` reads a sentencepiece InternLM2. Otherwise a tokenizer.json is read as it
    is, and without one the class of transformers that tokenizer_config.json names reads its files.

    Args:
        section: the name that an error begins with.
        directory: of the tokenizer's files.

    Returns:
        An `InternLM2Tokenizer` or a `PreTrainedTokenizerFast`, which `CheckpointTokenizer` reads.

    Raises:
        ValueError: no such files, or a class that transformers does not have.
    """
    folder = Path(directory)
    config = read_json(directory, "config.json") if (folder / "config.json").is_file() else {}
    settings = read_json(directory, "tokenizer_config.json")
    named = settings.get("tokenizer_class")
    has_json = (folder / "tokenizer.json").is_file()
    has_pieces = (folder / "tokenizer.model").is_file()
    kinds = ("internlm2", "comemo_chat")
    own = named in OWN or (named is None and config.get("model_type") in kinds)
    if own and has_pieces:
        return InternLM2Tokenizer.from_pretrained(directory)
    options: dict[str, Any] = {"padding_side": "left"}
    if has_json:
        return _load(section, directory, PreTrainedTokenizerFast, options)
    general = named is None or named in GENERAL
    kind = None if general else getattr(transformers, str(named), None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerBase)):
        raise ValueError(
            f"{section}: {directory!r} must hold a tokenizer.json, or a tokenizer_config.json that"
            f" names a tokenizer class of transformers, got {named!r}: code of a directory is not"
            " run"
        )
    tokenizer = _load(section, directory, kind, options)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{section}: the tokenizer in {directory!r} must be one that tokenizer.json can hold,"
            f" got {named}: convert it first"
        )
    # A checkpoint's tokenizer is read by the general class: its files name no other one.
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        padding_side="left",
        **tokenizer.special_tokens_map,
    )


def _load(section: str, directory: Any, kind: Any, options: dict[str, Any]) -> Any:
    try:
        tokenizer = kind.from_pretrained(directory, **options)
    except Exception as error:  # tokenizers raises nothing more special
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{section}: {kind.__name__} cannot read the tokenizer in {str(directory)!r}: {reason}"
        ) from error
    tokenizer.init_kwargs.pop("auto_map", None)  # names code; would be saved
    return tokenizer


def missing_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[str]:
    """Those of `names` that are not added tokens of a tokenizer, in their order.

    Args:
        tokenizer: any.
        names: of control tokens.
    """
    known = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return [name for name in names if name not in known]
