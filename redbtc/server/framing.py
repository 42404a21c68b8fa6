"""The checks on a request's head, and the framing of its body (HTTP/1.1). There is no I/O here.

A head that a proxy in front of the gateway or behind it could read differently is refused, and so
is a body whose framing is ambiguous (request smuggling). The bytes of a request that are not its
body (head, chunk sizes and extensions, trailers) are limited.
"""

from __future__ import annotations

import re

from websockets.datastructures import Headers as Fields
from websockets.exceptions import InvalidHandshake
from websockets.http11 import Request
from websockets.server import ServerProtocol

from redbtc.headers import BAD_IN_VALUE, Headers, header
from redbtc.refusals import Refusal
from redbtc.server.asgi import Scope

NO_BODY = (204, 304)  # statuses of a response without a body (RFC 9110 §6.4.1)

MAX_HEAD_BYTES = 64 << 10  # OpenAI's API requires less than 64 KiB of headers
MAX_HEADERS = 200
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.6.2
ONCE = (  # of duplicates, one reader may use the first and another the last
    b"host",
    b"content-length",
    b"transfer-encoding",
    b"content-type",
    b"content-encoding",
    b"authorization",
)
HOST = re.compile(rb"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{0,5})?")
# Within the websockets package's own maximums (128 headers, lines of 8192 bytes): it closes on a
# larger handshake without a response.
MAX_HANDSHAKE_HEADERS, MAX_HANDSHAKE_LINE = 128, 8000
HANDSHAKE_LISTS = (b"connection", b"upgrade", b"sec-websocket-protocol")
MAX_HANDSHAKE_LISTS = 1000  # bytes of these headers; the package takes 20 ms to parse 60 KB


def check_head(scope: Scope) -> None:
    """Raise Refusal for a head that is too large or invalid, or that a proxy in front of the
    gateway or behind it could read differently (RFC 9112 §3.2, §6.1, §6.3; RFC 9110 §5.5)."""
    version = scope["http_version"]
    if version not in ("1.1", "1.0"):
        raise Refusal("invalid_http", "The HTTP version must be 1.1 or 1.0.")
    headers: Headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise Refusal("headers_too_large", f"The request has more than {MAX_HEADERS} headers.")
    names, values = [name for name, _ in headers], b"".join([value for _, value in headers])
    size = len(b"".join(names)) + len(values) + len(scope["raw_path"]) + len(scope["query_string"])
    if size > MAX_HEAD_BYTES:
        message = f"The URL and headers together have more than {MAX_HEAD_BYTES} bytes."
        raise Refusal("headers_too_large", message)
    if (headers and not TOKEN.fullmatch(b"".join(names))) or BAD_IN_VALUE.search(values):
        raise Refusal("invalid_http", "A header contains a character that is not allowed.")
    for name in ONCE:
        if names.count(name) > 1:
            raise Refusal("invalid_http", f"Duplicate header: {name.decode()}.")
    host = header(headers, b"host")
    if not (version == "1.0" if host is None else HOST.fullmatch(host)):
        raise Refusal("invalid_http", "The Host header is missing or invalid.")
    if scope["type"] == "http" and scope["method"] == "CONNECT":
        raise Refusal("invalid_http", "The method CONNECT is not supported.")
    length, encoding = header(headers, b"content-length"), header(headers, b"transfer-encoding")
    _check_framing(version, length, encoding)


def _check_framing(version: str, length: bytes | None, encoding: bytes | None) -> None:
    if length is not None and not (length.isdigit() and len(length) < 19):
        raise Refusal("invalid_http", "Content-Length must be a number.")
    if encoding is None:
        return
    if length is not None or version != "1.1" or encoding.lower() != b"chunked":
        message = (
            "Transfer-Encoding must be 'chunked', on HTTP/1.1, and without a Content-Length header."
        )
        raise Refusal("invalid_http", message)


def is_handshake(scope: Scope) -> bool:
    """Return whether a request is a valid WebSocket handshake (RFC 6455 §4.2.1) to the websockets
    package, which will answer it. Any other request is served as HTTP, and its route says what is
    wrong."""
    headers: Headers = scope["headers"]
    if (header(headers, b"upgrade") or b"").lower() != b"websocket":
        return False
    lists = [value for name, value in headers if name in HANDSHAKE_LISTS]
    if len(b"".join(lists)) > MAX_HANDSHAKE_LISTS:
        return False
    fields = Fields([(name.decode(), value.decode("latin-1")) for name, value in headers])
    request = Request("/", fields, method=scope["method"], protocol=f"HTTP/{scope['http_version']}")
    try:
        ServerProtocol().process_request(request)
    except InvalidHandshake:
        return False
    return True


def check_handshake(scope: Scope) -> None:
    """Raise Refusal for a handshake with a body, or one that is larger than the websockets package
    accepts."""
    headers: Headers = scope["headers"]
    if len(scope["raw_path"]) + len(scope["query_string"]) > MAX_HANDSHAKE_LINE:
        message = f"The URL of the handshake has more than {MAX_HANDSHAKE_LINE} bytes."
        raise Refusal("headers_too_large", message)
    for name, value in headers:
        if name in (b"content-length", b"transfer-encoding"):
            raise Refusal("invalid_http", "A WebSocket handshake must not have a body.")
        if len(name) + len(value) > MAX_HANDSHAKE_LINE:
            message = f"A header of the handshake has more than {MAX_HANDSHAKE_LINE} bytes."
            raise Refusal("headers_too_large", message)
    if len(headers) > MAX_HANDSHAKE_HEADERS:
        message = f"The handshake has more than {MAX_HANDSHAKE_HEADERS} headers."
        raise Refusal("headers_too_large", message)


