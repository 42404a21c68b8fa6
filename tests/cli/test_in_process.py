"""A command on a stopped gateway gets the answer of its own admin API as that is made."""

from __future__ import annotations

import asyncio

import httpx2
import pytest

from redbtc.cli.in_process import InProcess
from redbtc.server.asgi import App, Receive, Scope, Send


def client_of(app: App) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=InProcess(app), base_url="http://gateway")


def test_an_answer_is_read_while_it_is_made() -> None:
    async def run() -> None:
        go_on, ended = asyncio.Event(), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            body = (await receive())["body"]
            told = f"{scope['method']} {scope['path']} {scope['query_string'].decode()} ".encode()
            await send({"type": "http.response.start", "status": 201, "headers": [(b"a", b"b")]})
            await send({"type": "http.response.body", "body": told + body, "more_body": True})
            try:
                await go_on.wait()
                await send({"type": "http.response.body", "body": b"end"})
                await receive()
            finally:
                ended.set()

        async with (
            client_of(app) as client,
            client.stream("POST", "/x?y=z", content=b"!") as answer,
        ):
            assert (answer.status_code, answer.headers["a"]) == (201, "b")
            parts = answer.aiter_raw()
            assert await anext(parts) == b"POST /x y=z !"
            go_on.set()
            assert await anext(parts) == b"end"
        assert ended.is_set(), "it ends with its reader"

    asyncio.run(asyncio.wait_for(run(), 60))


@pytest.mark.parametrize("begins", [True, False])
def test_a_failure_is_raised(begins: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if begins:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("failed")

    async def run() -> None:
        async with client_of(app) as client:
            with pytest.raises(ValueError, match="failed"):
                await client.get("/")

    asyncio.run(run())
