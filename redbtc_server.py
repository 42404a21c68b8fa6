"""The client's side of HTTP/1.1: connections, requests on them, and the server that accepts them.

httptools (llhttp) parses the head of a request and nothing else: a parser is made for each head, is
fed up to the head's empty line and is then dropped. Where the body ends is decided by the one
Content-Length or Transfer-Encoding that `check_head` lets through. So an `Upgrade` that is not
taken can't turn a body into a request (RFC 9110 §7.8: it is ignored), and what comes after the
head, such as trailers, can't become a header.

A connection is in one `State`, which `HTTPProtocol._enter` alone changes, and each state in which
the app does not run has a deadline. One timer a second looks at the deadlines of all connections.

    IDLE ─► HEAD ─► SERVING ─┬─────────────► IDLE         the request was read whole
                             ├─► DISCARDING ─► IDLE       the answer came before the body's end
                             └─► CLOSING ─► closed        no further request can follow
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import http
import logging
import math
import resource
import socket
import struct
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.server import ServerState

from redbtc_http import (
    BAD_IN_VALUE,
    MAX_HEAD_BYTES,
    BadFraming,
    Endless,
    Framing,
    check_handshake,
    check_head,
    framing_of,
    is_handshake,
)
from redbtc_refusals import Headers, Refusal, header
from redbtc_settings import LedgerError
from redbtc_watch import App, Message, Scope, say

# ── Requests ─────────────────────────────────────────────────────────────────────────────────────

HIGH_WATER = 64 << 10  # bytes of a body that nobody reads yet
NO_BODY = (204, 304)  # RFC 9110 §6.4.1


def _status_line(status: int) -> bytes:
    with contextlib.suppress(ValueError):
        return b"HTTP/1.1 %d %s\r\n" % (status, http.HTTPStatus(status).phrase.encode())
    return b"HTTP/1.1 %d \r\n" % status


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


class RequestCycle:
    """One request on a connection, as ASGI's app sees it: `receive` and `send`."""

    def __init__(
        self, connection: HTTPProtocol, scope: Scope, framing: Framing, keep_alive: bool
    ) -> None:
        self.scope = scope
        self.framing = framing
        self.keep_alive = keep_alive
        self.started = False  # the answer's head was given
        self.complete = False
        self._connection = connection
        self._failure: Refusal | None = None
        # RFC 9110 §10.1.1: the client sends its body when it is told to
        expected = header(scope["headers"], b"expect") or b""
        self._waits = expected.lower() == b"100-continue" and not self._is_old
        self._body: bytes | bytearray = b""
        self._ended = False  # the app was given the body's end
        self._event = asyncio.Event()
        self._left: int | None = None  # bytes of the answer that its Content-Length leaves
        self._chunked = False

    @property
    def _is_old(self) -> bool:
        """Whether the client speaks HTTP/1.0."""
        return bool(self.scope["http_version"] == "1.0")

    # The client's side

    def feed(self, data: bytes) -> bytes:
        """Take in a part of the body; return what comes after the body. Raises BadFraming."""
        body, rest = self.framing.feed(data)
        if body and not self.complete:
            if self._body:
                self._body = bytearray(self._body) if type(self._body) is bytes else self._body
                self._body += body
            else:
                self._body = body
            if len(self._body) > HIGH_WATER:
                self._connection.pause_reading()
        if body or self.framing.whole:
            self.wake()
        return rest

    def wake(self) -> None:
        """Something has happened that `receive` may wait for."""
        self._event.set()

    def fail(self, refusal: Refusal) -> None:
        """The body can't be read on: who reads it is told so."""
        self._failure, self.framing, self.keep_alive = refusal, Endless(), False
        self.wake()

    def pass_on(self, data: bytes) -> bool:
        """Send a part of the answer where no task has to wait for it; return False where one has
        to: the client reads slowly or is gone, or the answer is not under way in a form that needs
        no more than this."""
        connection = self._connection
        if not self.started or self._left is not None or connection.writing_paused:
            return False
        if connection.closed or self.complete:
            return False
        connection.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return True

    # The app's side

    async def run(self, app: App) -> None:
        """Run the app; an answer that it does not end is torn."""
        try:
            await app(self.scope, self.receive, self.send)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                logging.getLogger("uvicorn.error").error("exception in the app", exc_info=error)
        finally:
            if not self.complete:
                self._connection.tear(self)

    async def receive(self) -> Message:
        """Return the next part of the body; after its end, wait until the client leaves or the
        answer is complete. Raises Refusal where the body's framing is broken."""
        connection = self._connection
        if self._waits and not (self.started or connection.closed):
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._waits = False
        while not (connection.closed or self.complete):
            if self._failure:
                raise self._failure
            if self._body or (self.framing.whole and not self._ended):
                body, self._body = self._body, b""
                self._ended = self.framing.whole
                connection.resume_reading()
                return {"type": "http.request", "body": bytes(body), "more_body": not self._ended}
            connection.resume_reading()
            self._event.clear()
            await self._event.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send the answer's head, or a part of its body. Waits while the client reads slowly."""
        connection = self._connection
        if connection.writing_paused and not connection.closed:
            await connection.writable()
        if connection.closed:
            return
        if message["type"] == "http.response.start" and not self.started:
            self.started = True
            connection.write_head(self._head(message["status"], message["headers"]))
        elif message["type"] == "http.response.body" and self.started and not self.complete:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected message: {message['type']}")

    def _head(self, status: int, headers: Headers) -> bytes:
        """The answer's head, with its framing: by the app's Content-Length, else in chunks, or for
        HTTP/1.0, which knows no chunks (RFC 9112 §6.1), by the connection's end."""
        for name, value in headers:
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
        if self._waits and not self.framing.whole:  # it may send its body, or leave it out
            self.keep_alive = False
        text = b"".join([b"%b: %b\r\n" % line for line in headers if line[0] != b"connection"])
        if BAD_IN_VALUE.search(b"".join([name + value for name, value in headers])):
            raise RuntimeError("a header of the answer contains control characters")
        if self.scope["method"] == "HEAD" or status in NO_BODY:
            self._left = 0
        elif self._left is None:
            self._chunked = not self._is_old
            text += b"transfer-encoding: chunked\r\n" if self._chunked else b""
        if not self.keep_alive:
            text += b"connection: close\r\n"
        return STATUS_LINES[status] + text + b"\r\n"

    def _send_body(self, body: bytes, more: bool) -> None:
        connection = self._connection
        if self.scope["method"] == "HEAD":
            body = b""
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (self._left and not more):
                raise RuntimeError("the answer is not as long as its Content-Length")
        elif self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body += b"" if more else b"0\r\n\r\n"
        if body or not more:
            connection.write(body)
        if not more:
            self.complete = True
            self.wake()
            connection.answered(self)

    def torn_needs_reset(self) -> bool:
        """Return whether the answer would look whole if the connection ended as usual."""
        return self.started and self._left is None and not self._chunked


