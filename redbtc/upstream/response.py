"""A response of an upstream: one `ResponseReader` parses it. There is no I/O here.

A reader serves one exchange, a request and its response, and has the states of the connection
during that exchange. `ResponseReader.enter` alone changes them:

    idle ─► sending ─► awaiting_head ─► reading_body ─► complete
               └───────────────────────────▲  (a response that did not wait for the whole request)

Each state but "complete" can be followed by "failed", and by "closed". After a complete exchange
the connection is used again, with a new reader, or it is closed: the response stays complete.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import httptools
import httpx2

from redbtc.headers import Headers
from redbtc.upstream.failures import NoResponse, NotHTTP

MAX_OVERHEAD = 100 << 10  # bytes without any body between: heads, 1xx, chunk extensions, trailers


ExchangeState = Literal[
    "idle",  # no request: the connection waits for one
    "sending",  # the request is being sent, and the head of its response has not arrived
    "awaiting_head",  # the request was sent, and the head of its response has not arrived
    "reading_body",  # the head has arrived; the body may still be arriving
    "complete",  # the whole response has arrived
    "failed",  # the response can't be read to its end: `error` says why
    "closed",  # nothing more is read
]
BEFORE_HEAD: tuple[ExchangeState, ...] = ("sending", "awaiting_head")
ENDED: tuple[ExchangeState, ...] = ("complete", "failed", "closed")


class UpstreamResponse(NamedTuple):
    """A response's head, and its body, which whoever reads it closes."""

    status: int
    headers: Headers
    body: httpx2.AsyncByteStream
    http_version: str = "1.1"
    reason: bytes = b""


class ResponseReader:
    """The state of one exchange, and what has arrived of its response. Bytes of the body are kept
    in memory until they are taken."""

    def __init__(self) -> None:
        self.state: ExchangeState = "idle"
        self.error: httpx2.TransportError | None = None
        self.status = 0  # until the final head has arrived
        self.reason = b""
        self.http_version = ""
        self.headers: Headers = []
        self.parts: list[bytes] = []  # of the body, that have arrived and were not taken
        self.waiting_bytes = 0  # at most, in `parts`
        self.reusable = True  # no reason is known to close the connection after this exchange
        self._has_body = True
        self._until_close = True  # the body ends where the connection does
        self._overhead = 0
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def enter(self, state: ExchangeState) -> None:
        """Change the state. Nothing follows "complete": what comes after the response's end, or a
        connection that closes then, does not make it incomplete. After "failed" there is only
        "closed": the first error counts."""
        closes_failed = state == "closed" and self.state == "failed"
        if self.state not in ENDED or closes_failed:
            self.state = state

    # What the connection calls

    def begin(self, method: str) -> None:
        """Expect the response to a request that is being sent from now on."""
        self._has_body = method != "HEAD"
        self.enter("sending")

    def feed(self, data: bytes) -> None:
        """Parse bytes that have arrived. Fails where they are no response of HTTP/1.1."""
        assert self._parser is not None
        size = len(data)
        self._overhead += size
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # llhttp knows the status as soon as the first line has begun as that of HTTP does.
            kind = httpx2.RemoteProtocolError if self._parser.get_status_code() else NotHTTP
            self.fail(kind(f"the response is not HTTP/1.1: {error}"))
        if self._overhead > MAX_OVERHEAD:
            self.fail(httpx2.RemoteProtocolError("the response's head is too large"))
        if self.parts:
            self.waiting_bytes += size

    def end(self, error: Exception | None) -> None:
        """Note that the connection has ended, because of `error` unless it is None."""
        if error:
            self.fail(httpx2.ReadError(str(error)))
        elif self.state == "reading_body" and self._until_close:
            self.enter("complete")
        elif self.status:
            self.fail(httpx2.RemoteProtocolError("the connection was closed within a response"))
        else:
            self.fail(NoResponse("the connection was closed without a response"))
        self._parser = None

    def fail(self, error: httpx2.TransportError) -> None:
        """Raise `error` to the reader, after what has arrived, unless the response is complete."""
        self.reusable = False
        if self.state not in ENDED:
            self.error = error
            self.enter("failed")

    def take(self) -> list[bytes]:
        """Return the parts of the body that have arrived since the last time."""
        parts, self.parts, self.waiting_bytes = self.parts, [], 0
        return parts

    def close(self) -> None:
        """Stop reading. Break reference cycles, so that memory is freed without waiting
        for the garbage collector: a parser refers back to its reader, a raised error to the code
        that raised it."""
        self.enter("closed")
        self._parser = self.error = None

    @property
    def nothing_came(self) -> bool:
        """Return whether a response is awaited and none of its bytes have arrived."""
        return self.state in BEFORE_HEAD and not self._overhead

    # What httptools calls

    def on_message_begin(self) -> None:
        if self.state == "complete":  # more than one response
            self.reusable = False

    def on_status(self, reason: bytes) -> None:
        if not self.status:
            self.reason += reason  # it comes in pieces

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.status:  # a trailer
            return
        if value[-1:] in (b" ", b"\t"):  # no part of the value (RFC 9110 §5.5)
            value = value.rstrip(b" \t")
        self.headers.append((name, value))
        lower = name.lower()
        if lower == b"content-length":
            self._until_close = False
        elif lower == b"transfer-encoding":
            self._until_close = False
            if value.lower() != b"chunked":
                self.fail(httpx2.RemoteProtocolError("the Transfer-Encoding is not 'chunked'"))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if self.state not in BEFORE_HEAD:
            return
        if status < 200:  # RFC 9110 §15.2: a response that is not the final one
            self.headers, self.reason, self._until_close = [], b"", True
            return
        if self.state == "sending":  # whoever sends stops then
            self.reusable = False
        self.status = status
        self.http_version = self._parser.get_http_version()
        self._overhead = 0
        self.enter("reading_body")
        if not self._has_body:
            self.reusable = False  # to llhttp, a body follows
            self.enter("complete")

    def on_body(self, body: bytes) -> None:
        if self.state == "reading_body":  # else these bytes came after the response
            self._overhead = 0
            self.parts.append(body)

    def on_message_complete(self) -> None:
        if self.state == "reading_body":
            assert self._parser is not None
            self.reusable = self.reusable and self._parser.should_keep_alive()
            self.enter("complete")
