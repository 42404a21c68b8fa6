"""The public status of the gateway, for the route /status."""

from __future__ import annotations

import contextlib

from msgspec import Struct

from redbtc.billing.billing import Billing
from redbtc.billing.records import Notice
from redbtc.store.json_values import Moment, json_time


class PublicNotice(Struct):
    """The public fields of a notice."""

    id: str
    kind: str
    text: str
    effective_at: Moment
    until: Moment | None
    created_at: Moment

    @classmethod
    def of(cls, notice: Notice) -> PublicNotice:
        """Return the public fields of a notice."""
        return cls(
            id=notice.id,
            kind=notice.kind,
            text=notice.text,
            effective_at=notice.effective_at,
            until=notice.until,
            created_at=notice.created_at,
        )


class Status(Struct):
    """The JSON object that /status answers with."""

    status: str
    uptime_seconds: int
    incidents: list[PublicNotice]
    notices: list[PublicNotice]


async def status(billing: Billing, uptime_seconds: int, can_serve: bool) -> Status:
    """Return the gateway's status. A database that can't commit is an incident: no request is
    served then. `can_serve`: some upstream can serve requests."""
    notices = [PublicNotice.of(each) for each in await billing.notices.current()]
    now = json_time(billing.store.time())
    in_force = {notice.kind for notice in notices if notice.effective_at <= now}
    if not billing.store.healthy:
        in_force.add("incident")
    if not can_serve:
        in_force.add("degraded")
    worst = [kind for kind in ("incident", "maintenance", "degraded") if kind in in_force]
    return Status(
        status=worst[0] if worst else "ok",
        uptime_seconds=uptime_seconds,
        incidents=[notice for notice in notices if notice.kind == "incident"],
        notices=[notice for notice in notices if notice.kind != "incident"],
    )


MAX_ACCEPT = 2000  # characters of an Accept header that are read; a browser's has 150


def prefers_html(accept: str) -> bool:
    """Return whether an Accept header prefers a page to JSON (RFC 9110 §12.5.1)."""
    weights: dict[str, float] = {}
    for entry in accept.lower()[:MAX_ACCEPT].split(","):
        name, *parameters = (part.strip() for part in entry.split(";"))
        quality = [part[2:] for part in parameters if part.startswith("q=")]
        with contextlib.suppress(ValueError):
            weights[name] = float(quality[0]) if quality else 1.0
    return weights.get("text/html", 0) > weights.get("application/json", 0)
