"""What a JSON line says: turns of a conversation, and which images or video belong to it."""

import json
from dataclasses import dataclass
from typing import Any

from comemo.prompts import IMAGE_MARK, with_image_mark
from comemo.train.data.faults import BadSample

VIDEO_MARK = "<video>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_ITEM_KEYS = {"text": {"type", "text"}, "image": {"type"}}


@dataclass
class Talk:
    """One conversation.

    Attributes:
        turns: questions and answers, without white space around them; `<image>` marks in questions.
        system: the system message; None for that of the template.
        images: paths as written.
        video: path, or paths of frames, as written; None without a video.
        clip: seconds from and to of the video, or None.
    """

    turns: list[tuple[str, str]]
    system: str | None = None
    images: list[str] | None = None
    video: str | list[str] | None = None
    clip: tuple[float, float] | None = None


def read_talk(line: bytes) -> Talk:
    """Read and check a line.

    Args:
        line: a JSON object with `conversations` and, at will, `image` or `video`.

    Raises:
        BadSample: what is wrong with it. Whether the marks fit the images is not checked here.
    """
    try:
        item = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadSample("broken JSON", str(error)) from None
    if not isinstance(item, dict):
        raise BadSample("not an object", f"wanted a JSON object, got {_short(item)}")
    images, video = _paths(item, "image"), _paths(item, "video")
    if images and video:
        raise BadSample("wrong value", "wanted image or video, got both")
    turns, system = _read_turns(item.get("conversations"))
    if len(images) == 1 and not any(IMAGE_MARK in question for question, _ in turns):
        turns[0] = (with_image_mark(turns[0][0]).strip(), turns[0][1])
    if not video:
        return Talk(turns, system, images)
    clip = item.get("clip")
    if clip is not None:
        clip = _read_clip(clip)
    return Talk(turns, system, [], item["video"], clip)


def with_frames(turns: list[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """Write marks for the frames of a video in place of its mark.

    Args:
        turns: of a conversation. Without a `<video>` in the first question one is put before it.
        count: number of frames.

    Returns:
        The turns, with "Frame1:<image>" on a line for each frame in place of "<video>" and the
        end of its line. The last is not followed by a new line, as in the published code.
    """
    (question, answer), *rest = turns
    frames = "\n".join(f"Frame{number}:{IMAGE_MARK}" for number in range(1, count + 1))
    if VIDEO_MARK not in question:
        question = f"{VIDEO_MARK}\n{question}"
    mark = f"{VIDEO_MARK}\n" if f"{VIDEO_MARK}\n" in question else VIDEO_MARK
    return [(question.replace(mark, frames, 1).strip(), answer), *rest]


def _paths(item: dict[str, Any], key: str) -> list[str]:
    value = item.get(key)
    if value is None or value == "" or value == []:
        return []
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path and "\0" not in path for path in paths):
        wanted = f"{key} must be a path or a list of paths"
        raise BadSample("wrong value", f"{wanted}, got {_short(value)}")
    return paths


def _read_clip(clip: Any) -> tuple[float, float]:
    def is_time(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0

    if not (isinstance(clip, list) and len(clip) == 2 and all(map(is_time, clip))):
        raise BadSample("wrong value", f"clip must be [seconds, seconds], got {_short(clip)}")
    if not clip[0] < clip[1]:
        raise BadSample("wrong value", f"clip must begin before it ends, got {clip}")
    return clip[0], clip[1]


def _read_turns(messages: Any) -> tuple[list[tuple[str, str]], str | None]:
    if not isinstance(messages, list) or not messages:
        raise BadSample("no conversations", f"wanted a list of turns, got {_short(messages)}")
    said = [_read_message(message) for message in messages]
    system = None
    if said[0][0] == "system":
        system = said.pop(0)[1]
    if not said:
        raise BadSample("no conversations", "wanted a question and an answer, got none")
    if said[0][0] == "assistant":
        raise BadSample("starts with the assistant", "wanted a question first, got an answer")
    wanted = ("user", "assistant")
    for index, (role, _) in enumerate(said):
        if role != wanted[index % 2]:
            where = f"turn {index + 1}"
            raise BadSample(
                "roles do not alternate", f"wanted {wanted[index % 2]} in {where}, got {role}"
            )
    if len(said) % 2:
        raise BadSample(
            "ends without an answer", f"wanted an even number of turns, got {len(said)}"
        )
    texts = [text for _, text in said]
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    for number, (_, answer) in enumerate(turns, 1):
        if not answer:
            raise BadSample("empty answer", f"wanted text in answer {number}, got none")
    return turns, system


def _read_message(message: Any) -> tuple[str, str]:
    """Role and text, without white space around it."""
    if not isinstance(message, dict):
        raise BadSample("wrong value", f"a turn must be a JSON object, got {_short(message)}")
    named = ("from", "value") if "from" in message else ("role", "content")
    for key in named:
        if key not in message:
            raise BadSample("wrong value", f"a turn must have {' and '.join(named)}, got no {key}")
    role, content = (message[key] for key in named)
    if not isinstance(role, str) or role not in {*_ROLES, "system"}:
        got = _short(role)
        raise BadSample(
            "wrong value", f"{named[0]} must be one of {[*_ROLES, 'system']}, got {got}"
        )
    if isinstance(content, list):
        content = "".join(map(_read_item, content))
    if not isinstance(content, str):
        raise BadSample("wrong value", f"{named[1]} must be text, got {_short(content)}")
    return _ROLES.get(role, role), content.strip()


def _read_item(item: Any) -> str:
    """The text of one item of content: an image is an `<image>` line."""
    kind = item.get("type") if isinstance(item, dict) else None
    known = _ITEM_KEYS.get(kind) if isinstance(kind, str) else None
    if known is None or set(item) != known:
        wanted = "{type: text, text} or {type: image}, whose path is in the line's `image`"
        raise BadSample("unknown content", f"an item must be {wanted}, got {_short(item)}")
    if kind == "image":
        return f"{IMAGE_MARK}\n"
    if not isinstance(item["text"], str):
        raise BadSample("unknown content", f"text must be a string, got {_short(item['text'])}")
    return item["text"]


def _short(value: Any) -> str:
    return f"{value!r:.60}"
