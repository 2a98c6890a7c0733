"""Requests: what a line of the file says, and the lines by number without holding the file."""

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comemo.batch.options import NAMES, check_options, complete_options
from comemo.processing import base64_images as encoded
from comemo.processing import messages as message_forms
from comemo.prompts import IMAGE_MARK
from comemo.safety.regular import check_regular

FIELDS = ("question", "image", "id", "history", "system", "messages")
_BOM = b"\xef\xbb\xbf"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|file:")


@dataclass(frozen=True)
class Request:
    """One question with everything that belongs to its answer.

    Attributes:
        line: its number in the file, from 1.
        messages: the conversation up to the question, in a form of `apply_chat_template`.
        images: of all its image marks in reading order: paths, or the bytes or text of a file.
        options: of `generate`, see `complete_options`.
    """

    line: int
    messages: list[dict[str, Any]]
    images: tuple[str | bytes, ...]
    options: dict[str, Any]


class RequestLines:
    """The lines of a file that are not blank, by number; the file is read once and not held.

    Args:
        path: of the file. A byte order mark is skipped.

    Attributes:
        digest: of the whole file.

    Raises:
        ValueError: a pipe, a device or a directory.
        OSError: a file that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        check_regular("RequestLines", path)
        if path.is_dir():
            raise ValueError(f"RequestLines: requests must be a file, got the directory {path}")
        self.path, self._offsets = path, dict[int, int]()
        whole, offset = hashlib.sha256(), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                whole.update(line)
                if _strip(line, number):
                    self._offsets[number] = offset
                offset += len(line)
        self.digest = whole.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, number: object) -> bool:
        return number in self._offsets

    def __iter__(self) -> Iterator[int]:
        """Their numbers, ascending."""
        return iter(self._offsets)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Callable[[int], bytes]]:
        """A function from the number of a line to its content, without white space around it."""
        with open(self.path, "rb") as file:

            def read(number: int) -> bytes:
                file.seek(self._offsets[number])
                return _strip(file.readline(), number)

            yield read


def digest_of(line: bytes) -> str:
    """A short digest of a line's content; another one means another request."""
    return hashlib.sha256(line).hexdigest()[:16]


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Args:
        line: its content.

    Raises:
        ValueError: it is not one.
    """
    try:
        item = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"the line must be UTF-8: {error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON: {error}") from None
    if not isinstance(item, dict):
        raise ValueError(f"a line must be a JSON object, got {_short(item)}")
    return item


def read_request(
    item: Mapping[str, Any], line: int, root: Path, defaults: Mapping[str, Any], system: str | None
) -> Request:
    """Check a line and complete it.

    Args:
        item: of `parse_line`.
        line: its number.
        root: folder that relative paths of images begin at.
        defaults: options of `generate` for what the line does not give.
        system: the system message of lines without one; None for that of the template.

    Raises:
        ValueError: what is wrong with it. No image was opened.
    """
    if unknown := sorted(item.keys() - {*FIELDS, *NAMES}):
        names = (*FIELDS, *NAMES)
        near = difflib.get_close_matches(unknown[0], names, 1)
        hint = f"did you mean {near[0]}?" if near else f"wanted some of {', '.join(names)}"
        raise ValueError(f"there is no field {unknown[0]!r:.60}: {hint}")
    options = {name: item[name] for name in NAMES if name in item}
    check_options(options)
    given = {name: item[name] for name in FIELDS if item.get(name) is not None}
    paths = _paths(given.get("image", []))
    if "messages" in given:
        if beside := given.keys() & {"question", "history", "system"}:
            raise ValueError(f"wanted question or messages, got messages and {sorted(beside)[0]}")
        messages = given["messages"]
    else:
        messages = _messages_of(given)
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError(f"messages must be a list of objects, got {_short(messages)}")
    system = None if messages and messages[0].get("role") == "system" else system
    messages = ([] if system is None else [{"role": "system", "content": system}]) + messages
    messages, sources = _place_images(messages, paths)
    images = tuple(_locate(source, root) for source in sources)
    return Request(line, messages, images, complete_options(options, defaults))


def pictures_of(item: Mapping[str, Any]) -> str | None:
    """A key that is the same for lines about the same images; None without images."""
    shown = [item["image"]] if item.get("image") else []
    for message in item["messages"] if isinstance(item.get("messages"), list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else [content]
        shown += [part for part in parts if isinstance(part, dict) and part.get("type") != "text"]
    if not shown:
        return None
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def _messages_of(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of question, history and system."""
    question = given.get("question")
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question must be a text that is not empty, got {_short(question)}")
    history = given.get("history", [])
    turns = history if isinstance(history, list) else None
    if turns is None or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise ValueError(f"history must be a list of [question, answer], got {_short(history)}")
    system = given.get("system")
    if not isinstance(system, str | None):
        raise ValueError(f"system must be a text, got {_short(system)}")
    messages = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return [*messages, {"role": "user", "content": question}]


