"""The request log of a gateway, as its operator reads it."""

from __future__ import annotations

from typing import Any

import httpx2

from tests.helpers.gateway import NO_TLS, PATIENCE_SECONDS, Gateway, wait_until


def read_body(gateway: Gateway, request_id: str, body: str) -> httpx2.Response:
    """Read a stored body as a command does."""
    transport = httpx2.HTTPTransport(verify=NO_TLS, uds=f"{gateway.database}.sock")
    with httpx2.Client(
        transport=transport, base_url="http://gateway", timeout=PATIENCE_SECONDS
    ) as client:
        return client.get(f"/admin/v1/requests/{request_id}/bodies/{body}")


def stored(gateway: Gateway, request_id: str) -> tuple[bytes | None, bytes | None]:
    """Return the stored bodies of a request once it is settled."""
    wait_until(lambda: gateway.row(request_id)["outcome"] != "pending")
    wait_until(lambda: gateway.metrics()["redbtc_in_flight"] == 0)
    answers = [read_body(gateway, request_id, each) for each in ("request", "response")]
    request, response = (each.content if each.status_code == 200 else None for each in answers)
    return request, response


def set_log(gateway: Gateway, account: str, days: int | None, **more: Any) -> Any:
    """Switch request logging on or off (days None)."""
    return gateway.api("PATCH", f"/accounts/{account}/request-log", {"days": days, **more})


def logged_ids(gateway: Gateway) -> set[str]:
    """Return the ids of all requests in the ledger of which something is stored."""
    ids = [row["request_id"] for row in gateway.rows()]
    return {each for each in ids if gateway.api("GET", f"/requests/{each}")["bodies"]}