# ── Connections ──────────────────────────────────────────────────────────────────────────────────

HEAD_SECONDS = 30  # for a head, and for the first one to begin
KEEP_ALIVE_SECONDS = 75  # longer than nginx's 60: never closed as it sends a request
DISCARD_SECONDS = 30  # for the rest of a body whose request was answered
MAX_DISCARDED = 256 << 20  # bytes of that
LINGER_SECONDS = 2  # to read a last answer: closing on unread bytes would reset the connection
MAX_LINGER = 4 << 20  # bytes that are thrown away meanwhile
WRITE_SECONDS = 300  # for the client to read what was sent, while the app has more of it
PROGRESS_SECONDS = 60  # for it to read a part of that, after these or another deadline
SWEEP_SECONDS = 1
RESERVED_DESCRIPTORS = 64  # for the ledger, listening sockets, files


class State(enum.Enum):
    """What a connection is doing."""

    IDLE = "between two requests: not a byte of the next one has come"
    HEAD = "a request's head is arriving"
    SERVING = "the app runs; its body may still be arriving"
    DISCARDING = "the request was answered; the rest of its body is thrown away"
    CLOSING = "the last answer was given; everything else is thrown away"


class Connections:
    """What the connections of a server share: their deadlines, and how many there may be."""

    def __init__(
        self,
        offers_websocket: Callable[[], bool] = lambda: False,
        max_connections: int | None = None,
        now: Callable[[], float] | None = None,
    ) -> None:
        """`now` is a monotonic clock in seconds."""
        loop = asyncio.get_running_loop()
        self.offers_websocket = offers_websocket
        self.now = now or loop.time
        self.open: set[HTTPProtocol] = set()
        self.waiting: dict[HTTPProtocol, None] = {}  # without an app; the longest comes first
        self._loop = loop
        self._max = max_connections or max_client_connections()
        self._sweeping = False
        self._full = False

    def protocol(self, **options: Any) -> HTTPProtocol:
        """Return the protocol of a new connection, as uvicorn asks for it."""
        return HTTPProtocol(self, **options)

    def add(self, connection: HTTPProtocol, number: int) -> None:
        """Take in a new connection, with which there are `number`, WebSockets included. Where these
        are too many, the one for which no app has run for the longest time is ended."""
        self.open.add(connection)
        if not self._sweeping:
            self._sweeping = True
            self._loop.call_later(SWEEP_SECONDS, self._sweep)
        if number > self._max:
            if not self._full:
                self._full = True
                say(logging.WARNING, "too many connections", open=number, maximum=self._max)
            next(iter(self.waiting)).abort()

    def discard(self, connection: HTTPProtocol) -> None:
        """A connection has ended."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        if self._full and len(self.open) < self._max * 0.9:
            self._full = False
            say(logging.INFO, "connections are accepted again", open=len(self.open))

    def _sweep(self) -> None:
        now = self.now()
        for connection in [each for each in self.open if each.deadline <= now]:
            connection.expire()
        self._sweeping = bool(self.open)
        if self._sweeping:
            self._loop.call_later(SWEEP_SECONDS, self._sweep)


class HTTPProtocol(asyncio.Protocol):
    """One client's connection. Beside what ASGI asks for, a scope has "leaving" (functions that are
    called when the client leaves: a task that waits in receive() would cost each request a task),
    "send_now" (see RequestCycle.pass_on) and "abort"."""

    transport: asyncio.Transport

    def __init__(
        self,
        shared: Connections,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.deadline = math.inf
        self.closed = False
        self.writing_paused = False
        self._shared = shared
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._app = cast(App, config.loaded_app)
        self._loop = asyncio.get_running_loop()
        self._state = State.IDLE
        self._cycle: RequestCycle | None = None
        self._kept = b""  # what has come and is not looked at yet
        self._reading_paused = False
        self._continuing = False  # `_kept` will be looked at in the next turn of the loop
        self._discarded = 0
        self._head_out = b""  # an answer's head, to be sent with what follows it
        self._unsent = 0  # bytes that waited for the client when that was last looked at
        self._writable: list[asyncio.Future[None]] = []
        self._leaving: set[Callable[[], None]] = set()
        self._parser: httptools.HttpRequestParser | None = None
        self._keep_alive = True  # as the head of the request says
        self._start_head()

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._server = _address(transport.get_extra_info("sockname"))
        self._client = _address(transport.get_extra_info("peername"))
        self._server_state.connections.add(cast(Any, self))
        self._enter(State.IDLE, HEAD_SECONDS)
        self._shared.add(self, len(self._server_state.connections))

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.closed = True
        self.resume_writing()
        if self._cycle:
            self._cycle.wake()
        for leave in list(self._leaving):
            leave()
        # They refer back to here: nothing is to wait for the garbage collector, which comes late.
        self._cycle = self._parser = None
        self._kept = b""

    def _forget(self) -> None:
        self._server_state.connections.discard(cast(Any, self))
        self._shared.discard(self)
        self.deadline = math.inf

    def data_received(self, data: bytes) -> None:
        if self._kept or (self.writing_paused and self._cycle is None):
            self._keep(self._kept + data)  # the client is to read its answers first
        else:
            self._take(data)

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self._state is State.SERVING:
            self.deadline = self._shared.now() + WRITE_SECONDS

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self._state is State.SERVING:
            self.deadline = math.inf
        for waiting in self._writable:
            if not waiting.done():
                waiting.set_result(None)
        self._writable.clear()
        if self._kept:
            self._continue()

    def shutdown(self) -> None:
        """End it as soon as the answer under way is out."""
        if self._state is State.SERVING and self._cycle:
            self._cycle.keep_alive = False
        else:
            self.transport.close()

    # States

    def _enter(self, state: State, seconds: float = math.inf) -> None:
        """Change the state; it may last so long."""
        self._state = state
        self.deadline = self._shared.now() + seconds if seconds < math.inf else math.inf
        self._unsent = self._discarded = 0
        if state is State.SERVING:
            self._shared.waiting.pop(self, None)
        else:
            self._shared.waiting[self] = None  # which changes no place that it has already

    def expire(self) -> None:
        """The deadline has passed: end the connection, unless the client is still reading what was
        sent to it before."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent:
            self._unsent = unsent
            self.deadline = self._shared.now() + PROGRESS_SECONDS
        else:
            self.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def answered(self, cycle: RequestCycle) -> None:
        """The answer is complete: what comes next on this connection?"""
        self._server_state.total_requests += 1
        if not cycle.keep_alive:
            self._close(whole=cycle.framing.whole and not self._kept)
        elif cycle.framing.whole:
            self._next()
        else:
            self._enter(State.DISCARDING, DISCARD_SECONDS)
            self.resume_reading()

    def _next(self) -> None:
        """Wait for the next request, or go on with the one that is here already."""
        self._cycle = None
        self._start_head()
        self._enter(State.IDLE, KEEP_ALIVE_SECONDS)
        if self._kept:
            self._continue()
        else:
            self.resume_reading()

    def _close(self, whole: bool) -> None:
        """There is no further request. `whole`: nothing is unread."""
        self._flush_head()
        self._kept = b""
        if whole:
            self.transport.close()
        else:
            with contextlib.suppress(OSError, RuntimeError, NotImplementedError):
                self.transport.write_eof()
            self.resume_reading()
        self._enter(State.CLOSING, LINGER_SECONDS)

    def tear(self, cycle: RequestCycle) -> None:
        """The app has ended without ending its answer: so must the connection, without an end that
        the client could take for the answer's."""
        if self.closed or cycle is not self._cycle:
            return
        self._flush_head()
        if cycle.torn_needs_reset():
            sock = self.transport.get_extra_info("socket")
            with contextlib.suppress(OSError, AttributeError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self.transport.close()
        self._enter(State.CLOSING, LINGER_SECONDS)

    # Reading

    def pause_reading(self) -> None:
        """Let what comes wait in the kernel."""
        if not self._reading_paused and not self.closed:
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo pause_reading, unless something that has come still waits here."""
        if self._reading_paused and not self._kept and not self.closed:
            self._reading_paused = False
            self.transport.resume_reading()

    def _keep(self, data: bytes) -> None:
        """Look at this later: when the answer under way is complete, or in the next turn."""
        self._kept = data
        if len(data) > HIGH_WATER or self._state is not State.SERVING:
            self.pause_reading()

    def _continue(self) -> None:
        if not self._continuing:
            self._continuing = True
            self._loop.call_soon(self._take_kept)

    def _take_kept(self) -> None:
        self._continuing = False
        if self.closed or self.writing_paused:
            return
        data, self._kept = self._kept, b""
        if data:
            self._take(data)
        self.resume_reading()

    def _take(self, data: bytes) -> None:
        """Take in what has come, as far as it belongs to one request."""
        while data and self._cycle is None and self._state in (State.IDLE, State.HEAD):
            data = self._take_head(data)  # twice where empty lines come first (RFC 9112 §2.2)
        if self._state is State.CLOSING:
            self._discarded += len(data)
            if self._discarded > MAX_LINGER:
                self.abort()
        elif data and self._cycle:
            self._take_body(self._cycle, data)

    def _take_body(self, cycle: RequestCycle, data: bytes) -> None:
        if cycle.framing.whole:  # the next request, which waits for its turn
            self._keep(data)
            return
        try:
            rest = cycle.feed(data)
        except BadFraming:
            cycle.fail(Refusal("invalid_http", "The framing of the body is invalid."))
            if self._state is State.DISCARDING:
                self._close(whole=False)
            return
        if self._state is State.DISCARDING:
            self._discarded += len(data)
            if cycle.framing.whole:
                self._kept = rest
                self._next()
                return
            if self._discarded > MAX_DISCARDED:
                self.abort()
                return
        if rest:
            self._keep(rest)
            if not cycle.framing.whole:
                self._continue()

    # Heads

    def _start_head(self) -> None:
        self._parser = None
        self._head_bytes = 0
        self._head_tail = b""  # its last three bytes
        self._head_is_whole = False
        self._url = b""
        self._headers: Headers = []

    def _take_head(self, data: bytes) -> bytes:
        """Take in a part of a head; return what comes after it."""
        if self._state is State.IDLE:
            self._enter(State.HEAD, HEAD_SECONDS)
        parser = self._parser
        if parser is None:
            parser = self._parser = httptools.HttpRequestParser(self)
        at = (self._head_tail + data).find(b"\r\n\r\n")
        end = len(data) if at < 0 else at + 4 - len(self._head_tail)
        part = data[:end]
        self._head_bytes += len(part)
        self._head_tail = (self._head_tail + part)[-3:]
        try:
            parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            pass  # whether it is taken is decided here; llhttp sees nothing but the head
        except httptools.HttpParserError:
            self._refuse(Refusal("invalid_http"))
            return b""
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(Refusal("headers_too_large"))
        elif self._head_is_whole and self._begin(data[end:]):
            return b""
        return data[end:]

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._head_is_whole = True
        self._keep_alive = self._parser.should_keep_alive()

    def _begin(self, rest: bytes) -> bool:
        """A head is whole: hand the request to the app, or the connection and what has come after
        the head to a WebSocket. Return whether it is a WebSocket's."""
        try:
            scope = self._scope()
            check_head(scope)
            if is_handshake(scope) and self._shared.offers_websocket():
                check_handshake(self._url, scope["headers"])
                self._hand_over(scope, rest)
                return True
        except Refusal as refusal:
            self._refuse(refusal)
        except (httptools.HttpParserError, UnicodeDecodeError):
            self._refuse(Refusal("invalid_http"))
        else:
            keep_alive = self._keep_alive and scope["http_version"] == "1.1"
            self._serve(scope, framing_of(scope["headers"]), keep_alive)
        return False

    def _refuse(self, refusal: Refusal) -> None:
        """A head can't be read, or must not be: the app answers with this refusal, and nobody knows
        where the next request would begin."""
        scope = self._new_scope()
        scope["path"], scope["refusal"] = self._url.decode("latin-1"), refusal
        if not self._head_is_whole:  # a page's Origin may still come: where all may, show it why
            scope["headers"] = [*self._headers, (b"origin", b"null")]
        self._serve(scope, Endless(), keep_alive=False)

    def _serve(self, scope: Scope, framing: Framing, keep_alive: bool) -> None:
        cycle = self._cycle = RequestCycle(self, scope, framing, keep_alive)
        scope["leaving"], scope["send_now"] = self._leaving, cycle.pass_on
        scope["abort"] = self.transport.abort
        self._parser = None  # refers back to here
        self._enter(State.SERVING)
        task = self._loop.create_task(cycle.run(self._app))
        tasks = self._server_state.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _new_scope(self) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "GET",
            "server": self._server,
            "client": self._client,
            "scheme": "http",
            "root_path": "",
            "path": "",
            "raw_path": b"",
            "query_string": b"",
            "headers": self._headers,
        }

    def _scope(self) -> Scope:
        assert self._parser is not None
        scope, url = self._new_scope(), httptools.parse_url(self._url)
        path = url.path.decode("ascii")
        scope["http_version"] = self._parser.get_http_version()
        scope["method"] = self._parser.get_method().decode("ascii")
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""
        return scope

    def _hand_over(self, scope: Scope, rest: bytes) -> None:
        """From now on the connection is a WebSocket's."""
        self._forget()
        head = [b"GET %b HTTP/1.1\r\n" % self._url]
        head += [b"%b: %b\r\n" % line for line in scope["headers"]]
        protocol = cast(Any, self._config.ws_protocol_class)(
            config=self._config, server_state=self._server_state, app_state=self._app_state
        )
        protocol.connection_made(self.transport)
        protocol.client, protocol.server = self._client, self._server
        self.transport.set_protocol(protocol)
        protocol.data_received(b"".join([*head, b"\r\n"]))
        if rest:
            protocol.data_received(rest)

    # Writing

    def write_head(self, head: bytes) -> None:
        """Send an answer's head with what follows in the same turn of the loop: each write is a
        system call, and those cost more than most of what is done for a request."""
        self._head_out = head
        self._loop.call_soon(self._flush_head)

    def _flush_head(self) -> None:
        if self._head_out and not self.closed:
            head, self._head_out = self._head_out, b""
            self.transport.write(head)

    def write(self, data: bytes) -> None:
        """Send something."""
        if self._head_out:
            head, self._head_out = self._head_out, b""
            self.transport.writelines([head, data])
        else:
            self.transport.write(data)

    async def writable(self) -> None:
        """Wait until the client has read some of what was sent."""
        waiting = self._loop.create_future()
        self._writable.append(waiting)
        await waiting


