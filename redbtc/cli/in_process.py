"""Requests to an app in the same process, whose answers can be read while they are made."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2

from redbtc.server.asgi import App, Message, Scope


class InProcess(httpx2.AsyncBaseTransport):
    """Sends requests to an ASGI app. httpx2's own transport returns an answer only once it is
    whole, and so would show no progress."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Return the answer as soon as it has begun. Raises what the app has failed with."""
        body = await request.aread()
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not waiting:
                await asyncio.Future[None]()  # the client does not disconnect
            return waiting.pop()

        async def send(message: Message) -> None:
            messages.put_nowait(message)
            await asyncio.sleep(0)  # the answer is read meanwhile

        async def run() -> None:
            try:
                await self._app(scope_of(request), receive, send)
            finally:
                messages.put_nowait(None)

        task = asyncio.create_task(run(), name="admin API")
        start = await messages.get()
        if start is None:
            await task
            raise RuntimeError("the app has not answered")
        return httpx2.Response(
            start["status"], headers=start["headers"], stream=StreamedAnswer(messages, task)
        )


class StreamedAnswer(httpx2.AsyncByteStream):
    """The body of an answer, part by part."""

    def __init__(self, messages: asyncio.Queue[Message | None], task: asyncio.Task[None]) -> None:
        self._messages = messages
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while message := await self._messages.get():
            yield message.get("body", b"")
        await self._task

    async def aclose(self) -> None:
        """End what still makes the answer."""
        self._task.cancel()
        await asyncio.wait([self._task])


def scope_of(request: httpx2.Request) -> Scope:
    """Return the ASGI scope of a request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": request.url.raw_path.partition(b"?")[0],
        "query_string": request.url.query,
        "server": (request.url.host, request.url.port),
        "client": None,
        "root_path": "",
    }
