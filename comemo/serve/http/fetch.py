"""Pictures by http: only from hosts that are allowed, and never from an internal address.

The address is looked up once, checked, and used for the connection, so that a name cannot mean
another address a moment later. Redirects are not followed.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from comemo.serve.http.errors import bad, over_limit

_PORTS = {"http": 80, "https": 443}
_CHUNK = 2**16


def fetch_picture(
    url: str, hosts: Collection[str], most: int, timeout_s: float, param: str | None = None
) -> bytes:
    """The bytes of a picture.

    Args:
        url: http or https, of the usual port.
        hosts: names that are allowed, in lower case; "*" for any public one.
        most: bytes.
        timeout_s: seconds in all.
        param: the field that an error names.

    Raises:
        HttpError: 400 for a URL that is not allowed or does not answer with 200; 413 for too many
            bytes. No error tells what an internal address answered.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    if not hosts:
        raise bad("pictures must be data: URLs: this server fetches none", param)
    if parts.scheme not in _PORTS or parts.username is not None or not host:
        raise bad("the URL of a picture must be data:, http: or https:, without a user", param)
    try:
        port = parts.port or _PORTS[parts.scheme]
    except ValueError:
        port = 0
    if port != _PORTS[parts.scheme]:
        raise bad("the URL of a picture must have the usual port", param)
    if host not in hosts and "*" not in hosts:
        raise bad(f"pictures of the host {host!r:.80} are not fetched", param)
    end = time.monotonic() + timeout_s
    address = _public_address(host, port, param)
    try:
        return _get(parts.scheme, host, address, port, _target(parts), most, end, param)
    except (OSError, http.client.HTTPException) as error:
        raise bad(f"the picture could not be fetched: {type(error).__name__}", param) from None


def _target(parts: object) -> str:
    path, query = getattr(parts, "path", "") or "/", getattr(parts, "query", "")
    return f"{path}?{query}" if query else path


def _public_address(host: str, port: int, param: str | None) -> str:
    """An address of a host; every address that it has must be public."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise bad(f"the host {host!r:.80} has no address", param) from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not _is_public(address):
            raise bad(f"the host {host!r:.80} has an internal address", param)
    return addresses[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None)
    if inner is not None and not inner.is_global:
        return False
    return parsed.is_global and not parsed.is_multicast


def _get(
    scheme: str,
    host: str,
    address: str,
    port: int,
    target: str,
    most: int,
    end: float,
    param: str | None,
) -> bytes:
    def left() -> float:
        if (seconds := end - time.monotonic()) <= 0:
            raise TimeoutError
        return seconds

    connection = http.client.HTTPConnection(host, port)
    connection.sock = socket.create_connection((address, port), left())
    try:
        if scheme == "https":
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        connection.request("GET", target, headers={"Accept": "image/*", "Connection": "close"})
        connection.sock.settimeout(left())
        response = connection.getresponse()
        if response.status != 200:
            raise bad(f"the picture could not be fetched: status {response.status}", param)
        body = bytearray()
        while part := response.read1(_CHUNK):
            body += part
            if len(body) > most:
                raise over_limit(413, "bytes of a picture", f"{most:,}", "more")
            left()
        return bytes(body)
    finally:
        connection.close()
