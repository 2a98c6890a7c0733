"""The body of a chat completion: which fields there are, and what they may hold."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from comemo.batch.options import NumberRule
from comemo.serve.http.errors import HttpError, bad
from comemo.serve.http.settings import ServerSettings
from comemo.serve.work import Sampling

NUMBERS = {
    "temperature": NumberRule(float, 0, 2),
    "top_p": NumberRule(float, 0, 1),
    "max_tokens": NumberRule(int, 1, 10**6),
    "max_completion_tokens": NumberRule(int, 1, 10**6),
    "min_tokens": NumberRule(int, 0, 10**6),
    "n": NumberRule(int, 1, 128),
    "seed": NumberRule(int, -(2**63), 2**63 - 1),
    "top_logprobs": NumberRule(int, 0, 20),
    "frequency_penalty": NumberRule(float, -2, 2),
    "presence_penalty": NumberRule(float, -2, 2),
    "top_k": NumberRule(int, 0, 10**6),
    "repetition_penalty": NumberRule(float, 0.01, 100),
}
READ = (*NUMBERS, "model", "messages", "stream", "stream_options", "stop", "logprobs", "comemo")
# They say nothing about the answer.
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Values with which a field that is not supported asks for nothing.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (),
}
COLDEST = 1e-4  # a lower temperature is greedy: logits would overflow
STOPS = 4


@dataclass(frozen=True)
class Form:
    """A chat completion that was read.

    Attributes:
        messages: as given, not read yet.
        sampling: of the answers.
        open_end: whether the server chose the most tokens of an answer.
        stream: whether the answer is wanted in parts.
        usage: whether the last part counts tokens.
        look, report: extensions: where the memory path looks; costs of each token.
    """

    messages: list[dict[str, Any]]
    sampling: Sampling
    open_end: bool
    stream: bool
    usage: bool
    look: bool
    report: bool


def parse_body(body: bytes) -> dict[str, Any]:
    """The JSON object of a body.

    Raises:
        HttpError: it is not one.
    """
    try:
        item = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise bad(f"the body must be JSON: {reason}") from None
    if not isinstance(item, dict):
        raise bad(f"the body must be a JSON object, got {type(item).__name__}")
    return item


def read_form(item: Mapping[str, Any], settings: ServerSettings) -> Form:
    """Check a chat completion.

    Args:
        item: of `parse_body`. A field that is null was not given.
        settings: of the server.

    Raises:
        HttpError: 400, which names the field; 404 for another model.
    """
    given = {name: value for name, value in item.items() if value is not None}
    _check_names(given)
    for name, rule in NUMBERS.items():
        if name in given and not rule.fits(given[name]):
            raise bad(f"{name} must be {rule}, got {_short(given[name])}", name)
    if not isinstance(given.get("model"), str):
        raise bad(f"model must be the name of a model, here {settings.name!r}", "model")
    if given["model"] != settings.name:
        raise HttpError(
            404,
            f"there is no model {given['model']!r:.80}, only {settings.name!r}",
            param="model",
            code="model_not_found",
        )
    messages = given.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise bad("messages must be a list of objects", "messages")
    extension = _flags(given, "comemo", ("look", "report"))
    stream = _flag(given, "stream")
    options = _flags(given, "stream_options", ("include_usage", "include_obfuscation"))
    if options and not stream:
        raise bad("stream_options need stream to be true", "stream_options")
    return Form(
        messages,
        _sampling(given, settings),
        given.keys().isdisjoint(("max_tokens", "max_completion_tokens")),
        stream,
        options.get("include_usage", False),
        extension.get("look", False),
        extension.get("report", False),
    )


def _check_names(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in READ or name in IGNORED:
            continue
        if name in HARMLESS:
            if value not in HARMLESS[name]:
                raise bad(f"{name} is not supported", name, "unsupported_parameter")
            continue
        near = difflib.get_close_matches(name, (*READ, *HARMLESS), 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise bad(f"there is no field {name!r:.60}{hint}", name[:60], "unknown_parameter")


def _sampling(given: Mapping[str, Any], settings: ServerSettings) -> Sampling:
    limits = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(limits) > 1:
        raise bad("max_tokens and max_completion_tokens must not differ", "max_tokens")
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    right = isinstance(stops, list) and len(stops) <= STOPS
    if not right or not all(isinstance(text, str) and text for text in stops):
        raise bad(f"stop must be a text, or up to {STOPS} texts, none of them empty", "stop")
    logprobs = _flag(given, "logprobs")
    if "top_logprobs" in given and not logprobs:
        raise bad("top_logprobs need logprobs to be true", "top_logprobs")
    temperature = given.get("temperature", settings.temperature)
    return Sampling(
        max_tokens=limits.pop() if limits else settings.max_tokens,
        min_tokens=given.get("min_tokens", 0),
        temperature=0.0 if temperature < COLDEST else float(temperature),
        top_p=float(given.get("top_p", 1.0)),
        top_k=given.get("top_k", 0),
        repetition_penalty=float(given.get("repetition_penalty", 1.0)),
        frequency_penalty=float(given.get("frequency_penalty", 0.0)),
        presence_penalty=float(given.get("presence_penalty", 0.0)),
        seed=given.get("seed"),
        stop=tuple(stops),
        n=given.get("n", 1),
        logprobs=given.get("top_logprobs", 0) if logprobs else None,
    )


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise bad(f"{name} must be true or false, got {_short(value)}", name)
    return value


def _flags(given: Mapping[str, Any], name: str, known: tuple[str, ...]) -> dict[str, bool]:
    value = given.get(name, {})
    if not isinstance(value, dict) or not all(isinstance(v, bool) for v in value.values()):
        raise bad(f"{name} must be an object of true and false", name)
    if unknown := sorted(value.keys() - set(known)):
        raise bad(f"{name} has no field {unknown[0]!r:.60}, only {', '.join(known)}", name)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _short(value: Any) -> str:
    return f"{value!r:.60}"
