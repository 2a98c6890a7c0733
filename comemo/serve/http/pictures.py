"""Messages of clients: their texts, and their pictures opened.

A picture that an engine holds is not decoded again, however often its bytes are sent.
"""

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from comemo.config import CoMemoConfig
from comemo.images import (
    choose_grid,
    normalise_pixels,
    open_image,
    read_size,
    split_tiles,
    stack_tiles,
)
from comemo.processing import base64_images as encoded
from comemo.processing.image_files import ImageTooLargeError
from comemo.processing.messages import read_conversations
from comemo.serve.engine.reader import OpenedPicture
from comemo.serve.http.errors import HttpError, bad, over_limit
from comemo.serve.http.fetch import fetch_picture
from comemo.serve.http.settings import ServerSettings

_GRIDS = 4096  # pictures whose grid is remembered: a few bytes each
_AHEAD = 8  # pictures that are decoded before the engine asks for them
_FETCH_S = 20.0
LOW = 1  # tiles of a picture of `detail` "low"


class PictureReader:
    """Opens the pictures of messages, in any number of threads.

    Args:
        config: of the model.
        settings: of the server.
        holds: whether the engine holds a picture, by namespace and key.
    """

    def __init__(
        self,
        config: CoMemoConfig,
        settings: ServerSettings,
        holds: Callable[[str, str], bool],
    ) -> None:
        self._config, self._settings, self._holds = config, settings, holds
        self._grids: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._ahead = 0

    def read(
        self, messages: list[dict[str, Any]], namespace: str
    ) -> tuple[list[dict[str, Any]], list[OpenedPicture]]:
        """Messages for a `PromptReader`, and their pictures in reading order.

        Args:
            messages: as clients send them.
            namespace: whose pictures may be known.

        Raises:
            HttpError: 400 for messages of unknown form or a bad picture, 413 and 422 for limits.
        """
        plain = [_as_parts(message, index) for index, message in enumerate(messages)]
        try:
            (read,), _ = read_conversations([plain], lambda text: text)
        except ValueError as error:
            raise bad(str(error).partition(": ")[2], "messages") from None
        if read[-1]["role"] != "user" or not read[-1]["content"]:
            raise bad("the last message must be of role user, and not empty", "messages")
        sources: list[tuple[bytes | str, int, str]] = []
        shown = []
        for index, message in enumerate(read):
            parts = []
            for place, part in enumerate(message["content"]):
                if part["type"] == "image":
                    param = f"messages[{index}].content[{place}]"
                    if message["role"] != "user":
                        raise bad(f"a message of {message['role']} must have no picture", param)
                    detail = _detail(plain[index]["content"][place])
                    sources.append((_source(part, param), self._tiles(detail), param))
                    parts.append({"type": "image"})
                else:
                    parts.append({"type": "text", "text": plain[index]["content"][place]["text"]})
            shown.append({"role": message["role"], "content": parts})
        if len(sources) > self._settings.images:
            raise over_limit(422, "images of a request", self._settings.images, len(sources))
        return shown, [self._open(namespace, *source) for source in sources]

    def _tiles(self, detail: str | None) -> int:
        most = self._settings.max_tiles or self._config.max_dynamic_patch
        return LOW if detail == "low" else most

    def checked_bytes(self, url: str, param: str) -> bytes:
        """The bytes of a picture that is not too large.

        Args:
            url: of it.
            param: the field that an error names.

        Raises:
            HttpError: as `read`.
        """
        data = self._bytes(url, param)
        self._check_size(data, param)
        return data

    def _check_size(self, data: bytes, param: str) -> tuple[int, int]:
        """Width and height, from the head of the file."""
        try:
            width, height = read_size(data)
        except ImageTooLargeError:
            most = f"{self._settings.pixels:,}"
            raise over_limit(422, "pixels of a picture", most, "many more") from None
        except (ValueError, OSError) as error:
            raise _unusable(error, param) from None
        if width * height > self._settings.pixels:
            most = f"{self._settings.pixels:,}"
            raise over_limit(422, "pixels of a picture", most, f"{width} x {height}")
        return width, height

    def _open(self, namespace: str, source: bytes | str, most: int, param: str) -> OpenedPicture:
        data = self._bytes(source, param)
        key = hashlib.sha256(f"{most}:".encode() + data).hexdigest()
        with self._lock:
            grid = self._grids.get((namespace, key))
        if grid is None or not self._holds(namespace, key):
            size = self._check_size(data, param)
            try:
                grid, load = self._load(data, most, size)
            except (ValueError, OSError) as error:
                raise _unusable(error, param) from None
            with self._lock:
                self._grids[namespace, key] = grid
                while len(self._grids) > _GRIDS:
                    self._grids.popitem(last=False)
            return OpenedPicture(key, grid, load)
        return OpenedPicture(key, grid, lambda: self._pixels(data, most)[0])

    def _load(
        self, data: bytes, most: int, size: tuple[int, int]
    ) -> tuple[tuple[int, int], Callable[[], Tensor]]:
        """The grid, and what reads the tiles: decoded now if not too many are."""
        with self._lock:
            ahead = self._ahead < _AHEAD
            self._ahead += ahead
        if not ahead:
            side = self._config.vision_config.image_size[0]
            grid = choose_grid(*size, min(self._config.min_dynamic_patch, most), most, side)
            return grid, lambda: self._pixels(data, most)[0]
        try:
            pixels, grid = self._decode(data, most)
        except BaseException:
            self._forget()
            raise

        def load() -> Tensor:
            return normalise_pixels(pixels)

        weakref.finalize(load, self._forget)
        return grid, load

    def _forget(self) -> None:
        with self._lock:
            self._ahead -= 1

    def _pixels(self, data: bytes, most: int) -> tuple[Tensor, tuple[int, int]]:
        pixels, grid = self._decode(data, most)
        return normalise_pixels(pixels), grid

    def _decode(self, data: bytes, most: int) -> tuple[Tensor, tuple[int, int]]:
        """Tiles as uint8 [t, 3, side, side], and their grid."""
        config = self._config
        tiles, grid = split_tiles(
            open_image(data),
            config.vision_config.image_size[0],
            min(config.min_dynamic_patch, most),
            most,
            config.use_thumbnail,
        )
        return torch.from_numpy(stack_tiles(tiles)), grid

    def _bytes(self, source: bytes | str, param: str) -> bytes:
        if isinstance(source, bytes):
            return source
        if encoded.is_data_url(source):
            try:
                return encoded.decode_data_url(source)
            except ValueError as error:
                raise bad(str(error).partition(": ")[2], param) from None
        settings = self._settings
        return fetch_picture(source, settings.fetch_hosts, settings.body_bytes, _FETCH_S, param)


