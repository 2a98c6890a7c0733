"""From messages in the forms that clients send to the one form that chat templates render.

A message may be a dictionary or another mapping, a dataclass, a pydantic model, or any object with
`role` and `content`. Its content may be text, parts, or nothing. Text and image parts are
understood in the format of transformers and in that of OpenAI.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from comemo import prompts
from comemo.processing import base64_images as encoded

CALLER = "apply_chat_template"
# Fields that hold the image of a part of type image.
SOURCES = ("image", "url", "path", "base64")
# Fields that the published templates would silently ignore.
TOOLS = ("tool_calls", "function_call", "tool_call_id")
ROLES = ("system", "user", "assistant")


def read_conversations(
    conversation: Any, escape: Callable[[str], str], published: bool = True
) -> tuple[list[list[dict[str, Any]]], bool]:
    """Convert one or several conversations to the form that templates render.

    Args:
        conversation: a sequence of messages, or of such sequences; or an object that holds one as
            `messages`.
        escape: makes the text of users safe; applied to every text except roles, types and sources
            of images.
        published: whether a published template renders it. Such a template knows no tools and no
            roles except system (first), user and assistant. Another template may know more: then
            only the form is converted.

    Returns:
        Conversations of dictionaries without None, and whether there were several. `content` is
        text, empty if a published template is given none, or a list of parts
        {"type": "text", "text": ...} and {"type": "image", ...}. An image has at most one source,
        `image` (base64 is decoded), `url` or `path`: nothing is opened here.

    Raises:
        ValueError: no message, a message or part of unknown form, two sources in one image; wrong
            or too long base64. For a published template: another role or part, or tools.
    """
    several = is_batch(conversation)
    batch = conversation if several else [conversation]
    return [_read_one(messages, escape, published) for messages in batch], several


def is_batch(conversation: Any) -> bool:
    """Whether there are several conversations.

    Args:
        conversation: see `read_conversations`.
    """
    if not _is_list(conversation) or not conversation:
        return False
    return _is_list(conversation[0]) or _holds_messages(conversation[0])


def escape_texts(value: Any, escape: Callable[[str], str]) -> Any:
    """Escape every text in nested mappings and lists, except names of fields.

    Args:
        value: tools or documents, see `apply_chat_template`.
        escape: see `read_conversations`.
    """
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, Mapping):
        return {key: escape_texts(item, escape) for key, item in value.items()}
    return [escape_texts(item, escape) for item in value] if _is_list(value) else value


def _read_one(
    conversation: Any, escape: Callable[[str], str], published: bool
) -> list[dict[str, Any]]:
    messages = conversation.messages if _holds_messages(conversation) else conversation
    if not _is_list(messages):
        raise ValueError(f"{CALLER}: wanted a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{CALLER}: wanted at least one message, got an empty list")
    read = [_read_message(message, escape, published) for message in messages]
    late = [place for place, message in enumerate(read) if place and message["role"] == "system"]
    if published and late:
        raise ValueError(f"{CALLER}: a system message must come first, got one at {late[0]}")
    return read


def _read_message(message: Any, escape: Callable[[str], str], published: bool) -> dict[str, Any]:
    fields = _fields(message, "a message", ("role", "content"))
    role = fields.pop("role", None)
    if not isinstance(role, str):
        raise ValueError(f"{CALLER}: a message must have a role, got {role!r}")
    if published:
        _refuse_tools(role, fields)
    content = fields.pop("content", None)
    if content is None and not published:
        return {"role": role} | escape_texts(fields, escape)
    if content is None or isinstance(content, str):
        content = escape(content or "")
    else:
        parts = [content] if isinstance(content, Mapping) else content
        if not _is_list(parts):
            got = type(content).__name__
            raise ValueError(f"{CALLER}: content must be text or a list of parts, got {got}")
        content = [_read_part(part, escape, published) for part in parts]
    return {"role": role, "content": content} | escape_texts(fields, escape)


def _refuse_tools(role: str, fields: Mapping[str, Any]) -> None:
    """Refuse what a published template would ignore, or fail on with its own error."""
    found = [name for name in TOOLS if fields.get(name)]
    if found or role in ("tool", "function"):
        got = f"{found[0]} in a message of role {role}" if found else f"a message of role {role}"
        raise ValueError(
            f"{CALLER}: the published chat templates know no tools, got {got}: pass a chat_template"
            " that does, or omit it"
        )
    if role not in ROLES:
        raise ValueError(f"{CALLER}: role must be one of {ROLES}, got {role!r}")


def _read_part(part: Any, escape: Callable[[str], str], published: bool) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": escape(part)}
    fields = _fields(part, "a part of the content", ("type",))
    kind = fields.get("type")
    if kind == "text":
        if not isinstance(fields.get("text"), str):
            got = type(fields.get("text")).__name__
            raise ValueError(f"{CALLER}: a part of type text must have a text, got {got}")
        # Images are parts of their own here: an `<image>` that was typed is text.
        mark, inert = prompts.IMAGE_MARK, prompts.IMAGE_MARK.replace("<", "<" + prompts.MARKER)
        return fields | {"text": escape(fields["text"]).replace(mark, inert)}
    if kind in ("image", "image_url"):
        return _read_image(fields)
    if published or not isinstance(kind, str):
        wanted = "parts of type text, image or image_url"
        raise ValueError(f"{CALLER}: wanted {wanted}, got {kind!r}")
    return escape_texts(fields, escape) | {"type": kind}


def _read_image(fields: dict[str, Any]) -> dict[str, Any]:
    """At most one source; none if the images are passed separately from the messages."""
    sources = {name: fields[name] for name in SOURCES if name in fields}
    if "image_url" in fields:
        url = fields["image_url"]
        # `detail`, the other field, asks for a resolution; here only max_num sets it.
        fields_of_url = (
            {"url": url} if isinstance(url, str) else _fields(url, "image_url", ("url",))
        )
        if "url" not in fields_of_url:
            raise ValueError(f"{CALLER}: image_url must hold a url")
        sources["url"] = fields_of_url["url"]
    if len(sources) > 1:
        raise ValueError(f"{CALLER}: an image must have one source, got {sorted(sources)}")
    if "base64" in sources:
        sources = {"image": encoded.decode_base64(sources["base64"], CALLER)}
    return {"type": "image"} | sources


def _fields(thing: Any, name: str, wanted: Sequence[str]) -> dict[str, Any]:
    """The fields of a mapping or an object that are not None."""
    if isinstance(thing, Mapping):
        found = dict(thing)
    elif dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        found = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
    elif callable(dump := getattr(thing, "model_dump", None)):
        found = dict(dump())
    elif all(hasattr(thing, field) for field in wanted):
        found = dict(vars(thing)) if hasattr(thing, "__dict__") else {}
        found |= {field: getattr(thing, field) for field in wanted}
    else:
        got = type(thing).__name__
        raise ValueError(
            f"{CALLER}: {name} must be a mapping or an object with {wanted}, got {got}"
        )
    return {str(key): value for key, value in found.items() if value is not None}


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _holds_messages(value: Any) -> bool:
    return not isinstance(value, Mapping) and _is_list(getattr(value, "messages", None))
