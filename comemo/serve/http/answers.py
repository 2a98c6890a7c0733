"""Events of an engine as the JSON that clients of OpenAI expect."""

import time
import uuid
from dataclasses import asdict
from typing import Any

from comemo.serve.http.forms import Form
from comemo.serve.work import Begun, Ended, Event, Looked, Piece, TokenFacts


class Completion:
    """One chat completion while its events arrive.

    Args:
        model: its name.
        form: what was asked.
        tokenizer: of the checkpoint, for the text of single tokens.

    Attributes:
        begun: None before the prompt is read.
        tokens: of all answers so far.
        first_s: seconds of `time.perf_counter` when the first token came; None before.
    """

    def __init__(self, model: str, form: Form, tokenizer: Any) -> None:
        self._form, self._tokenizer = form, tokenizer
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.begun: Begun | None = None
        self.tokens, self.first_s = 0, 0.0  # no token yet
        count = form.sampling.n
        self.texts: list[str] = [""] * count
        self.reasons: list[str | None] = [None] * count
        self._logprobs: list[list[dict[str, Any]]] = [[] for _ in range(count)]
        self._looked: list[Looked | None] = [None] * count

    def take(self, event: Event) -> list[dict[str, Any]]:
        """Add an event; returns the parts of a stream that it makes."""
        if isinstance(event, Begun):
            self.begun = event
            parts = [
                self._chunk(choice, {"role": "assistant", "content": ""})
                for choice in range(len(self.texts))
            ]
            if self._form.report:
                parts[0]["comemo"] = {"begun": asdict(event)}
            return parts
        if isinstance(event, Piece):
            return [self._piece(event)] if self._add(event) else []
        if isinstance(event, Ended):
            self.reasons[event.choice] = event.reason
            return [self._chunk(event.choice, {}, event.reason)]
        if isinstance(event, Looked):
            self._looked[event.choice] = event
            return [self._chunk(event.choice, {}) | {"comemo": {"look": describe_look(event)}}]
        return []

    def last_parts(self) -> list[dict[str, Any]]:
        """What a stream ends with."""
        if not self._form.usage:
            return []
        return [self._head | {"object": "chat.completion.chunk", "choices": [], **self.usage()}]

    def whole(self) -> dict[str, Any]:
        """The response of a completion that is not streamed."""
        choices = []
        for choice, text in enumerate(self.texts):
            message = {"role": "assistant", "content": text, "refusal": None}
            logprobs = None
            if self._form.sampling.logprobs is not None:
                logprobs = {"content": self._logprobs[choice], "refusal": None}
            choices.append(
                {
                    "index": choice,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": self.reasons[choice],
                }
            )
        response = self._head | {"object": "chat.completion", "choices": choices, **self.usage()}
        extension: dict[str, Any] = {}
        if self._form.report and self.begun is not None:
            extension["begun"] = asdict(self.begun)
        if self._form.look:
            looks = [None if one is None else describe_look(one) for one in self._looked]
            extension["look"] = looks[0] if len(looks) == 1 else looks
        return response | ({"comemo": extension} if extension else {})

    def usage(self) -> dict[str, Any]:
        """The field `usage`."""
        prompt = 0 if self.begun is None else self.begun.prompt_tokens
        cached = 0 if self.begun is None else self.begun.cached_tokens
        counts = {
            "prompt_tokens": prompt,
            "completion_tokens": self.tokens,
            "total_tokens": prompt + self.tokens,
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return {"usage": counts}

    def _add(self, piece: Piece) -> bool:
        """Count a piece; whether a stream shows it."""
        self.texts[piece.choice] += piece.text
        if piece.token is None:
            return True
        self.tokens += 1
        self.first_s = self.first_s or time.perf_counter()
        if self._form.sampling.logprobs is not None:
            self._logprobs[piece.choice].append(self._describe_token(piece.token))
            return True
        return bool(piece.text or self._form.report)

    def _piece(self, piece: Piece) -> dict[str, Any]:
        chunk = self._chunk(piece.choice, {"content": piece.text})
        if self._form.sampling.logprobs is not None and piece.token is not None:
            content = [self._logprobs[piece.choice][-1]]
            chunk["choices"][0]["logprobs"] = {"content": content, "refusal": None}
        if self._form.report and piece.step_s is not None:
            chunk["comemo"] = {"step_s": round(piece.step_s, 6)}
        return chunk

    def _chunk(
        self, choice: int, delta: dict[str, Any], reason: str | None = None
    ) -> dict[str, Any]:
        shown = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}
        return self._head | {"object": "chat.completion.chunk", "choices": [shown]}

    def _describe_token(self, token: TokenFacts) -> dict[str, Any]:
        most = self._form.sampling.logprobs or 0
        return self._name(token.id, token.logprob) | {
            "top_logprobs": [self._name(*other) for other in token.others[:most]]
        }

    def _name(self, token: int, logprob: float | None) -> dict[str, Any]:
        data = token_bytes(self._tokenizer, token)
        text = data.decode("utf-8", errors="replace")
        # JSON knows no infinity; clients of OpenAI know this number for it.
        value = -9999.0 if logprob is None or logprob == float("-inf") else logprob
        return {"token": text, "logprob": value, "bytes": list(data)}


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of one token; a space where a word begins."""
    piece = str(tokenizer.convert_ids_to_tokens(token))
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode("utf-8", errors="replace")


def describe_look(looked: Looked) -> dict[str, Any]:
    """The heat maps of an answer, rounded to 5 digits."""
    pictures = []
    for heat in looked.heat:
        _, down, across = heat.shape
        values = [[round(value, 5) for value in word] for word in heat.flatten(1).tolist()]
        pictures.append({"across": across, "down": down, "heat": values})
    return {"words": looked.words, "pictures": pictures}
