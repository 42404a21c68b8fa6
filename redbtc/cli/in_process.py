"""Requests to an ASGI app in the same process. (The transport of httpx2 keeps an answer until all
of it is made; an export can have gigabytes.)"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx2

Call = Callable[..., Awaitable[None]]  # an ASGI app
MAX_UNREAD_PARTS = 4  # parts of an answer that are made and not yet read


class InProcess(httpx2.AsyncBaseTransport):
    """A transport to an app. It reads an answer while that is made."""

    def __init__(self, app: Call) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        messages: asyncio.Queue[MutableMapping[str, Any]] = asyncio.Queue(MAX_UNREAD_PARTS)
        task = asyncio.create_task(self._answer(request, await request.aread(), messages))
        try:
            start = await messages.get()
            if start["type"] != "http.response.start":
                await task  # raises what the app has failed with
        except BaseException:
            task.cancel()
            raise
        return httpx2.Response(
            start["status"], headers=start["headers"], stream=AnswerStream(messages, task)
        )

    async def _answer(
        self,
        request: httpx2.Request,
        body: bytes,
        messages: asyncio.Queue[MutableMapping[str, Any]],
    ) -> None:
        """Run the app. Its last message is followed by one without a body, also if it fails."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "scheme": request.url.scheme,
            "path": request.url.path,
            "raw_path": request.url.raw_path.split(b"?")[0],
            "query_string": request.url.query,
            "server": (request.url.host, request.url.port),
            "client": ("127.0.0.1", 0),
            "root_path": "",
        }
        whole = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> MutableMapping[str, Any]:
            if message := next(whole, None):
                return message
            await asyncio.Event().wait()  # the client stays until it has the answer
            raise AssertionError("it waits for ever")

        try:
            await self._app(scope, receive, messages.put)
        finally:
            await messages.put({"type": "end"})


class AnswerStream(httpx2.AsyncByteStream):
    """The body of an answer that `task` makes."""

    def __init__(
        self, messages: asyncio.Queue[MutableMapping[str, Any]], task: asyncio.Task[None]
    ) -> None:
        self._messages = messages
        self._task = task

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get())["type"] == "http.response.body":
            if body := message.get("body"):
                yield body
        await self._task

    async def aclose(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
