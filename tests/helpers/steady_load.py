"""Clients that never stop: they send requests of several kinds, one after the other, and check each
answer to its last byte. The upstream counts what it has served, and how much of it at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

USAGE = {"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}
MOVE = "websocket_connection_limit_reached"


class CountingUpstream:
    """An upstream of /v1/responses: JSON, a stream or a WebSocket. The model of a request says to
    which account it belongs."""

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()  # by model
        self.at_once: Counter[str] = Counter()
        self.most_at_once: Counter[str] = Counter()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> CountingUpstream:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1000)
        self._sockets = await serve(self._socket, "127.0.0.1", 0, compression=None)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._sockets.close()
        for each in self._writers:
            each.close()
        while self._writers:
            await asyncio.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"

    @property
    def socket_url(self) -> str:
        return f"http://127.0.0.1:{next(iter(self._sockets.sockets)).getsockname()[1]}/v1"

    @contextlib.asynccontextmanager
    async def _serving(self, model: str) -> AsyncIterator[str]:
        self.at_once[model] += 1
        self.most_at_once[model] = max(self.most_at_once[model], self.at_once[model])
        try:
            yield f"resp_{random.getrandbits(96):024x}"
        finally:
            self.at_once[model] -= 1
            self.served[model] += 1

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET "):
                    writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                    continue
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                async with self._serving(body["model"]) as response_id:
                    response = {"id": response_id, "object": "response", "model": body["model"]}
                    if body.get("stream"):
                        await self._stream(writer, response, body["seconds"])
                    else:
                        await asyncio.sleep(random.uniform(0, 0.03))
                        done = response | {"status": "completed", "usage": USAGE, "output": []}
                        text = json.dumps(done).encode()
                        writer.write(
                            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                            b"content-length: %d\r\n\r\n%b" % (len(text), text)
                        )
        writer.close()
        self._writers.discard(writer)

    @staticmethod
    async def _stream(
        writer: asyncio.StreamWriter, response: dict[str, Any], seconds: float
    ) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
        )
        for event in events_of(response, steps := max(1, round(seconds / 0.05))):
            text = b"data: %b\n\n" % json.dumps(event).encode()
            writer.write(b"%x\r\n%b\r\n" % (len(text), text))
            await asyncio.sleep(seconds / steps)
        writer.write(b"0\r\n\r\n")

    async def _socket(self, socket: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for message in socket:
                body = json.loads(message)
                async with self._serving(body["model"]) as response_id:
                    response = {"id": response_id, "object": "response", "model": body["model"]}
                    for event in events_of(response, 4):
                        await socket.send(json.dumps(event))
                        await asyncio.sleep(body["seconds"] / 4)


def events_of(response: dict[str, Any], deltas: int) -> list[dict[str, Any]]:
    """Return the events of a response."""
    begun = response | {"status": "in_progress", "output": []}
    done = response | {"status": "completed", "usage": USAGE, "output": []}
    return [
        {"type": "response.created", "response": begun},
        *({"type": "response.output_text.delta", "delta": "x"} for _ in range(deltas)),
        {"type": "response.completed", "response": done},
    ]


class SteadyLoad:
    """The clients, until `stop`. `done` counts whole answers by kind, `failed` all others by what
    went wrong."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.moved = 0  # WebSockets that were told to move
        self.seconds: list[float] = []  # that answers without a stream took
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def add(self, kind: str, number: int, key: str, model: str, seconds: float = 1.0) -> None:
        """Add so many clients. The kinds are "json" (over one connection), "connections" (a new one
        each time), "stream" and "websocket". `seconds` is the most that a stream takes."""
        client = {
            "json": self._json,
            "connections": self._connections,
            "stream": self._stream,
            "websocket": self._websocket,
        }[kind]
        for _ in range(number):
            self._tasks.append(asyncio.create_task(self._run(kind, client(key, model, seconds))))

    async def _run(self, kind: str, client: Coroutine[Any, Any, None]) -> None:
        try:
            await client
        except Exception as error:
            self.failed[f"{kind}: {type(error).__name__}: {error}"] += 1

    async def stop(self) -> None:
        """Let each client finish its request, and end."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def _json(self, key: str, model: str, _: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while not self._stopping:
            await self._ask(reader, writer, key, {"model": model, "input": "x"}, "json")
            await asyncio.sleep(random.uniform(0, 0.2))
        writer.close()

    async def _connections(self, key: str, model: str, _: float) -> None:
        while not self._stopping:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            await self._ask(reader, writer, key, {"model": model, "input": "x"}, "connections")
            writer.close()
            await asyncio.sleep(random.uniform(0, 0.2))

    async def _stream(self, key: str, model: str, seconds: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while not self._stopping:
            length = seconds * random.random() ** 3
            body = {"model": model, "input": "x", "stream": True, "seconds": length}
            await self._ask(reader, writer, key, body, "stream")
        writer.close()

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        key: str,
        body: dict[str, Any],
        kind: str,
    ) -> None:
        """Send a request, and read the answer. Raises ValueError if that is not a whole 200."""
        text = json.dumps(body).encode()
        head = (
            f"POST /v1/responses HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {key}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
        )
        began = time.monotonic()
        at = random.randrange(len(head) + len(text))  # the request arrives in two parts
        sent = head.encode() + text
        writer.write(sent[:at])
        if random.random() < 0.2:
            await asyncio.sleep(0.01)
        writer.write(sent[at:])
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        if not answer.startswith(b"http/1.1 200"):
            raise ValueError(answer.split(b"\r\n")[0] + await reader.read(500))
        if b"transfer-encoding: chunked" in answer:
            content = b""
            while size := int(await reader.readline(), 16):
                content += await reader.readexactly(size)
                await reader.readexactly(2)
            await reader.readexactly(2)
        else:
            length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
            content = await reader.readexactly(length)
        if b'"completed"' not in content:
            raise ValueError(content[-200:])
        self.done[kind] += 1
        if kind != "stream":
            self.seconds.append(time.monotonic() - began)

    async def _websocket(self, key: str, model: str, seconds: float) -> None:
        while not self._stopping:
            async with connect(
                f"ws://127.0.0.1:{self.port}/v1/responses",
                additional_headers={"authorization": f"Bearer {key}"},
                compression=None,
                open_timeout=60,
            ) as socket:
                while not self._stopping and await self._turn(socket, model, seconds):
                    await asyncio.sleep(random.uniform(0, 0.1))

    async def _turn(self, socket: Any, model: str, seconds: float) -> bool:
        """Make a turn. Return False if the client was told to connect anew."""
        seconds *= random.random() ** 3
        body = {"type": "response.create", "model": model, "input": [], "seconds": seconds}
        begun = False
        try:
            await socket.send(json.dumps(body))
            while True:
                event = json.loads(await socket.recv())
                if event["type"] == "error" and event["error"]["code"] == MOVE and not begun:
                    self.moved += 1
                    return False
                if event["type"] == "error":
                    raise ValueError(event)
                begun = True
                if event["type"] == "response.completed":
                    self.done["websocket"] += 1
                    return True
        except ConnectionClosed as error:
            if begun or not (error.rcvd and error.rcvd.reason == MOVE):
                raise
            self.moved += 1
            return False
