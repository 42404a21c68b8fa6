"""The public status of the gateway, for the route /status."""

from __future__ import annotations

import contextlib
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict

from redbtc.admin.uptime_report import MinutesOfState, UptimeMinutes, UptimeOfDay, UptimeShown
from redbtc.billing.billing import Billing
from redbtc.billing.records import Notice
from redbtc.dashboard.uptime_chart import STATE_TEXTS, day_bars, minute_grid
from redbtc.store.json_values import Moment, json_time
from redbtc.store.uptime import KEPT_DAYS
from redbtc.times import DAY


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
    """The JSON object that /status answers with. `past` are the incidents and maintenances that
    ended in the last 90 days, newest first."""

    status: str
    uptime_seconds: int
    incidents: list[PublicNotice]
    notices: list[PublicNotice]
    past: list[PublicNotice]
    uptime: UptimeShown


class StatusOfDay(UptimeOfDay, kw_only=True):
    """The JSON object that /status answers with for a day: its sums and its minutes, oldest
    first."""

    periods: list[MinutesOfState]


MAX_PAST = 50  # notices


async def status_now(
    billing: Billing, uptime: UptimeShown, uptime_seconds: int, can_serve: bool
) -> Status:
    """Return the gateway's status. A database that can't commit is an incident: no request is
    served then. `can_serve`: some upstream can serve requests."""
    notices = [PublicNotice.of(each) for each in await billing.notices.current()]
    time = billing.store.time()
    now, past_since = json_time(time), time - KEPT_DAYS * DAY
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
        past=list(map(PublicNotice.of, await billing.notices.past_events(past_since, MAX_PAST))),
        uptime=uptime,
    )


def status_of_day(minutes: UptimeMinutes, day: str) -> StatusOfDay | None:
    """Return the uptime on a day. Return None if it is not one of the last 90 days."""
    for number, sums in minutes.days():
        if sums.day == day:
            periods = minutes.periods(number * DAY, (number + 1) * DAY)
            return StatusOfDay(**asdict(sums), periods=periods)
    return None


def page_of_status(found: Status) -> dict[str, Any]:
    """Return the variables of the page of the status."""
    maintenance = [each for each in found.notices if each.kind == "maintenance"]
    changes = [each for each in found.notices if each.kind != "maintenance"]
    return {
        "status": found.status,
        "uptime_seconds": found.uptime_seconds,
        "notices": [*found.incidents, *maintenance, *changes],
        "past": found.past,
        "uptime": found.uptime,
        "bars": day_bars(found.uptime.days),
        "states": STATE_TEXTS,
    }


def page_of_day(found: StatusOfDay) -> dict[str, Any]:
    """Return the variables of the page of a day."""
    return {
        "day": found,
        "grid": minute_grid(found.periods),
        "states": STATE_TEXTS,
    }


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