MAX_CHUNK_LINE = 1024  # bytes of a chunk's size and extensions
MAX_TRAILER_BYTES = 8 << 10
MAX_FRAMING = 64 << 10  # bytes of framing, beyond FRAMING_PER_BYTE for each byte of the body
FRAMING_PER_BYTE = 8  # more than chunks of one byte need
MAX_CHUNKS_PER_TURN = 200  # that a connection parses in one turn of the loop; about 0.2 ms
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?[ \t]*")
TRAILER = re.compile(TOKEN.pattern + rb":[^\x00-\x08\x0a-\x1f\x7f]*")


class BadFraming(Exception):
    """The framing of a body is invalid, or takes too many bytes."""


class Length:
    """A body of a known length (RFC 9112 §6.2)."""

    def __init__(self, length: int) -> None:
        self._remaining = length
        self.whole = length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Split `data` into bytes of the body and bytes that come after it."""
        body = data if len(data) <= self._remaining else data[: self._remaining]
        self._remaining -= len(body)
        self.whole = self._remaining == 0
        return body, data[len(body) :]

    def rebuilt(self, body: bytes) -> bytes:
        """Return the bytes from which another reader reads `body`, all that was fed, and then goes
        on where this one is."""
        return body


class Chunked:
    """A body in chunks (RFC 9112 §7.1), parsed strictly. Extensions and trailers are dropped."""

    def __init__(self) -> None:
        self.whole = False
        self._remaining = 0  # bytes of the current chunk that have not arrived
        self._after_chunk = False  # the next size comes after the CRLF that ends a chunk's data
        self._in_trailers = False
        self._partial = b""  # a line that is not yet whole
        self._budget = MAX_FRAMING  # bytes of framing that may still come
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the bytes of the body in `data`, and the bytes that were not parsed: those after
        the body if it is now whole, else those to feed again in the next turn of the loop. Raises
        BadFraming."""
        data, self._partial = self._partial + data, b""
        parts: list[bytes] = []
        at = 0
        for _ in range(MAX_CHUNKS_PER_TURN):
            if self._remaining:
                part = data[at : at + self._remaining]
                parts.append(part)
                at += len(part)
                self._remaining -= len(part)
                self._budget = min(MAX_FRAMING, self._budget + FRAMING_PER_BYTE * len(part))
            if self._remaining or self.whole:
                break
            end = self._end_of_line(data, at)
            if end < 0:
                self._partial, at = data[at:], len(data)
                break
            line = data[at:end]
            self._parse_line(line.removeprefix(b"\r\n") if self._after_chunk else line)
            self._budget -= end + 2 - at
            at = end + 2
            if self._budget < 0:
                raise BadFraming
        return b"".join(parts), data[at:]

    def rebuilt(self, body: bytes) -> bytes:
        """Return the bytes from which another reader reads `body`, all that was fed, and then goes
        on where this one is."""
        begun = b"%x\r\n%b" % (len(body) + self._remaining, body) if body else b""
        if self._remaining:
            return begun or b"%x\r\n" % self._remaining
        if self.whole or self._in_trailers:
            end = b"0\r\n\r\n" if self.whole else b"0\r\n" + self._partial
            return (begun + b"\r\n" if body else b"") + end
        return begun + self._partial

    def _end_of_line(self, data: bytes, at: int) -> int:
        """Return where the line that begins at `at` ends, or -1 if its end has not arrived. Raises
        BadFraming."""
        start = at
        if self._after_chunk:
            if not b"\r\n".startswith(data[at : at + 2]):
                raise BadFraming
            start = at + 2
        end = data.find(b"\r\n", start, start + MAX_CHUNK_LINE)
        if end < 0 and len(data) - start >= MAX_CHUNK_LINE:
            raise BadFraming
        return end

    def _parse_line(self, line: bytes) -> None:
        """Parse a chunk's size or a trailer. Raises BadFraming."""
        if self._in_trailers:
            self._trailer_bytes += len(line) + 2
            self.whole = not line
            if line and (self._trailer_bytes > MAX_TRAILER_BYTES or not TRAILER.fullmatch(line)):
                raise BadFraming
            return
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadFraming
        self._remaining = int(match[1], 16)
        self._in_trailers = self._remaining == 0
        self._after_chunk = not self._in_trailers


class Endless:
    """The framing after a head or a body that can't be read: all that arrives is thrown away."""

    whole = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Drop all of `data`."""
        return b"", b""

    def rebuilt(self, body: bytes) -> bytes:
        """Return `body`: what comes after it can't be read."""
        return body


Framing = Length | Chunked | Endless


def framing_of(headers: Headers) -> Framing:
    """Return the framing of a body, given the headers of a head that has passed `check_head`."""
    for name, value in headers:
        if name == b"content-length":
            return Length(int(value))
        if name == b"transfer-encoding":
            return Chunked()
    return Length(0)