def _address(name: Any) -> tuple[str, int] | None:
    """Return a socket's address as ASGI has it; None for a Unix socket."""
    return (name[0], name[1]) if isinstance(name, tuple) else None


# ── Servers ──────────────────────────────────────────────────────────────────────────────────────


def raise_descriptor_limit() -> int:
    """Raise the limit of open files to the most that is allowed; return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS allows less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def max_client_connections() -> int:
    """Return how many connections of clients there may be: half of the files that may be open,
    since a request may need a connection to an upstream as well."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, (limit - RESERVED_DESCRIPTORS) // 2) if limit > 0 else sys.maxsize


class Server(uvicorn.Server):
    """A uvicorn server that leaves signals to the gateway."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def server_for(app: Any, shared: Connections | None = None, **options: Any) -> Server:
    """Return a quiet server: no log, no headers, no WebSocket of its own."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    usual: dict[str, Any] = {
        "http": (shared or Connections()).protocol,
        "lifespan": "off",
        "interface": "asgi3",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": False,
        "ws": "none",
        "timeout_graceful_shutdown": 1,
    }
    return Server(uvicorn.Config(app, **usual | options))


def listen(hosts: Sequence[str], port: int, tries: int = 10) -> list[socket.socket]:
    """Return a listening socket for each address, all with the same port (0: a free one, which may
    take some `tries` to find). "::" stands for all addresses, unless one of IPv4 is listed beside
    it. (That takes a socket of its own: one for both would call IPv4 clients ::ffff:192.0.2.1.)
    Raise LedgerError where an address can't be had."""
    if "::" in hosts and all(":" in host for host in hosts):
        hosts = [*hosts, "0.0.0.0"]
    listeners: list[socket.socket] = []
    try:
        for host in hosts:
            chosen = listeners[0].getsockname()[1] if listeners else port
            listeners.append(_listen_on(host, chosen))
    except LedgerError:
        for listener in listeners:
            listener.close()
        if port == 0 and listeners and tries > 1:
            return listen(hosts, port, tries - 1)
        raise
    return listeners


def _listen_on(host: str, port: int) -> socket.socket:
    family, where = (socket.AF_INET6, f"[{host}]") if ":" in host else (socket.AF_INET, host)
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise LedgerError(f"can't listen on {where}:{port}: {error.strerror}") from None


def address_of(listener: socket.socket) -> str:
    """Return the host and port of a socket, as they stand in a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