def _place_images(
    messages: list[dict[str, Any]], paths: list[str]
) -> tuple[list[dict[str, Any]], list[str | bytes]]:
    """Messages with a mark or part for each image, and the images in that order.

    `paths` are for marks in texts and for parts without a source. If there are neither, they come
    before the first question, as in `chat`.
    """
    (read,), _ = message_forms.read_conversations([messages], lambda text: text)
    if read[-1]["role"] != "user":
        raise ValueError(f"the last message must be of role user, got {read[-1]['role']}")
    sources: list[str | bytes | None] = []
    for message in read:
        content = message["content"]
        if isinstance(content, str):
            sources += [None] * content.count(IMAGE_MARK)
        else:
            parts = [part for part in content if part["type"] == "image"]
            sources += [_source(part) for part in parts]
    free = sources.count(None)
    if paths and not free:
        first = next(i for i, message in enumerate(read) if message["role"] == "user")
        before = sum(_images_in(message) for message in read[:first])
        messages = [
            *messages[:first],
            _showing(messages[first], len(paths)),
            *messages[first + 1 :],
        ]
        sources[before:before] = [None] * len(paths)
    elif free != len(paths):
        raise ValueError(
            f"wanted one {IMAGE_MARK} mark or image part for each image, or none, got {free} for"
            f" {len(paths)} paths in image"
        )
    rest = iter(paths)
    return messages, [next(rest) if source is None else source for source in sources]


def _images_in(message: Mapping[str, Any]) -> int:
    content = message["content"]
    if isinstance(content, str):
        return content.count(IMAGE_MARK)
    return sum(part["type"] == "image" for part in content)


def _showing(message: dict[str, Any], count: int) -> dict[str, Any]:
    """A message of the user with images before its content."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message | {"content": f"{IMAGE_MARK}\n" * count + (content or "")}
    parts = content if isinstance(content, list) else [content]
    return message | {"content": [{"type": "image"}] * count + parts}


def _source(part: Mapping[str, Any]) -> str | bytes | None:
    """What an image part shows; None if it does not say."""
    found = next((part[name] for name in message_forms.SOURCES if name in part), None)
    if found is not None and not (isinstance(found, (str, bytes)) and found):
        raise ValueError(f"the image of a part must be a path or base64, got {_short(found)}")
    return found


def _paths(value: Any) -> list[str]:
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise ValueError(f"image must be a path or a list of paths, got {_short(value)}")
    return paths


def _locate(source: str | bytes, root: Path) -> str | bytes:
    """A path from the root; the text or bytes of a file, and a URL, as they are."""
    if isinstance(source, bytes) or _URL.match(source):
        return source
    if encoded.is_data_url(source) or encoded.is_base64_image(source):
        return source
    return os.path.join(root, source)


def _strip(line: bytes, number: int) -> bytes:
    return (line.removeprefix(_BOM) if number == 1 else line).strip()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def _short(value: Any) -> str:
    return f"{value!r:.60}"
