"""Train a small tokenizer in the published layout."""

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from comemo.tokenizer import ADDED_TOKENS, InternLM2Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space
# As in the published vocabulary, unused pieces with a new name. `ADDED_TOKENS` follow the last one.
RENAMED_TOKENS = (
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)


def save_tokenizer(
    directory: Path,
    sentences: Iterable[str],
    vocab_size: int,
    whole: Sequence[str] = (),
    **options: Any,
) -> int:
    """Train a tokenizer and save it in the published layout.

    Args:
        directory: of the checkpoint, which exists.
        sentences: what it is trained on.
        vocab_size: at most, without `ADDED_TOKENS`.
        whole: texts that are one token each, wherever they are.
        options: of `SentencePieceTrainer.train`.

    Returns:
        The size of the vocabulary, with `ADDED_TOKENS`.
    """
    import sentencepiece  # takes a while, and only this needs it

    unused = [f"[UNUSED_TOKEN_{i}]" for i in range(len(RENAMED_TOKENS))]
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=trained,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[*unused, *(text.replace(" ", SPACE) for text in whole)],
        num_threads=1,
        minloglevel=2,
        **options,
    )
    proto = trained.getvalue()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2}
    ids |= {
        name: pieces.piece_to_id(piece) for name, piece in zip(RENAMED_TOKENS, unused, strict=True)
    }
    ids |= {name: pieces.vocab_size() + i for i, name in enumerate(ADDED_TOKENS)}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    published = {
        "tokenizer_class": "InternLM2Tokenizer",
        "added_tokens_decoder": {
            str(index): {"content": name, "special": True, **flags} for name, index in ids.items()
        },
        "additional_special_tokens": [*RENAMED_TOKENS, *ADDED_TOKENS],
    }
    (directory / "tokenizer.model").write_bytes(proto)
    (directory / "tokenizer_config.json").write_text(json.dumps(published), encoding="utf-8")
    InternLM2Tokenizer.from_pretrained(directory).save_pretrained(directory)
    return pieces.vocab_size() + len(ADDED_TOKENS)
