"""HTTP/1.1 as clients may write it: what of a request's head is let through, and where its body
ends. There is no I/O here.

A head that a proxy before or behind the gateway could read in another way is refused, and so is a
body whose framing is in doubt (request smuggling). Every byte that is no body is bounded.
"""

from __future__ import annotations

import re

from redbtc_refusals import Headers, Refusal, header
from redbtc_watch import Scope

# ── Heads ────────────────────────────────────────────────────────────────────────────────────────

MAX_HEAD_BYTES = 64 << 10  # OpenAI asks for less than 64 KiB of headers
MAX_HEADERS = 200
TOKEN = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 §5.6.2
BAD_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")  # RFC 9110 §5.5
ONCE = (  # two of one could be read in two ways
    b"host",
    b"content-length",
    b"transfer-encoding",
    b"content-type",
    b"content-encoding",
    b"authorization",
)
HOST = re.compile(rb"(?:[A-Za-z0-9._~-]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
WEBSOCKET_KEY = re.compile(rb"[A-Za-z0-9+/]{22}==")  # RFC 6455 §4.2.1
# What the websockets package reads of a handshake; it answers nothing to a larger one.
MAX_HANDSHAKE_HEADERS, MAX_HANDSHAKE_LINE = 128, 8000


def check_head(scope: Scope) -> None:
    """Raise Refusal for a head that no client of good will sends, or that a proxy before or behind
    this one could read in another way (RFC 9112 §3.2, §6.1, §6.3; RFC 9110 §5.5)."""
    version = scope["http_version"]
    if version not in ("1.1", "1.0"):
        raise Refusal("invalid_http", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    headers: Headers = scope["headers"]
    if len(headers) > MAX_HEADERS:
        raise Refusal("headers_too_large", f"More than {MAX_HEADERS} headers.")
    names, values = [name for name, _ in headers], b"".join([value for _, value in headers])
    size = len(b"".join(names)) + len(values) + len(scope["raw_path"]) + len(scope["query_string"])
    if size > MAX_HEAD_BYTES:
        raise Refusal("headers_too_large", f"Headers of more than {MAX_HEAD_BYTES} bytes.")
    if (headers and not TOKEN.fullmatch(b"".join(names))) or BAD_IN_VALUE.search(values):
        raise Refusal("invalid_http", "A header contains characters that it must not.")
    for name in ONCE:
        if names.count(name) > 1:
            raise Refusal("invalid_http", f"There is more than one {name.decode()} header.")
    host = header(headers, b"host")
    if not (version == "1.0" if host is None else HOST.fullmatch(host)):
        raise Refusal("invalid_http", "There must be one Host header of proper form.")
    if scope["type"] == "http" and scope["method"] == "CONNECT":
        raise Refusal("invalid_http", "CONNECT is not served here.")
    length, encoding = header(headers, b"content-length"), header(headers, b"transfer-encoding")
    _check_framing(version, length, encoding)


def _check_framing(version: str, length: bytes | None, encoding: bytes | None) -> None:
    if length is not None and not (length.isdigit() and len(length) < 19):
        raise Refusal("invalid_http", "Content-Length must be a number.")
    if encoding is None:
        return
    if length is not None or version != "1.1" or encoding.lower() != b"chunked":
        raise Refusal("invalid_http", "Transfer-Encoding must be chunked, on HTTP/1.1, alone.")


def tokens(headers: Headers, name: bytes) -> list[bytes]:
    """Return the members of a header that is a list of tokens (RFC 9110 §5.6.1), in lower case."""
    values = b",".join([value for key, value in headers if key == name])
    return [token.strip(b" \t") for token in values.lower().split(b",")]


def is_handshake(scope: Scope) -> bool:
    """Return whether a request opens a WebSocket properly (RFC 6455 §4.2.1). One that does not is
    an HTTP request, whose route says what is wrong."""
    headers: Headers = scope["headers"]
    return bool(
        scope["method"] == "GET"
        and scope["http_version"] == "1.1"
        and (header(headers, b"upgrade") or b"").lower() == b"websocket"
        and b"upgrade" in tokens(headers, b"connection")
        and header(headers, b"sec-websocket-version") == b"13"
        and WEBSOCKET_KEY.fullmatch(header(headers, b"sec-websocket-key") or b"")
    )


def check_handshake(target: bytes, headers: Headers) -> None:
    """Raise Refusal for a handshake with a body, which nobody would read, or one that is larger
    than the websockets package accepts."""
    if len(target) > MAX_HANDSHAKE_LINE:
        raise Refusal("headers_too_large", f"A URL of over {MAX_HANDSHAKE_LINE} bytes.")
    for name, value in headers:
        if name in (b"content-length", b"transfer-encoding"):
            raise Refusal("invalid_http", "A WebSocket handshake must not have a body.")
        if len(name) + len(value) > MAX_HANDSHAKE_LINE:
            raise Refusal("headers_too_large", f"A header of over {MAX_HANDSHAKE_LINE} bytes.")
    if len(headers) > MAX_HANDSHAKE_HEADERS:
        raise Refusal("headers_too_large", f"More than {MAX_HANDSHAKE_HEADERS} headers.")


# ── Bodies ───────────────────────────────────────────────────────────────────────────────────────

MAX_CHUNK_LINE = 1024  # a chunk's size and its extensions
MAX_TRAILER_BYTES = 8 << 10
MAX_OVERHEAD = 64 << 10  # bytes that are no body, beyond those that chunks of one byte need
OVERHEAD_A_BYTE = 8
MAX_CHUNKS_A_TURN = 2000  # about 2 ms
CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?[ \t]*")
TRAILER = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[^\x00-\x08\x0a-\x1f\x7f]*")


class BadFraming(Exception):
    """The body's framing can't be read, or has too many bytes that are no body."""


class Length:
    """A body of a known length (RFC 9112 §6.2)."""

    def __init__(self, length: int) -> None:
        self._left = length
        self.whole = length == 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what of `data` is body, and what is left over."""
        body = data if len(data) <= self._left else data[: self._left]
        self._left -= len(body)
        self.whole = self._left == 0
        return body, data[len(body) :]


class Chunked:
    """A body in chunks (RFC 9112 §7.1), read strictly. Extensions and trailers are dropped."""

    def __init__(self) -> None:
        self.whole = False
        self._left = 0  # of the chunk that is arriving
        self._started = False  # a chunk's data ends with CRLF, before the next size
        self._in_trailers = False
        self._partial = b""  # a line that is not yet whole
        self._budget = MAX_OVERHEAD
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the body in `data`, and what is left over: what follows the body, or what is to be
        fed in the next turn of the loop. Raises BadFraming."""
        data, self._partial = self._partial + data, b""
        parts: list[bytes] = []
        at = 0
        for _ in range(MAX_CHUNKS_A_TURN):
            if self._left:
                part = data[at : at + self._left]
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                self._budget = min(MAX_OVERHEAD, self._budget + OVERHEAD_A_BYTE * len(part))
            if self._left or self.whole:
                break
            end = self._end_of_line(data, at)
            if end < 0:
                self._partial, at = data[at:], len(data)
                break
            self._take(data[at:end].removeprefix(b"\r\n") if self._started else data[at:end])
            self._budget -= end + 2 - at
            at = end + 2
            if self._budget < 0:
                raise BadFraming
        return b"".join(parts), data[at:]

    def _end_of_line(self, data: bytes, at: int) -> int:
        """Where the line ends that begins at `at`; less than 0 where that has not come yet."""
        start = at
        if self._started:
            if not b"\r\n".startswith(data[at : at + 2]):
                raise BadFraming
            start = at + 2
        end = data.find(b"\r\n", start, start + MAX_CHUNK_LINE)
        if end < 0 and len(data) - start >= MAX_CHUNK_LINE:
            raise BadFraming
        return end

    def _take(self, line: bytes) -> None:
        """A chunk's size, or a line of the trailers."""
        if self._in_trailers:
            self._trailer_bytes += len(line) + 2
            self.whole = not line
            if line and (self._trailer_bytes > MAX_TRAILER_BYTES or not TRAILER.fullmatch(line)):
                raise BadFraming
            return
        match = CHUNK_LINE.fullmatch(line)
        if match is None:
            raise BadFraming
        self._left = int(match[1], 16)
        self._in_trailers = self._left == 0
        self._started = not self._in_trailers


class Endless:
    """What comes after a head or a part of a body that can't be read."""

    whole = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Nothing of it is body."""
        return b"", b""


Framing = Length | Chunked | Endless


def framing_of(headers: Headers) -> Framing:
    """Return the framing of a body whose head `check_head` has let through."""
    for name, value in headers:
        if name == b"content-length":
            return Length(int(value))
        if name == b"transfer-encoding":
            return Chunked()
    return Length(0)
