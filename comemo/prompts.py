"""Prompts as text and ids: chat templates, `<image>` marks, and escaping of user text.

To keep a prompt safe: first `escape` user text, then `build_prompt`, `expand_images`,
`encode_prompt`.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from comemo.tokenizer import MARKER, InternLM2Tokenizer, check_unicode

IMAGE_MARK = "<image>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_CONTEXT = "<IMG_CONTEXT>"

Turn = tuple[str, str | None]


@dataclass(frozen=True)
class Template:
    """The fixed texts of a chat format.

    A message is its role, its text and `separator`. An empty message is its role alone; only the
    system message always ends with `separator`.
    """

    system_message: str
    system: str = "<|im_start|>system\n"
    user: str = "<|im_start|>user\n"
    assistant: str = "<|im_start|>assistant\n"
    separator: str = "<|im_end|>"


_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、"
    "清华大学及多家合作单位联合开发的多模态大语言模型。"
)
TEMPLATES = {
    "internlm2-chat": Template(_SYSTEM),
    "Hermes-2": Template(_SYSTEM),
    "internlm2-flamingo-chat": Template(_SYSTEM),
    "phi3-chat": Template(_SYSTEM, "<|system|>\n", "<|user|>\n", "<|assistant|>\n", "<|end|>"),
    "internvl2_5": Template(_SYSTEM_2_5, separator="<|im_end|>\n"),
}

_JINJA = """\
{%- macro message(role, text) -%}
{{ role }}{% if text %}{{ text + SEPARATOR }}{% endif %}
{%- endmacro -%}
{%- macro flatten(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for item in content -%}
{%- if item['type'] == 'image' -%}{{ IMAGE_LINE }}
{%- elif item['type'] == 'text' -%}{{ item['text'] }}
{%- else -%}{{ raise_exception('wanted content of type text or image, got ' ~ item['type']) }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{ SYSTEM + DEFAULT + SEPARATOR }}
{%- endif -%}
{%- for item in messages -%}
{%- if item['role'] == 'user' -%}{{ message(USER, flatten(item['content'])) }}
{%- elif item['role'] == 'assistant' -%}{{ message(ASSISTANT, flatten(item['content'])) }}
{%- elif item['role'] == 'system' and loop.first -%}
{{ SYSTEM + flatten(item['content']) + SEPARATOR }}
{%- else -%}{{ raise_exception('wanted user or assistant, or system first; got ' ~ item['role']) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ASSISTANT }}{%- endif -%}
"""


def _find_template(caller: str, name: str) -> Template:
    if name not in TEMPLATES:
        raise ValueError(f"{caller}: wanted a template of {sorted(TEMPLATES)}, got {name!r}")
    return TEMPLATES[name]


def build_prompt(
    turns: Sequence[Turn], template: str = "internlm2-chat", system_message: str | None = None
) -> str:
    """Write a conversation as one string.

    Args:
        turns: pairs of question and answer; None for the answer to be generated.
        template: a key of `TEMPLATES`.
        system_message: None for the template's own.

    Returns:
        The prompt, with `<image>` marks.

    Raises:
        ValueError: there is no such template.
    """
    words = _find_template("build_prompt", template)
    if system_message is None:
        system_message = words.system_message
    prompt = words.system + system_message + words.separator
    for turn in turns:
        for role, text in zip((words.user, words.assistant), turn, strict=True):
            prompt += role + text + words.separator if text else role
    return prompt


def stop_text(template: str = "internlm2-chat") -> str:
    """The name of the stop token, the control token that ends an answer.

    Args:
        template: a key of `TEMPLATES`.

    Raises:
        ValueError: there is no such template.
    """
    return _find_template("stop_text", template).separator.strip()


def chat_template(template: str = "internlm2-chat") -> str:
    """Write a template in Jinja, for `apply_chat_template`.

    Args:
        template: a key of `TEMPLATES`.

    Returns:
        Jinja source that renders messages to what `build_prompt` gives for the same turns. A
        message's content is a string or a list of text and image items; an image item renders as
        an `<image>` line. User text must be escaped before.

    Raises:
        ValueError: there is no such template.
    """
    words = _find_template("chat_template", template)
    values = {
        "SYSTEM": words.system,
        "DEFAULT": words.system_message,
        "USER": words.user,
        "ASSISTANT": words.assistant,
        "SEPARATOR": words.separator,
        "IMAGE_LINE": f"{IMAGE_MARK}\n",
    }
    # A JSON string is a Jinja literal too.
    literals = {name: json.dumps(text, ensure_ascii=False) for name, text in values.items()}
    return "".join(f"{{%- set {name} = {text} -%}}\n" for name, text in literals.items()) + _JINJA


def with_image_mark(question: str) -> str:
    """Put an `<image>` line before a question that has no `<image>`."""
    return question if IMAGE_MARK in question else f"{IMAGE_MARK}\n{question}"


def expand_images(prompt: str, token_counts: Sequence[int]) -> str:
    """Replace the n-th `<image>` by as many `<IMG_CONTEXT>` as the n-th image has tokens.

    Args:
        prompt: text with `<image>` marks.
        token_counts: one positive number per image.

    Returns:
        The prompt, each run of `<IMG_CONTEXT>` between `<img>` and `</img>`.

    Raises:
        ValueError: there are more or fewer marks than images, or an image has no tokens.
    """
    first, *rest = prompt.split(IMAGE_MARK)
    if len(rest) != len(token_counts):
        raise ValueError(
            f"expand_images: wanted one {IMAGE_MARK} mark per image, got "
            f"{_count(len(rest), f'{IMAGE_MARK} mark')} for {_count(len(token_counts), 'image')}"
        )
    if any(count < 1 for count in token_counts):
        raise ValueError(f"expand_images: wanted positive token counts, got {list(token_counts)}")
    for count, text in zip(token_counts, rest, strict=True):
        first += IMAGE_START + IMAGE_CONTEXT * count + IMAGE_END + text
    return first


def encode_with_images(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    token_counts: Sequence[int],
    add_special_tokens: bool = True,
) -> list[int]:
    """Turn a prompt with `<image>` marks into ids.

    Args:
        tokenizer, add_special_tokens: see `encode_prompt`.
        prompt: what `build_prompt` returned.
        token_counts: see `expand_images`.

    Returns:
        The ids that `encode_prompt` gives for what `expand_images` returns. One token of each image
        is encoded and then repeated, which is much faster.

    Raises:
        ValueError: as `expand_images` and `encode_prompt`.
    """
    text = expand_images(prompt, [min(count, 1) for count in token_counts])
    context, counts = tokenizer.convert_tokens_to_ids(IMAGE_CONTEXT), iter(token_counts)
    ids: list[int] = []
    for index in encode_prompt(tokenizer, text, add_special_tokens):
        ids += [index] * (next(counts) if index == context else 1)
    return ids


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Turn],
    template: str,
    system_message: str | None,
    token_counts: Sequence[int],
) -> tuple[list[int], str]:
    """Turn a conversation into ids; its texts are escaped here.

    Args:
        tokenizer: see `encode_prompt`.
        turns, template, system_message: see `build_prompt`; not escaped.
        token_counts: see `expand_images`.

    Returns:
        The ids, and the escaped prompt with its `<image>` marks.

    Raises:
        ValueError: as `escape`, `build_prompt` and `encode_with_images`.
    """

    def escaped(text: str | None) -> str | None:
        return None if text is None else escape(text, tokenizer)

    safe = [(escape(question, tokenizer), escaped(answer)) for question, answer in turns]
    prompt = build_prompt(safe, template, escaped(system_message))
    return encode_with_images(tokenizer, prompt, token_counts), prompt


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def escape(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Mark the names of control tokens in user text so that they stay text.

    Args:
        text: any user text. `<image>` is not a control token and keeps its meaning.
        tokenizer: that defines the control tokens.

    Returns:
        The text with `MARKER` after the first character of each control token's name, overlapping
        ones included, and no other `MARKER`. Text without such names is unchanged.

    Raises:
        ValueError: the text contains a control token of one character, which no marker can split,
            or a lone surrogate.
    """
    check_unicode("escape", text)
    text = text.replace(MARKER, "")
    literals = _control_literals(tokenizer)
    for literal in literals:
        if len(literal) == 1 and literal in text:
            raise ValueError(
                f"escape: wanted control tokens of two characters or more, got {literal!r} in "
                f"{text!r}: it cannot be kept as text"
            )
    # The lookahead consumes one character only, so that all overlapping names are found.
    return re.sub(rf"(?={_any_of(literals)})(?s:.)", rf"\g<0>{MARKER}", text)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, add_special_tokens: bool = True
) -> list[int]:
    """Turn a prompt with escaped user text into ids.

    Args:
        tokenizer: `InternLM2Tokenizer` or any other. Another one does not know `MARKER`: a prompt
            with markers is then split at the control tokens, and each part encoded alone.
        prompt: what `expand_images` returned.
        add_special_tokens: whether to add the special tokens that the tokenizer puts around every
            text.

    Returns:
        The ids.

    Raises:
        ValueError: the tokenizer turns text into a control token in any case, the ids of a text
            change when special tokens are put around it, or the prompt contains a lone surrogate.
    """
    check_unicode("encode_prompt", prompt)
    if isinstance(tokenizer, InternLM2Tokenizer) or MARKER not in prompt:
        return tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
    literals = _control_literals(tokenizer)
    control = {tokenizer.convert_tokens_to_ids(literal): literal for literal in literals}
    control.pop(tokenizer.unk_token_id, None)
    ids: list[int] = []
    for part in re.split(f"({_any_of(literals)})", prompt):
        if part in literals:
            ids.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            ids += _encode_text(tokenizer, part.replace(MARKER, ""), control)
    before, after = ids_around(tokenizer, prompt) if add_special_tokens else ([], [])
    return before + ids + after


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, control: dict[int, str]
) -> list[int]:
    """Ids of `text`, none of them in `control` (id -> name)."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    found = [control[index] for index in encoded["input_ids"] if index in control]
    if found:
        raise ValueError(
            f"encode_prompt: wanted a tokenizer that can keep {text!r} as text, got "
            f"{type(tokenizer).__name__}, which turns it into {found[0]}"
        )
    return encoded["input_ids"]


def ids_around(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after those of a text.

    Args:
        tokenizer: any.
        text: any text with at least one id.

    Raises:
        ValueError: the ids of the text itself change when others are put around them.
    """
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    full = tokenizer(text)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ValueError(
        "encode_prompt: wanted a tokenizer that puts its special tokens around a text, got "
        f"{type(tokenizer).__name__}, which changes the text's own ids"
    )


def _control_literals(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    if isinstance(tokenizer, InternLM2Tokenizer):
        return tokenizer.control_literals
    added = tokenizer.added_tokens_decoder.values()
    return set(tokenizer.all_special_tokens) | {token.content for token in added if token.special}


def _any_of(literals: set[str]) -> str:
    """A pattern for any of `literals`, the longest first; without any, one that never matches."""
    longest_first = sorted(literals, key=len, reverse=True)
    return "(?:" + "|".join(map(re.escape, longest_first)) + ")" if literals else "(?!)"
