"""From a conversation to ids and labels: the ids are those of the whole prompt."""

from itertools import accumulate
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from comemo.prompts import (
    IMAGE_CONTEXT,
    IMAGE_END,
    IMAGE_MARK,
    IMAGE_START,
    TEMPLATES,
    encode_prompt,
    escape,
    ids_around,
    stop_text,
)
from comemo.tokenizer import InternLM2Tokenizer

ONE_IMAGE = IMAGE_START + IMAGE_CONTEXT + IMAGE_END

Part = tuple[str, bool]  # text, and whether it is learnt


class PromptEncoder:
    """Encodes conversations of one template; picklable.

    Args:
        tokenizer: `InternLM2Tokenizer` or any other that `encode_prompt` takes.
        template: a key of `prompts.TEMPLATES`.
        published_text: whether control tokens in texts take effect; otherwise they are escaped.

    Raises:
        ValueError: there is no such template, or the tokenizer has no token for images.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, published_text: bool = False
    ):
        self.tokenizer, self.published_text = tokenizer, published_text
        self.stop = stop_text(template)
        self.words = TEMPLATES[template]
        self.context = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT)
        if self.context is None or self.context == tokenizer.unk_token_id:
            got = type(tokenizer).__name__
            raise ValueError(f"data: the tokenizer must have the token {IMAGE_CONTEXT}, got {got}")
        self.before, self.after = ids_around(tokenizer, self.stop)
        self.apart = self._messages_stand_apart()
        fixed = (self.words.assistant, self.words.separator[len(self.stop) :])
        self.known = {text: self._ids(text) for text in fixed}
        if self.apart:
            message = self.words.system_message
            text = self.words.system + self._safe(message) + self.stop
            self.known[text] = self._ids(text)

    def encode(
        self, turns: list[tuple[str, str]], system: str | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode a conversation.

        Args:
            turns: questions and answers, with `<image>` marks.
            system: None for the template's system message.

        Returns:
            ids int64 [N], with one `<IMG_CONTEXT>` per image, equal to those of the whole prompt;
            and whether each is learnt, bool [N]: the answers and the stop tokens after them. An
            answer begins where the ids first differ from those of the prompt that asks for it,
            also if a token holds the end of that prompt too. A token that holds the end of a stop
            text and more is not learnt.

        Raises:
            ValueError: text that cannot be encoded, see `escape`.
        """
        messages = self.write(turns, system)
        pieces = (
            [piece for message in messages for piece in self._encode_message(message)]
            if self.apart
            else self._encode_whole([part for message in messages for part in message])
        )
        pieces = [(self.before, False), *pieces, (self.after, False)]
        ids = np.array([index for piece, _ in pieces for index in piece], np.int64)
        sizes = [len(piece) for piece, _ in pieces]
        return ids, np.repeat([learnt for _, learnt in pieces], sizes)

    def write(self, turns: list[tuple[str, str]], system: str | None = None) -> list[list[Part]]:
        """The messages of a conversation as parts of text; joined they are the prompt.

        Args:
            turns, system: see `encode`.

        Returns:
            For each message its text up to the stop token or, of an answer, role and answer with
            the stop token apart; then what follows the stop token.
        """
        words, stop = self.words, self.stop
        rest = words.separator[len(stop) :]

        def message(role: str, text: str, ends: bool) -> list[Part]:
            return [(role + text + stop, False), (rest, False)] if ends else [(role, False)]

        system = words.system_message if system is None else system
        messages = [message(words.system, self._safe(system), True)]
        for question, answer in turns:
            asked = self._safe(question).replace(IMAGE_MARK, ONE_IMAGE)
            messages.append(message(words.user, asked, bool(asked)))
            said = self._safe(answer)
            messages.append([(words.assistant, False), (said + stop, True), (rest, False)])
        return messages

    def _encode_message(self, message: list[Part]) -> list[tuple[list[int], bool]]:
        if len(message) < 3:
            return [(self._ids(text), False) for text, _ in message]
        (role, _), (answer, _), (rest, _) = message
        ids = self._ids(role + answer)
        start = _common(self._ids(role), ids)
        return [(ids[:start], False), (ids[start:], True), (self._ids(rest), False)]

    def _encode_whole(self, parts: list[Part]) -> list[tuple[list[int], bool]]:
        """As `_encode_message`, for a template whose messages are not apart for the tokenizer."""
        prompt = "".join(text for text, _ in parts)
        ids = self._ids(prompt)
        ends = accumulate(len(text) for text, _ in parts)
        bounds = {0: 0, len(prompt): len(ids)}
        learnt = [learnt for _, learnt in parts]
        for index, end in enumerate(ends):
            following = learnt[index + 1 : index + 2] or [False]
            if end not in bounds and learnt[index] != following[0]:
                bounds[end] = _common(self._ids(prompt[:end]), ids)
        pieces, start, begun = [], 0, 0
        for text, is_learnt in parts:
            end = start + len(text)
            if end in bounds and end > start:
                pieces.append((ids[begun : bounds[end]], is_learnt))
                begun = max(begun, bounds[end])
            start = end
        return pieces

    def _messages_stand_apart(self) -> bool:
        """Whether each message begins and ends with a token at which the tokenizer splits text.

        Then nothing is merged across their bounds, and they can be encoded one by one.
        """
        if not isinstance(self.tokenizer, InternLM2Tokenizer):
            return False
        splitting = tuple(
            token.content
            for token in self.tokenizer.added_tokens_decoder.values()
            if not (token.lstrip or token.rstrip or token.single_word)
        )
        words = self.words
        starts = (words.system, words.user, words.assistant, words.separator)
        return self.stop in splitting and all(text.startswith(splitting) for text in starts)

    def _ids(self, text: str) -> list[int]:
        known: Any = getattr(self, "known", {})
        if text in known:
            return known[text]
        return encode_prompt(self.tokenizer, text, add_special_tokens=False) if text else []

    def _safe(self, text: str) -> str:
        return text if self.published_text else escape(text, self.tokenizer)


def _common(first: list[int], second: list[int]) -> int:
    """How many ids both begin with."""
    for index, pair in enumerate(zip(first, second, strict=False)):
        if pair[0] != pair[1]:
            return index
    return min(len(first), len(second))
