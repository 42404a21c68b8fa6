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

CLOSING can also follow DISCARDING, where the rest of the body can't be read. A WebSocket handshake
leaves these states: the connection gets uvicorn's WebSocket protocol instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import struct
import urllib.parse
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.server import ServerState

from redbtc.headers import Headers
from redbtc.refusals import Refusal
from redbtc.server.asgi import App, Scope
from redbtc.server.connections import Connections, State
from redbtc.server.cycle import HIGH_WATER, RequestCycle
from redbtc.server.framing import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    BadFraming,
    Endless,
    Framing,
    check_handshake,
    check_head,
    framing_of,
    is_handshake,
)

HEAD_SECONDS = 30  # for a whole head; on a new connection, also for its first byte to arrive
KEEP_ALIVE_SECONDS = 75  # longer than nginx's 60, so that nginx never sends on a closed connection
DISCARD_SECONDS = 30  # for the rest of a body whose request was answered
MAX_DISCARDED = 256 << 20  # bytes of such a rest
LINGER_SECONDS = 2  # to read the last response: closing on unread bytes would reset the connection
MAX_LINGER = 4 << 20  # bytes that are thrown away in that time
WRITE_SECONDS = 300  # for the client to read from a full write buffer while the app runs
PROGRESS_SECONDS = 60  # more for a client that has not read all, as long as it reads some in each


