"""Images that are given as text: base64, alone or in a `data:` URL.

The length of a text is checked before it is decoded, and no error repeats the text.
"""

import base64
import binascii
import re
from urllib.parse import unquote

# A photograph of 50 megapixels as JPEG is about 20 MB.
MAX_BYTES = 64 * 2**20

# The first characters of a PNG, JPEG, GIF, WebP or TIFF file in base64.
_BEGINNINGS = ("iVBORw0KGgo", "/9j/", "R0lGODdh", "R0lGODlh", "UklGR", "SUkqA", "TU0AK")
_SHORTEST = 48  # the smallest GIF has 35 bytes
_NO_BASE64 = re.compile(r"[^A-Za-z0-9+/_\-\s]")
_DATA_URL = re.compile(r"data:(?P<kind>[^,]{0,200}),", re.IGNORECASE)


def is_data_url(text: str) -> bool:
    """Whether a text is a `data:` URL.

    Args:
        text: of any length.
    """
    return text[:5].lower() == "data:"


def is_base64_image(text: str) -> bool:
    """Whether a text can only be the base64 of an image file.

    Args:
        text: of any length.

    Returns:
        True if it begins like a file of a common format and contains only base64. The path of an
        image does not look like this: it would need a name of 48 letters and digits without a dot.
    """
    return (
        len(text) >= _SHORTEST
        and text.startswith(_BEGINNINGS)
        and _NO_BASE64.search(text.rstrip("= \t\r\n")) is None
    )


def decode_base64(text: str | bytes, function: str = "decode_base64") -> bytes:
    """Decode base64 into the bytes of a file.

    Args:
        text: base64 in the standard or the URL-safe alphabet; white space and missing padding are
            accepted. A `data:` URL is accepted too.
        function: the name that an error begins with.

    Returns:
        The bytes, at most `MAX_BYTES`.

    Raises:
        ValueError: a wrong type, too long, empty, or not base64. The text is not repeated.
    """
    if not isinstance(text, (str, bytes)):
        raise ValueError(f"{function}: base64 must be a string, got {type(text).__name__}")
    _check_length(function, len(text))
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    if is_data_url(text):
        return decode_data_url(text, function)
    letters = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        data = base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{function}: wanted base64, got {len(text)} other characters") from error
    if not data:
        raise ValueError(f"{function}: wanted the base64 of an image, got an empty text")
    return data


def decode_data_url(url: str, function: str = "decode_data_url") -> bytes:
    """Read the file in a `data:` URL.

    Args:
        url: `data:image/png;base64,...`; the type is ignored, the bytes decide.
        function: the name that an error begins with.

    Returns:
        The bytes, at most `MAX_BYTES`.

    Raises:
        ValueError: not a `data:` URL of base64, or as `decode_base64`. The data is not repeated.
    """
    _check_length(function, len(url))
    head = _DATA_URL.match(url)
    if head is None or not head["kind"].lower().rstrip().endswith(";base64"):
        raise ValueError(
            f"{function}: wanted data:image/...;base64,..., got a data URL of {len(url)} characters"
            " without ;base64"
        )
    text = unquote(url[head.end() :])
    if is_data_url(text):
        raise ValueError(f"{function}: wanted base64 in a data URL, got another data URL")
    return decode_base64(text, function)


def _check_length(function: str, length: int) -> None:
    longest = 4 * MAX_BYTES // 3 + 1024
    if length > longest:
        raise ValueError(
            f"{function}: wanted at most {longest} characters of base64 ({MAX_BYTES} bytes), got"
            f" {length}"
        )