def _unusable(error: Exception, param: str) -> HttpError:
    text = str(error).partition(": ")[2] or "it cannot be read"
    return bad(f"a picture cannot be used: {text:.200}", param)


def _as_parts(message: dict[str, Any], index: int) -> dict[str, Any]:
    """A message whose content is a list of parts: an `<image>` that was typed is text."""
    role, content = message.get("role"), message.get("content")
    role = "system" if role == "developer" else role
    parts: Any = [] if content is None or content == "" else content
    if isinstance(parts, str):
        parts = [{"type": "text", "text": parts}]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise bad("content must be a text or a list of parts", f"messages[{index}].content")
    known = ("text", "image_url")
    for place, part in enumerate(parts):
        if part.get("type") not in known:
            got = f"{part.get('type')!r:.40}"
            where = f"messages[{index}].content[{place}]"
            raise bad(f"a part must be of type text or image_url, got {got}", where)
    kept = {name: message[name] for name in ("tool_calls", "function_call") if name in message}
    return kept | {"role": role, "content": parts}


def _detail(part: dict[str, Any]) -> str | None:
    url = part.get("image_url")
    return url.get("detail") if isinstance(url, dict) else None


def _source(part: dict[str, Any], param: str) -> bytes | str:
    """A URL, or bytes. Paths of this machine are never opened."""
    url = part.get("url")
    if not isinstance(url, str) or len(part) != 2:
        raise bad("image_url must hold a url", param)
    return url
