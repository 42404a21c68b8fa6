"""An upstream under the test's control: HTTP/1.1 written directly on sockets, so that it can do
what no well-behaved server does. It runs in a thread with an event loop of its own.

A test sets `upstream.script`, an async function of the request received and of the reply to give;
without one it answers as OpenAI would, with fixed usage.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, cast

from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Event
from websockets.server import ServerProtocol

from tests.helpers.gateway import PATIENCE_SECONDS

CHAT_USAGE = {
    "prompt_tokens": 20,
    "completion_tokens": 7,
    "total_tokens": 27,
    "prompt_tokens_details": {"cached_tokens": 8, "cache_write_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 3},
}
RESPONSE_USAGE: dict[str, Any] = {
    "input_tokens": 30,
    "input_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 4},
    "output_tokens": 9,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 39,
}
IMAGE_USAGE: dict[str, Any] = {
    "input_tokens": 50,
    "input_tokens_details": {"text_tokens": 10, "image_tokens": 40},
    "output_tokens": 272,
    "total_tokens": 322,
}

Headers = Mapping[str, str] | Iterable[tuple[str, str]]


def pairs(headers: Headers) -> list[tuple[str, str]]:
    return list(headers.items() if isinstance(headers, Mapping) else headers)


class Received:
    """One request as it came."""

    def __init__(self, method: str, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        self.body = b""
        self.finished = threading.Event()  # answered to the end, or the connection is gone
        self.closed = threading.Event()  # the gateway closed before the answer's end

    def header(self, name: str) -> str | None:
        for key, value in self.headers:
            if key.lower() == name.encode():
                return value.decode()
        return None

    def json(self) -> Any:
        return json.loads(self.body)


class Torn(Exception):
    """The script has broken the connection on purpose."""


class Reply:
    """What a script answers with."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._framing = "chunked"
        self.keep_alive = True

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(
        self,
        status: int = 200,
        headers: Headers = (),
        framing: str = "chunked",
    ) -> None:
        """`framing`: 'chunked', 'length:N' or 'close'."""
        self._framing = framing
        lines = [
            f"HTTP/1.1 {status} Something",
            *(f"{name}: {value}" for name, value in pairs(headers)),
        ]
        if framing == "chunked":
            lines.append("transfer-encoding: chunked")
        elif framing.startswith("length:"):
            lines.append(f"content-length: {framing.removeprefix('length:')}")
        else:
            lines.append("connection: close")
            self.keep_alive = False
        await self.raw("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def send(self, data: bytes) -> None:
        """One write; one HTTP chunk where chunked."""
        if data:
            chunked = self._framing == "chunked"
            await self.raw(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

    async def end(self) -> None:
        if self._framing == "chunked":
            await self.raw(b"0\r\n\r\n")

    async def wait(self, event: threading.Event, seconds: float = PATIENCE_SECONDS) -> bool:
        """For tests in lock step: whether the event was set in time. It is polled: hundreds of
        scripts may wait at once, each of which would cost a thread otherwise."""
        deadline = time.monotonic() + seconds
        while not event.is_set() and time.monotonic() < deadline:
            await asyncio.sleep(0.002)
        return event.is_set()

    def tear(self) -> None:
        """Reset the connection."""
        sock = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
        raise Torn

    def close(self) -> None:
        """Close it without the answer's end."""
        self._writer.close()
        raise Torn


class Socket:
    """The upstream's end of a WebSocket."""

    def __init__(
        self, received: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.received = received
        self.frames: list[dict[str, Any]] = []  # what has come
        self.texts: list[bytes] = []  # the same messages as bytes
        self.close_code: int | None = None
        self._text = bytearray()  # of the message that is coming
        self._reader = reader
        self._writer = writer
        self._protocol = ServerProtocol(max_size=None)
        self._events: deque[Event] = deque()

    async def accept(self, head: bytes, headers: Headers = ()) -> None:
        self._protocol.receive_data(head)
        (request,) = self._protocol.events_received()
        assert isinstance(request, Request)
        response = self._protocol.accept(request)
        for name, value in pairs(headers):
            response.headers[name] = value
        self._protocol.send_response(response)
        await self._flush()

    async def recv(self) -> dict[str, Any]:
        """The next message. Raises ConnectionError where there is none."""
        while True:
            self._events.extend(self._protocol.events_received())
            while self._events:
                frame = self._events.popleft()
                assert isinstance(frame, Frame)
                await self._flush()
                if frame.opcode in (Opcode.TEXT, Opcode.CONT):
                    self._text += frame.data
                    if frame.fin:
                        self.texts.append(bytes(self._text))
                        self.frames.append(json.loads(self._text))
                        self._text.clear()
                        return self.frames[-1]
            if self._protocol.close_rcvd:
                self.close_code = self._protocol.close_rcvd.code
            part = b"" if self._protocol.close_rcvd else await self._reader.read(65536)
            if not part:
                raise ConnectionError("closed")
            self._protocol.receive_data(part)

    async def begin(self) -> None:
        """Wait for the beginning of a message, and drop it: the message can't be read any more."""
        await self._reader.readexactly(100)

    async def send(self, *events: dict[str, Any] | bytes) -> None:
        for each in events:
            text = each if isinstance(each, bytes) else json.dumps(each).encode()
            self._protocol.send_text(text)
        await self._flush()

    async def ping(self, payload: bytes) -> bool:
        """Whether the next that comes is its answer."""
        self._protocol.send_ping(payload)
        await self._flush()
        self._protocol.receive_data(await self._reader.read(65536))
        (pong,) = self._protocol.events_received()
        assert isinstance(pong, Frame)
        return pong.opcode is Opcode.PONG and bytes(pong.data) == payload

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self._protocol.send_close(code, reason)
        await self._flush()
        with contextlib.suppress(ConnectionError):
            while True:
                await self.recv()

    async def end_late(self, *events: dict[str, Any] | bytes) -> None:
        """Send these when the other end has begun to close, and only then close."""
        closing = await self._reader.read(65536)
        await self.send(*events)
        self._protocol.receive_data(closing)
        await self._flush()

    async def stop_reading(self) -> None:
        """Read nothing more until the test ends."""
        cast(asyncio.ReadTransport, self._writer.transport).pause_reading()
        await asyncio.Event().wait()

    def tear(self) -> None:
        self._writer.transport.abort()
        raise Torn

    async def _flush(self) -> None:
        self._writer.write(b"".join(self._protocol.data_to_send()))
        await self._writer.drain()


Script = Callable[[Received, Reply], Awaitable[None]]
Talk = Callable[[Socket], Awaitable[None]]


class Upstream:
    """`with Upstream() as upstream:` listens on loopback until the block ends, which raises what a
    script has failed with, other than by a broken connection. With `tls` it speaks HTTPS."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.script: Script = openai_like
        self.talk: Talk | None = None  # over a WebSocket; without one it speaks none
        self.handshake_headers: Headers = ()
        self.handshake_seconds = 0.0
        self.sockets: list[Socket] = []
        self.requests: list[Received] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.connections = 0
        self.failures: list[BaseException] = []
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Upstream:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the upstream did not stop"
        if kind is None and self.failures:
            raise self.failures[0]

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Until it holds; looked at with each change here, and every 20 ms for changes elsewhere.
        No lock is held meanwhile: the condition may ask the gateway, and that this upstream."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s in vain"
            with self._changed:
                self._changed.wait(0.02)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(
            self._connection, "127.0.0.1", 0, backlog=2048, limit=1 << 20, ssl=self._tls
        )
        self.port = server.sockets[0].getsockname()[1]
        origin = "https://localhost" if self._tls else "http://127.0.0.1"
        self.url = f"{origin}:{self.port}/v1"
        self._ready.set()
        await self._stop.wait()
        server.close()
        await server.wait_closed()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self._notify()
        try:
            begun: bytes | None = b""
            while begun is not None:
                begun = await self._request(begun, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError, Torn):
            pass
        finally:
            self.connections -= 1
            self._notify()
            writer.close()
            try:
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            except asyncio.CancelledError:
                writer.transport.abort()
            self._tasks.discard(task)

    async def _request(
        self, begun: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | None:
        """Serve one request of which `begun` was read already; what was read of the next, or None
        where the connection is to end."""
        head = begun + await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].split(b"\r\n")
        method, path, _ = first.decode("latin-1").split(" ", 2)
        headers = [(name, value.strip()) for name, _, value in (li.partition(b":") for li in lines)]
        received = Received(method, path, headers)
        if received.header("expect") == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        received.body = await self._body(reader, received)
        self.requests.append(received)
        self._notify()
        if self.talk and received.header("upgrade") == "websocket":
            await self._talk(self.talk, Socket(received, reader, writer), head)
            return None
        reply = Reply(writer)
        for _ in range(20):  # what was closed before this came is counted before it
            await asyncio.sleep(0)
        if reader.at_eof() or reader.exception():  # as this was, meanwhile
            received.closed.set()
            received.finished.set()
            return None
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        self._notify()
        answer = asyncio.ensure_future(self.script(received, reply))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done() and not gone.exception() and gone.result():
                await asyncio.wait({answer})  # the next request has begun: nobody has left
            if not answer.done():
                received.closed.set()
                answer.cancel()
            (failure,) = await asyncio.gather(answer, return_exceptions=True)
            if isinstance(failure, OSError):
                received.closed.set()
            elif isinstance(failure, Exception) and not isinstance(failure, Torn):
                self.failures.append(failure)
            if failure is not None:
                return None
            gone.cancel()
            (byte,) = await asyncio.gather(gone, return_exceptions=True)
            if byte == b"" or not reply.keep_alive:
                return None
            return byte if isinstance(byte, bytes) else b""
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)
            self.in_flight -= 1
            received.finished.set()
            self._notify()

    async def _talk(self, talk: Talk, sock: Socket, head: bytes) -> None:
        self.sockets.append(sock)
        try:
            await asyncio.sleep(self.handshake_seconds)
            await sock.accept(head, self.handshake_headers)
            await talk(sock)
        except (ConnectionError, Torn):
            pass
        except Exception as failure:
            self.failures.append(failure)
        finally:
            sock.received.closed.set()
            sock.received.finished.set()
            self._notify()

    @staticmethod
    async def _body(reader: asyncio.StreamReader, received: Received) -> bytes:
        length = received.header("content-length")
        if length is not None:
            return await reader.readexactly(int(length))
        body = bytearray()
        if received.header("transfer-encoding"):
            while size := int(await reader.readline(), 16):
                body += await reader.readexactly(size)
                await reader.readline()
            await reader.readline()
        return bytes(body)


# Ready scripts


def json_answer(
    content: Any,
    status: int = 200,
    headers: Headers = (),
    content_type: str | None = "application/json",
) -> Script:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()

    async def script(_: Received, reply: Reply) -> None:
        head = [("content-type", content_type)] if content_type else []
        head += pairs(headers)
        await reply.head(status, head, f"length:{len(body)}")
        await reply.send(body)

    return script


def stream(
    pieces: Iterable[bytes],
    pause: float = 0.0,
    headers: Headers = (),
    end: str = "clean",
) -> Script:
    """Server-sent events in these pieces, each its own write. `end`: 'clean', 'tear', 'close'."""
    kept = list(pieces)

    async def script(_: Received, reply: Reply) -> None:
        head = [("content-type", "text/event-stream; charset=utf-8"), *pairs(headers)]
        await reply.head(200, head)
        for piece in kept:
            await reply.send(piece)
            await asyncio.sleep(pause)
        if end == "tear":
            reply.tear()
        if end == "close":
            reply.close()
        await reply.end()

    return script


sse = stream  # what it is called where `client.stream` stands beside it


async def silent(request: Received, reply: Reply) -> None:
    """Answer nothing at all."""
    await reply.wait(request.closed)


def event(content: Any, name: str | None = None) -> bytes:
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(content)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def chat_chunk(model: str, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": None}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": model,
        "service_tier": "default",
        "choices": [choice],
        **more,
    }


def chat_pieces(
    words: list[str], model: str = "gpt-up", usage: Any = CHAT_USAGE, asked: bool = True
) -> list[bytes]:
    """A streamed chat; with usage only where the request asked for it."""
    null = {"usage": None} if asked else {}
    pieces = [event(chat_chunk(model, {"role": "assistant", "content": ""}, **null))]
    pieces += [event(chat_chunk(model, {"content": word}, **null)) for word in words]
    if asked:
        pieces.append(event(chat_chunk(model, {}, usage=usage) | {"choices": []}))
    return [*pieces, DONE]


def response_object(
    model: str | None = "gpt-up",
    usage: Any = RESPONSE_USAGE,
    status: str = "completed",
    **more: Any,
) -> dict[str, Any]:
    part = {"type": "output_text", "text": "Hello there", "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    return {
        "id": "resp_1",
        "object": "response",
        "created_at": 1,
        "status": status,
        "error": None,
        "model": model,
        "output": [{**message, "content": [part]}],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "service_tier": "default",
        "usage": usage,
        **more,
    }


def response_pieces(
    words: list[str], model: str = "gpt-up", usage: Any = RESPONSE_USAGE
) -> list[bytes]:
    """A streamed response."""
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response_object(model, None, "in_progress")},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {"id": "msg_1", "type": "message", "role": "assistant", "content": []},
        },
        *(
            {
                "type": "response.output_text.delta",
                "item_id": "msg_1",
                "output_index": 0,
                "content_index": 0,
                "delta": word,
            }
            for word in words
        ),
        {"type": "response.completed", "response": response_object(model, usage)},
    ]
    return [
        event({**content, "sequence_number": number}, content["type"])
        for number, content in enumerate(events)
    ]


def images_pieces(
    partial: int = 1, usage: Any = IMAGE_USAGE, kind: str = "image_generation"
) -> list[bytes]:
    """A streamed image. `kind`: 'image_generation' or 'image_edit'."""
    image = {"b64_json": "aGVsbG8=", "created_at": 1, "output_format": "png"}
    events: list[dict[str, Any]] = [
        {"type": f"{kind}.partial_image", "partial_image_index": number, **image}
        for number in range(partial)
    ]
    events.append({"type": f"{kind}.completed", **image, "usage": usage})
    return [event(content, str(content["type"])) for content in events]


WORDS = ["Hello", " there", "!"]


def chat_json(usage: Any = CHAT_USAGE, model: str | None = None) -> Script:
    """A chat completion of the model asked for, unless one is given."""

    async def script(request: Received, reply: Reply) -> None:
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}}
        content = chat_chunk(model or request.json()["model"], {}, usage=usage)
        content |= {"object": "chat.completion", "choices": [{**choice, "finish_reason": "stop"}]}
        await json_answer(content)(request, reply)

    return script


def chat_stream(
    words: list[str] = WORDS,
    usage: Any = CHAT_USAGE,
    model: str | None = None,
    pause: float = 0.0,
    end: str = "clean",
) -> Script:
    """A streamed chat; with usage only where the request asked for it."""

    async def script(request: Received, reply: Reply) -> None:
        body = request.json()
        asked = bool((body.get("stream_options") or {}).get("include_usage"))
        pieces = chat_pieces(words, model or body["model"], usage, asked)
        await stream(pieces, pause, end=end)(request, reply)

    return script


def responses_stream(
    words: list[str] = WORDS,
    usage: Any = RESPONSE_USAGE,
    model: str | None = None,
    pause: float = 0.0,
    end: str = "clean",
) -> Script:
    """A streamed response of the model asked for, unless one is given."""

    async def script(request: Received, reply: Reply) -> None:
        pieces = response_pieces(words, model or request.json()["model"], usage)
        await stream(pieces, pause, end=end)(request, reply)

    return script


def images_json(usage: Any = IMAGE_USAGE) -> Script:
    return json_answer({"created": 1, "data": [{"b64_json": "aGVsbG8="}], "usage": usage})


def images_stream(
    partial: int = 1, usage: Any = IMAGE_USAGE, pause: float = 0.0, end: str = "clean"
) -> Script:
    """A streamed image, generated or edited as the path says."""

    async def script(request: Received, reply: Reply) -> None:
        kind = "image_edit" if "/edits" in request.path else "image_generation"
        await stream(images_pieces(partial, usage, kind), pause, end=end)(request, reply)

    return script


def wants_stream(request: Received) -> bool:
    """Also in a form, which is how image edits come."""
    if (request.header("content-type") or "").startswith("multipart/"):
        _, _, value = request.body.partition(b'name="stream"\r\n\r\n')
        return value.startswith(b"true")
    return bool(request.json().get("stream"))


def ws_events(number: int, frame: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """What a WebSocket answers to a response.create: a response of that number."""
    lane = {"stream_id": frame["stream_id"]} if "stream_id" in frame else {}
    model, made = frame["model"], {"id": f"resp_ws_{number}", **more}
    begun = response_object(model, None, "in_progress", **{**made, "output": []})
    delta = {"type": "response.output_text.delta", "item_id": f"msg_{number}", "delta": "Hello"}
    return [
        {"type": "response.created", "response": begun, **lane},
        {**delta, **lane},
        {"type": "response.completed", "response": response_object(model, **made), **lane},
    ]


async def ws_like_openai(sock: Socket) -> None:
    """Answers each response.create at once."""
    while True:
        frame = await sock.recv()
        await sock.send(*ws_events(len(sock.frames), frame))


async def openai_like(request: Received, reply: Reply) -> None:
    """What OpenAI would do, as far as tests need it."""
    path = request.path.partition("?")[0]
    if request.header("upgrade"):
        script = json_answer({"error": {"message": "no WebSocket"}}, 426)
    elif path == "/v1/models":
        models = [{"id": name, "object": "model"} for name in ("gpt-up", "gpt-other")]
        script = json_answer({"object": "list", "data": models})
    elif path.startswith("/v1/models/"):
        script = json_answer({"id": path.rpartition("/")[2], "object": "model"})
    elif path.startswith("/v1/images/"):
        script = images_stream() if wants_stream(request) else images_json()
    elif path == "/v1/chat/completions":
        script = chat_stream() if wants_stream(request) else chat_json()
    elif wants_stream(request):
        script = responses_stream()
    else:
        script = json_answer(response_object(request.json()["model"]))
    await script(request, reply)
