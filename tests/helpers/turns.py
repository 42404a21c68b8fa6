"""Turns of WebSocket sessions, as clients, upstreams and the ledger see them."""

from __future__ import annotations

import json
from typing import Any

from tests.helpers.gateway import Gateway, wait_until
from tests.helpers.upstream import Socket, response_object, ws_events

PRICED = '[billing]\ndefault_credit_limit = "0"'


def code(event: dict[str, Any]) -> str:
    """Return the code of an error event."""
    assert event["type"] == "error"
    return str(event["error"]["code"])


def brief(gateway: Gateway) -> list[tuple[Any, ...]]:
    """Return the ledger in brief once nothing is in flight, in an order of its own."""
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    rows = gateway.rows()
    found = [(row["response_id"], row["outcome"], row["output_tokens"]) for row in rows]
    return sorted(found, key=str)


def done(number: int) -> tuple[Any, ...]:
    """Return how `brief` shows a completed turn."""
    return (f"resp_ws_{number}", "completed", 9)


def steered(number: int) -> dict[str, Any]:
    """Return the event that ends a steered turn."""
    response = response_object("gpt-up", status="incomplete", id=f"resp_ws_{number}")
    response["incomplete_details"] = {"reason": "steered"}
    return {"type": "response.incomplete", "response": response}


def steer(number: int, **more: Any) -> str:
    """Return a client's message that steers a turn."""
    frame = {"type": "response.steer", "previous_response_id": f"resp_ws_{number}"}
    return json.dumps({**frame, "input": "more", **more})


async def steering(sock: Socket) -> None:
    """Answer as an upstream whose response ends with each input, and is followed by another."""
    number = 1
    await sock.send(*ws_events(number, await sock.recv())[:2])
    while True:
        await sock.recv()
        await sock.send(steered(number))
        number += 1
        await sock.send(*ws_events(number, {"model": "gpt-up"})[:2])
