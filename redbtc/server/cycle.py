"""One request on a client's connection, and the response to it."""

from __future__ import annotations

import asyncio
import contextlib
import http
import inspect
from collections.abc import Callable

from redbtc.headers import BAD_IN_VALUE, Headers, header
from redbtc.refusals import Refusal
from redbtc.server.asgi import IN_SCOPE, Client, ClientRequest, Message, Scope
from redbtc.server.connections import Connection
from redbtc.server.framing import NO_BODY, Endless, Framing
from redbtc.server.stream import HIGH_WATER


def _status_line(status: int) -> bytes:
    with contextlib.suppress(ValueError):
        return b"HTTP/1.1 %d %s\r\n" % (status, http.HTTPStatus(status).phrase.encode())
    return b"HTTP/1.1 %d \r\n" % status


STATUS_LINES = {status: _status_line(status) for status in range(100, 600)}


def has_not_begun(task: asyncio.Task[None]) -> bool:
    """Return whether a task has not begun to run."""
    coroutine = task.get_coro()
    return inspect.iscoroutine(coroutine) and (
        inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED
    )


def _is_end(message: Message) -> bool:
    """Return whether an app's message ends its response."""
    return message["type"] == "http.response.body" and not message.get("more_body", False)


class RequestCycle:
    """One request on a connection, with the `receive` and `send` that the ASGI app is given."""

    def __init__(
        self,
        connection: Connection,
        scope: Scope,
        framing: Framing,
        keep_alive: bool,
        on_complete: Callable[[RequestCycle], None],
        refusal: Refusal | None,
        on_leave: set[Callable[[], None]],
    ) -> None:
        """`on_complete` is called as soon as the app has sent the whole response. `refusal` is why
        the app has to refuse the request, whose head can't be served."""
        client = Client(connection.stream.abort, self.send_now, on_leave)
        self.request = scope[IN_SCOPE] = ClientRequest(scope["headers"], client, refusal=refusal)
        self.scope = scope
        self.framing = framing
        self.keep_alive = keep_alive
        self.task: asyncio.Task[None] | None = None  # that runs the app
        self.started = False  # the app has sent the response's head
        self.complete = False
        self._connection = connection
        self._stream = connection.stream
        self._on_complete = on_complete
        self._failure: Refusal | None = None
        # The client sends its body once it gets "100 Continue" (RFC 9110 §10.1.1).
        expected = header(scope["headers"], b"expect")
        self._expects_continue = (
            expected is not None and expected.lower() == b"100-continue" and not self._is_old
        )
        self._body: bytes | bytearray = b""
        self._ended = False  # the app has received the end of the body
        self._event = asyncio.Event()
        self._remaining: int | None = None  # bytes still to send of the response's Content-Length
        self._chunked = False

    @property
    def _is_old(self) -> bool:
        """Return whether the client speaks HTTP/1.0."""
        return bool(self.scope["http_version"] == "1.0")

    # The client's side

    @property
    def is_full(self) -> bool:
        """Return whether the app must take what has arrived of the body before more is read."""
        return len(self._body) > HIGH_WATER and not self.complete

    def feed(self, data: bytes) -> bytes:
        """Take in a part of the body; return what comes after the body. Raises BadFraming."""
        body, rest = self.framing.feed(data)
        if body and not self.complete:
            if self._body:
                self._body = bytearray(self._body) if type(self._body) is bytes else self._body
                self._body += body
            else:
                self._body = body
            if self.is_full:
                self._stream.pause_reading()
        if body or self.framing.whole:
            self.wake()
        return rest

    def wake(self) -> None:
        """Let a waiting `receive` look again: data, the body's end, a failure or a disconnect."""
        self._event.set()

    def fail(self, refusal: Refusal) -> None:
        """Make `receive` raise `refusal`: the rest of the body can't be read."""
        self._failure, self.framing, self.keep_alive = refusal, Endless(), False
        self.wake()

    def send_now(self, data: bytes) -> bool:
        """Send a part of the response's body at once and return True. Return False, with nothing
        sent, where `send` must be awaited instead: the client reads slowly or has disconnected, the
        response has not started or has ended, or it has a Content-Length."""
        stream = self._stream
        if not self.started or self._remaining is not None or stream.writing_paused:
            return False
        if self._connection.closed or self.complete:
            return False
        stream.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return True

    # Another process

    def rebuilt(self) -> bytes | None:
        """Return what has arrived of the request, in a form from which another process can serve
        it. Return None if it is admitted or refused already, or is being served and can't be
        served anew."""
        received = self.request.received
        if self.request.refusal or self.started or self._failure:
            return None
        if received is None and not (self.task and has_not_begun(self.task)):
            return None
        scope, dropped = self.scope, b"" if self._expects_continue else b"expect"
        target = scope["raw_path"]
        if scope["query_string"]:
            target += b"?" + scope["query_string"]
        head = [b"%b %b HTTP/%b\r\n" % (scope["method"].encode(), target, self._version)]
        head += [b"%b: %b\r\n" % line for line in scope["headers"] if line[0] != dropped]
        taken = received.as_client_sent() if received else ()
        body = self.framing.rebuilt(b"".join([*taken, self._body]))
        return b"".join([*head, b"\r\n", body])

    @property
    def _version(self) -> bytes:
        version: str = self.scope["http_version"]
        return version.encode()

    # The app's side

    async def receive(self) -> Message:
        """Return the next part of the body; after its end, wait until the client disconnects or the
        response is complete. Raises Refusal where the body's framing is invalid."""
        connection = self._connection
        if self._expects_continue and not (self.started or connection.closed or self.framing.whole):
            self._stream.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._expects_continue = False
        while not (connection.closed or self.complete):
            if self._failure:
                raise self._failure
            if self._body or (self.framing.whole and not self._ended):
                body, self._body = self._body, b""
                self._ended = self.framing.whole
                self._stream.resume_reading()
                return {"type": "http.request", "body": bytes(body), "more_body": not self._ended}
            self._stream.resume_reading()
            self._event.clear()
            if self.framing.whole:
                await self._event.wait()
            else:
                await connection.make_room_until(self._event.wait(), self.request.key is not None)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send the response's head or a part of its body. Wait while the client reads slowly,
        except with the last part: the app can then free what it holds, and the connection gets a
        deadline and can be closed to make room for others."""
        connection, stream = self._connection, self._stream
        if stream.writing_paused and not (connection.closed or _is_end(message)):
            await connection.make_room_until(stream.writable(), self.request.key is not None)
        if connection.closed:
            return
        if message["type"] == "http.response.start" and not self.started:
            self.started = True
            stream.write_head(self._head(message["status"], message["headers"]))
            if self.ends_by_closing:
                stream.reset_when_closed(True)
        elif message["type"] == "http.response.body" and self.started and not self.complete:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected message: {message['type']}")

    def _head(self, status: int, headers: Headers) -> bytes:
        """Return the response's head as bytes. The body is framed by the app's Content-Length, else
        in chunks, or for HTTP/1.0, which has no chunks (RFC 9112 §6.1), by the connection's end."""
        for name, value in headers:
            if name == b"content-length":
                self._remaining = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive = False
        if self._expects_continue and not self.framing.whole:
            # The client was not told to send its body: it may send that, or the next request.
            self.keep_alive = False
        text = b"".join([b"%b: %b\r\n" % line for line in headers if line[0] != b"connection"])
        if BAD_IN_VALUE.search(b"".join([name + value for name, value in headers])):
            raise RuntimeError("a response header contains control characters")
        if self.scope["method"] == "HEAD" or status in NO_BODY:
            self._remaining = 0
        elif self._remaining is None:
            self._chunked = not self._is_old
            text += b"transfer-encoding: chunked\r\n" if self._chunked else b""
        if not self.keep_alive:
            text += b"connection: close\r\n"
        return STATUS_LINES[status] + text + b"\r\n"

    def _send_body(self, body: bytes, more: bool) -> None:
        if self.scope["method"] == "HEAD":
            body = b""
        if self._remaining is not None:
            self._remaining -= len(body)
            if self._remaining < 0 or (self._remaining and not more):
                raise RuntimeError("the response body does not have the length of Content-Length")
        elif self._chunked:
            body = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            body += b"" if more else b"0\r\n\r\n"
        if body or not more:
            self._stream.write(body)
        if not more:
            self.complete = True
            self.wake()
            self._on_complete(self)

    @property
    def ends_by_closing(self) -> bool:
        """Return whether only the connection's end marks the end of the response's body."""
        return self.started and self._remaining is None and not self._chunked
