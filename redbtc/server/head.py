"""The reading of a request's head. There is no I/O here.

httptools (llhttp) parses the head of a request and nothing else: a parser is made for each head, is
fed up to the head's empty line and is then dropped. So an `Upgrade` that is not taken can't turn a
body into a request (RFC 9110 §7.8: it is ignored), and what comes after the head, such as trailers,
can't become a header.
"""

from __future__ import annotations

import urllib.parse

import httptools

from redbtc.headers import Headers
from redbtc.refusals import Refusal
from redbtc.server.asgi import Scope
from redbtc.server.framing import MAX_HEAD_BYTES, MAX_HEADERS

Address = tuple[str, int] | None  # host and port; None for a Unix socket


class HeadReader:
    """Reads the head of one request from the bytes of a connection, and makes ASGI's scope of it.
    The head is checked later, by `check_head`."""

    def __init__(self) -> None:
        self.complete = False
        self.keep_alive = False  # the head allows another request on the connection
        self.headers: Headers = []
        self.received = b""  # all bytes of a head that is not complete
        self._method = self._url = b""
        self._version = "1.1"
        self._size = 0
        self._tail = b""  # the last three bytes
        self._parser: httptools.HttpRequestParser | None = None

    def feed(self, data: bytes) -> bytes:
        """Parse a part of the head; return the bytes that come after the head. Raises Refusal for a
        head that can't be parsed or is too large."""
        if self._parser is None:
            head = data.lstrip(b"\r\n")  # empty lines may precede it (RFC 9112 §2.2)
            self._size += len(data) - len(head)
            data = head
            self._parser = httptools.HttpRequestParser(self) if data else None
        at = (self._tail + data).find(b"\r\n\r\n")
        end = len(data) if at < 0 else at + 4 - len(self._tail)
        part = data[:end]
        self._size += len(part)
        self._tail = (self._tail + part)[-3:]
        try:
            if self._parser:
                self._parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            pass  # `is_handshake` decides whether to take it; llhttp sees nothing but the head
        except httptools.HttpParserError:
            raise Refusal("invalid_http") from None
        if self._size > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            # All of them take many times the memory of their bytes. The app still sees an Origin.
            beyond = [line for line in self.headers[MAX_HEADERS:] if line[0] == b"origin"]
            self.headers[MAX_HEADERS:] = beyond[:1]
            raise Refusal("headers_too_large")
        if at >= 0 and not self.complete:  # to llhttp the head goes on: the preface of HTTP/2
            raise Refusal("invalid_http")
        return data[end:]

    def close(self) -> None:
        """Drop the parser, which refers back to here, so that memory is freed without waiting for
        the garbage collector."""
        self._parser = None

    # What httptools calls

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if value[-1:] in (b" ", b"\t"):  # no part of the value (RFC 9110 §5.5)
            value = value.rstrip(b" \t")
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser, self._parser = self._parser, None
        assert parser is not None
        self.complete = True
        self.keep_alive = parser.should_keep_alive()
        self._method = parser.get_method()
        self._version = parser.get_http_version()

    # What becomes of the head

    def scope(self, server: Address, client: Address) -> Scope:
        """Return the scope of a request whose head is complete. Raises Refusal for an invalid
        URL."""
        try:
            url = httptools.parse_url(self._url)
            raw_path = url.path or b"/"  # RFC 9110 §4.2.3: http://host is http://host/
            path = raw_path.decode("ascii")
        except (httptools.HttpParserError, UnicodeDecodeError):
            raise Refusal("invalid_http") from None
        scope = self._new_scope(server, client)
        scope["http_version"] = self._version
        scope["method"] = self._method.decode("ascii")
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = url.query or b""
        return scope

    def refused_scope(self, server: Address, client: Address) -> Scope:
        """Return a scope for the refusal of a request whose head can't be read or is not allowed.
        It has only the request's headers and path."""
        scope = self._new_scope(server, client)
        scope["path"] = self._url.decode("latin-1")
        # An Origin may be in the part that has not arrived: "null" lets a page read the refusal
        # where all origins are allowed.
        if not self.complete:
            scope["headers"] = [*self.headers, (b"origin", b"null")]
        return scope

    def _new_scope(self, server: Address, client: Address) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "server": server,
            "client": client,
            "scheme": "http",
            "root_path": "",
            "path": "",
            "raw_path": b"",
            "query_string": b"",
            "headers": self.headers,
        }