class HTTPProtocol(asyncio.Protocol):
    """One client's connection. Each scope holds a ClientRequest, to which the app adds the key when
    it has found the key to be valid."""

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
        self.keyed = False  # the last response was that of a request with a valid key
        self._shared = shared
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._app = cast(App, config.loaded_app)
        self._loop = asyncio.get_running_loop()
        self._state = State.IDLE
        self._cycle: RequestCycle | None = None
        self._kept = b""  # bytes that have arrived and are not parsed yet
        self._reading_paused = False
        self._continuing = False  # `_kept` will be parsed in the next turn of the loop
        self._discarded = 0
        self._head_out = b""  # a response's head, to be sent with what follows it
        self._unsent = 0  # bytes in the write buffer when the deadline last passed
        self._lost = False  # bytes in the write buffer were thrown away
        self._writable: list[asyncio.Future[None]] = []
        self.on_leave: set[Callable[[], None]] = set()  # called when the client disconnects
        self._parser: httptools.HttpRequestParser | None = None
        self._keep_alive = True  # what the request's head asks for
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
        if self._cycle and self._cycle.ends_by_closing and self._cycle.complete:
            self.reset_when_closed(self._lost or exc is not None)
        self.resume_writing()
        if self._cycle:
            self._cycle.wake()
        for leave in list(self.on_leave):
            leave()
        # Break reference cycles, so that memory is freed without waiting for the garbage collector.
        self._cycle = self._parser = None
        self._kept = b""

    def _forget(self) -> None:
        self._server_state.connections.discard(cast(Any, self))
        self._shared.discard(self, len(self._server_state.connections))
        self.deadline = math.inf

    def data_received(self, data: bytes) -> None:
        if self._kept or (self.writing_paused and self._cycle is None):
            self._keep(self._kept + data)  # the client must read its responses first
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
        """Close the connection, after the response that is under way if there is one."""
        if self._state is State.SERVING and self._cycle:
            self._cycle.keep_alive = False
        elif self._state is State.DISCARDING:
            self._close(whole=False)
        elif self._state is not State.CLOSING:
            self.transport.close()

    # States

    def _enter(self, state: State, seconds: float = math.inf) -> None:
        """Change the state. Its deadline is in `seconds`; by default it has none."""
        self._state = state
        self.deadline = self._shared.now() + seconds if seconds < math.inf else math.inf
        self._unsent = self._discarded = 0
        if self in self._shared.keyed_waiting:
            del self._shared.keyed_waiting[self]
        if state is State.SERVING:
            self._shared.waiting.pop(self, None)
        else:
            self._shared.waiting[self] = None  # keeps its position if it is there already

    async def make_room_until(self, event: Awaitable[Any], keyed: bool) -> None:
        """Wait for the client. Meanwhile the connection may be closed to make room for others.
        `keyed`: the request has a valid key."""
        waiting = self._shared.keyed_waiting if keyed else self._shared.waiting
        waiting[self] = None
        try:
            await event
        finally:
            if self._state is State.SERVING:
                waiting.pop(self, None)

    def expire(self) -> None:
        """Abort the connection, whose deadline has passed. While the write buffer is not empty,
        extend the deadline once, and again each time that the client has read some since."""
        unsent = self.transport.get_write_buffer_size()
        if unsent and unsent != self._unsent:
            self._unsent = unsent
            self.deadline = self._shared.now() + PROGRESS_SECONDS
        else:
            self.abort()

    def abort(self) -> None:
        """Close the connection at once, without sending what is buffered."""
        self._lost = self.transport.get_write_buffer_size() > 0
        self.transport.abort()

    def reset_when_closed(self, on: bool) -> None:
        """Switch on or off that the connection is reset when its socket is closed. On, it is reset
        even if the process is killed, so that a response whose end is the connection's end never
        looks complete when it is not."""
        sock = self.transport.get_extra_info("socket")
        with contextlib.suppress(OSError, AttributeError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, 0))

    def answered(self, cycle: RequestCycle) -> None:
        """Enter the state that follows a complete response."""
        self._server_state.total_requests += 1
        self.keyed = cycle.request.key is not None
        if not cycle.keep_alive:
            self._close(whole=cycle.framing.whole and not self._kept)
        elif cycle.framing.whole:
            self._next()
        else:
            self._enter(State.DISCARDING, DISCARD_SECONDS)
            self.resume_reading()

    def _next(self) -> None:
        """Wait for the next request, or begin with one whose bytes have arrived already."""
        self._cycle = None
        self._start_head()
        self._enter(State.IDLE, KEEP_ALIVE_SECONDS)
        if self._kept:
            self._continue()
        else:
            self.resume_reading()

    def _close(self, whole: bool) -> None:
        """Close after the last response. `whole`: all that the client sent has been read, so that
        closing at once can't reset the connection before the client has read the response."""
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
        """End the connection of an app that returned without completing its response, in a way that
        the client can't take for the end of the response."""
        if self.closed or cycle is not self._cycle:
            return
        self._flush_head()
        if cycle.ends_by_closing:
            self.abort()
            return
        self.transport.close()
        self._enter(State.CLOSING, LINGER_SECONDS)

    # Reading

    def pause_reading(self) -> None:
        """Stop reading from the socket."""
        if not self._reading_paused and not self.closed:
            self._reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read from the socket again, unless earlier bytes are still waiting in `_kept` or for the
        app to take them."""
        if not self._reading_paused or self._kept or self.closed:
            return
        if not (self._cycle and self._cycle.is_full):
            self._reading_paused = False
            self.transport.resume_reading()

    def _keep(self, data: bytes) -> None:
        """Keep bytes until the current response is complete, or until the next turn of the loop."""
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
        """Parse bytes that have arrived. Those of a following request are kept for later."""
        if data and self._cycle is None and self._state in (State.IDLE, State.HEAD):
            data = self._take_head(data)
        if self._state is State.CLOSING or (self._cycle and type(self._cycle.framing) is Endless):
            self._discarded += len(data)
            if self._discarded > MAX_LINGER:
                self.abort()
        elif data and self._cycle:
            self._take_body(self._cycle, data)

    def _take_body(self, cycle: RequestCycle, data: bytes) -> None:
        if cycle.framing.whole:  # the bytes are the next request's: keep them until it is served
            self._keep(data)
            return
        try:
            rest = cycle.feed(data)
        except BadFraming:
            cycle.fail(
                Refusal("invalid_http", "The chunked encoding of the request body is invalid.")
            )
            if self._state is State.DISCARDING:
                self._close(whole=False)
            return
        except MemoryError:
            cycle.fail(Refusal("overloaded"))
            return
        if self._state is State.DISCARDING:
            self._discarded += len(data) - len(rest)
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
        """Parse a part of a head; return the bytes that come after the head."""
        if self._state is State.IDLE:
            self._enter(State.HEAD, HEAD_SECONDS)
        if self._parser is None:
            head = data.lstrip(b"\r\n")  # empty lines may precede it (RFC 9112 §2.2)
            self._head_bytes += len(data) - len(head)
            data = head
            self._parser = httptools.HttpRequestParser(self) if data else None
        at = (self._head_tail + data).find(b"\r\n\r\n")
        end = len(data) if at < 0 else at + 4 - len(self._head_tail)
        part = data[:end]
        self._head_bytes += len(part)
        self._head_tail = (self._head_tail + part)[-3:]
        try:
            if self._parser:
                self._parser.feed_data(part)
        except httptools.HttpParserUpgrade:
            pass  # `_begin` decides whether to take it; llhttp sees nothing but the head
        except httptools.HttpParserError:
            self._refuse(Refusal("invalid_http"))
            return b""
        if self._head_bytes > MAX_HEAD_BYTES or len(self._headers) > MAX_HEADERS:
            # All of them take many times the memory of their bytes. The app still sees an Origin.
            beyond = [line for line in self._headers[MAX_HEADERS:] if line[0] == b"origin"]
            self._headers[MAX_HEADERS:] = beyond[:1]
            self._refuse(Refusal("headers_too_large"))
        elif at >= 0 and not self._head_is_whole:  # to llhttp it goes on: HTTP/2's preface
            self._refuse(Refusal("invalid_http"))
        elif self._head_is_whole and self._begin(data[end:]):
            return b""
        return data[end:]

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if value[-1:] in (b" ", b"\t"):  # no part of the value (RFC 9110 §5.5)
            value = value.rstrip(b" \t")
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._head_is_whole = True
        self._keep_alive = self._parser.should_keep_alive()

    def _begin(self, rest: bytes) -> bool:
        """Serve the request of a whole head, or hand the connection over to a WebSocket, with the
        bytes that came after the head. Return whether it was handed over."""
        try:
            scope = self._scope()
            check_head(scope)
            if is_handshake(scope) and self._shared.offers_websocket():
                check_handshake(scope)
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
        """Let the app answer a head that can't be read or is not allowed with `refusal`. The
        connection is closed afterwards: it is unknown where the next request would begin."""
        scope = self._new_scope()
        scope["path"] = self._url.decode("latin-1")
        # An Origin may be in the part that has not arrived: "null" lets a page read the refusal
        # where all origins are allowed.
        if not self._head_is_whole:
            scope["headers"] = [*self._headers, (b"origin", b"null")]
        self._serve(scope, Endless(), keep_alive=False, refusal=refusal)

    def _serve(
        self, scope: Scope, framing: Framing, keep_alive: bool, refusal: Refusal | None = None
    ) -> None:
        cycle = self._cycle = RequestCycle(self, scope, framing, keep_alive, refusal)
        self._parser = None  # breaks the reference cycle
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
        raw_path = url.path or b"/"  # RFC 9110 §4.2.3: http://host is http://host/
        path = raw_path.decode("ascii")
        scope["http_version"] = self._parser.get_http_version()
        scope["method"] = self._parser.get_method().decode("ascii")
        scope["path"] = urllib.parse.unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        scope["query_string"] = url.query or b""
        return scope

    def _hand_over(self, scope: Scope, rest: bytes) -> None:
        """Hand the connection over to uvicorn's WebSocket protocol."""
        self._forget()
        head = [b"GET %b?%b HTTP/1.1\r\n" % (scope["raw_path"], scope["query_string"])]
        head += [b"%b: %b\r\n" % line for line in scope["headers"]]
        protocol = cast(Any, self._config.ws_protocol_class)(
            config=self._config, server_state=self._server_state, app_state=self._app_state
        )
        self.resume_reading()  # before the WebSocket takes over, which pauses reading itself
        protocol.connection_made(self.transport)
        protocol.client, protocol.server = self._client, self._server
        self.transport.set_protocol(protocol)
        protocol.data_received(b"".join([*head, b"\r\n"]))
        if rest:
            protocol.data_received(rest)

    # Writing

    def write_head(self, head: bytes) -> None:
        """Send a response's head together with what is written in the same turn of the loop: each
        write is a system call, which costs more than most of the work on a request."""
        self._head_out = head
        self._loop.call_soon(self._flush_head)

    def _flush_head(self) -> None:
        if self._head_out and not self.closed:
            head, self._head_out = self._head_out, b""
            self.transport.write(head)

    def write(self, data: bytes) -> None:
        """Send bytes, after the head if that has not been sent yet."""
        if self._head_out:
            head, self._head_out = self._head_out, b""
            self.transport.writelines([head, data])
        else:
            self.transport.write(data)

    async def writable(self, keyed: bool) -> None:
        """Wait until the client has read enough of what was sent for more to be written. `keyed`:
        as for `make_room_until`."""
        waiting = self._loop.create_future()
        self._writable.append(waiting)
        await self.make_room_until(waiting, keyed)


def _address(name: Any) -> tuple[str, int] | None:
    """Return a socket's address in ASGI's form: host and port, None for a Unix socket."""
    return (name[0], name[1]) if isinstance(name, tuple) else None
