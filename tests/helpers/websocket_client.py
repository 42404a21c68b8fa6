"""A client of the gateway's WebSocket sessions."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.helpers.gateway import PATIENCE_SECONDS, Gateway

CREATE = {"type": "response.create", "model": "gpt-up", "input": "Hi", "stream": True}


class Client:
    """The client's end of a session."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection

    def send(self, **fields: Any) -> None:
        self._connection.send(json.dumps({**CREATE, **fields}))

    def raw(self, message: str | bytes) -> None:
        self._connection.send(message)

    def recv(self, seconds: float = PATIENCE_SECONDS) -> dict[str, Any]:
        event: dict[str, Any] = json.loads(self.recv_text(seconds))
        return event

    def recv_text(self, seconds: float = PATIENCE_SECONDS) -> str:
        """Return the next event as it came."""
        return str(self._connection.recv(timeout=seconds))

    def until(self, *kinds: str) -> dict[str, Any]:
        """The first event of one of these types."""
        while True:
            event = self.recv()
            if event["type"] in kinds:
                return event

    def completed(self) -> dict[str, Any]:
        event = self.until("response.completed", "error")
        assert event["type"] == "response.completed", event
        response: dict[str, Any] = event["response"]
        return response

    def closed(self) -> int | None:
        """The code with which the connection ended."""
        try:
            while True:
                self.recv()
        except ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd else None

    def ping(self) -> bool:
        return self._connection.ping().wait(PATIENCE_SECONDS)

    def tear(self) -> None:
        self._connection.socket.close()


@contextlib.contextmanager
def client(gateway: Gateway, key: str, **headers: str) -> Iterator[Client]:
    with opened(gateway, {"authorization": f"Bearer {key}", **headers}) as connected:
        yield connected


@contextlib.contextmanager
def opened(
    gateway: Gateway, headers: dict[str, str], seconds: float = PATIENCE_SECONDS
) -> Iterator[Client]:
    """Open a session, whose handshake the gateway must answer within `seconds`."""
    with connect(
        f"ws://127.0.0.1:{gateway.port}/v1/responses",
        additional_headers=headers,
        proxy=None,
        max_size=None,
        open_timeout=seconds,
        close_timeout=seconds / 10,
    ) as connection:
        yield Client(connection)
