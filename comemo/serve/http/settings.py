"""Settings of the HTTP side: who may ask, how much at once, and what is written down."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from comemo.safety.regular import check_regular

KEY = "COMEMO_API_KEY"  # the variable that may hold a key
PUBLIC = "public"  # the namespace where no keys are configured


@dataclass(frozen=True)
class ServerSettings:
    """Limits of requests, keys and defaults.

    Attributes:
        name: of the model, as clients give it.
        keys: sha256 of an API key -> namespace; empty: nobody needs a key.
        body_bytes: most bytes of a request.
        pixels: most pixels of a picture.
        images: most pictures of a request.
        concurrent: most requests at the same time, reading and waiting ones included.
        timeout_s: seconds that a request may take.
        body_timeout_s: seconds until its body has arrived.
        max_tokens: of an answer, if the request does not say.
        temperature: if the request does not say; 0 is greedy.
        max_tiles: of a picture; None for those of the checkpoint.
        fetch_hosts: hosts whose pictures are fetched; empty: none.
        readers: threads that open pictures and encode prompts.
        log_contents: whether questions and answers are logged.

    Raises:
        ValueError: a limit that is not positive.
    """

    name: str
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    body_bytes: int = 64 * 2**20
    pixels: int = 50_000_000
    images: int = 16
    concurrent: int = 128
    timeout_s: float = 600.0
    body_timeout_s: float = 60.0
    max_tokens: int = 512
    temperature: float = 0.0
    max_tiles: int | None = None
    fetch_hosts: tuple[str, ...] = ()
    readers: int = 2
    log_contents: bool = False

    def __post_init__(self) -> None:
        numbers = ("body_bytes", "pixels", "images", "concurrent", "timeout_s", "body_timeout_s")
        for name in (*numbers, "max_tokens", "readers", "max_tiles"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"ServerSettings: {name} must be above 0, got {value!r}")
        if not self.name:
            raise ValueError("ServerSettings: name must not be empty")

    def namespace_of(self, key: str | None) -> str | None:
        """The namespace of an API key; None for a wrong or missing one."""
        if not self.keys:
            return PUBLIC
        return self.keys.get(digest_of_key(key)) if key else None

    def namespace_of_header(self, authorization: str) -> str | None:
        """The namespace of a header `Authorization: Bearer KEY`; None as in `namespace_of`."""
        scheme, _, key = authorization.partition(" ")
        return self.namespace_of(key.strip() if scheme.lower() == "bearer" else None)


def digest_of_key(key: str) -> str:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).hexdigest()


def find_keys(path: str | os.PathLike[str] | None) -> dict[str, str]:
    """The keys of a file, else the one in the variable `COMEMO_API_KEY`, else none.

    Args:
        path: see `read_keys`; None for no file.
    """
    if path is not None:
        return read_keys(path)
    key = os.environ.get(KEY)
    return {digest: _own_namespace(digest)} if key and (digest := digest_of_key(key)) else {}


def _own_namespace(digest: str) -> str:
    return f"key-{digest[:16]}"


def read_keys(path: str | os.PathLike[str]) -> dict[str, str]:
    """Read a file of API keys: a key in each line, and after a space its namespace, if any.

    Keys of one namespace share what they have shown. A key without one has its own.

    Args:
        path: of the file. Empty lines and lines that begin with # are skipped.

    Returns:
        See `ServerSettings.keys`.

    Raises:
        ValueError: no key, a line of more than two words, a key twice, a namespace that is not made
            of letters, digits, "-" and "_", or not a file.
        OSError: a file that cannot be read.
    """
    check_regular("read_keys", path)
    keys: dict[str, str] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        digest = digest_of_key(words[0])
        namespace = words[1] if len(words) > 1 else _own_namespace(digest)
        if len(words) > 2 or not namespace.replace("-", "").replace("_", "").isalnum():
            raise ValueError(
                f"read_keys: line {number} must be KEY [NAMESPACE], the namespace of letters,"
                f" digits, - and _, got {len(words)} words"
            )
        if digest in keys:
            raise ValueError(f"read_keys: line {number} has a key that an earlier line has")
        keys[digest] = namespace
    if not keys:
        raise ValueError(f"read_keys: {os.fspath(path)!r} has no key")
    return keys
