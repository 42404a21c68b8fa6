"""The route /status: how the gateway is now, and its uptime.

Answers are kept for some seconds, so that many readers cost no more than few. A notice that is
added or withdrawn, and a change of what the gateway can serve, are shown at once.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from typing import Any, NamedTuple

import msgspec
from starlette.datastructures import QueryParams

from redbtc.admin.uptime_report import UptimeMinutes, read_minutes
from redbtc.dashboard.lazy import LazyDashboard
from redbtc.dashboard.sessions import PAGE_HEADERS
from redbtc.dashboard.status import (
    Status,
    page_of_day,
    page_of_status,
    prefers_html,
    status_now,
    status_of_day,
)
from redbtc.errors import StorageUnavailable
from redbtc.gateway.gateway import Gateway
from redbtc.gateway.uptime import UptimeMeter
from redbtc.headers import Headers, header
from redbtc.refusals import Refusal
from redbtc.server.asgi import Receive, Scope, Send, request_of, respond
from redbtc.store.uptime import KEPT_DAYS
from redbtc.times import DAY, day_of

ANSWER_SECONDS = 5.0
MAX_ANSWERS = 200  # answers: each of 90 days, as JSON and as a page, and the present
MAX_STATUS_QUERY = 500  # bytes
UNKNOWN_DAY = "unknown"
NO_SUCH_DAY = "day must be one of the last 90 days (UTC), such as 2026-11-29"
STATUS_PAGE, STATUS_JSON = b"text/html; charset=utf-8", b"application/json"


class StatusAnswer(NamedTuple):
    """An answer that is kept: until when, and the conditions for which it is true."""

    until: float
    conditions: object
    code: int
    body: bytes


class StatusRoute:
    """The app of the route."""

    def __init__(self, gateway: Gateway, dashboard: LazyDashboard, meter: UptimeMeter) -> None:
        self._gateway = gateway
        self._meter = meter
        self._dashboard = dashboard
        self._kept: dict[tuple[bool, str], StatusAnswer] = {}
        self._minutes: tuple[float, object, UptimeMinutes] | None = None
        self._making = asyncio.Lock()  # callers who ask at the same time share one answer

    async def __call__(self, scope: Scope, _: Receive, send: Send) -> None:
        """Answer to everybody whether the gateway works, with the notices for all accounts and the
        uptime, or with the uptime on one day, as JSON or as a page. Raises Refusal."""
        request = request_of(scope)
        request.route = "/status"
        accept = header(scope["headers"], b"accept") or b""
        as_page = prefers_html(accept.decode("latin-1"))
        day = self._day(QueryParams(scope["query_string"][:MAX_STATUS_QUERY]).get("day", ""))
        if day == UNKNOWN_DAY and not as_page:
            raise Refusal("invalid_request", NO_SUCH_DAY, param="day")
        try:
            answer = await self._answer(as_page, day)
        except (sqlite3.Error, StorageUnavailable):
            raise Refusal("ledger_unavailable") from None
        headers: Headers = []
        if as_page:
            headers = [(name.encode(), value.encode()) for name, value in PAGE_HEADERS.items()]
        content_type = STATUS_PAGE if as_page else STATUS_JSON
        await respond(request, send, answer.code, answer.body, headers, content_type)

    def _day(self, asked: str) -> str:
        """Return the day that is asked for, "" for none, and the same word for all days that are
        not known, so that they share an answer."""
        if not asked:
            return ""
        today = self._gateway.store.time() // DAY
        return asked if asked in map(day_of, range(today, today - KEPT_DAYS, -1)) else UNKNOWN_DAY

    async def _answer(self, as_page: bool, day: str) -> StatusAnswer:
        if found := self._fresh(as_page, day):
            return found
        async with self._making:
            if found := self._fresh(as_page, day):
                return found
            conditions = self._conditions()
            code, body = await (self._page(day) if as_page else self._json(day))
            answer = StatusAnswer(time.monotonic() + ANSWER_SECONDS, conditions, code, body)
            while len(self._kept) >= MAX_ANSWERS:
                del self._kept[next(iter(self._kept))]
            self._kept[as_page, day] = answer
            return answer

    def _fresh(self, as_page: bool, day: str) -> StatusAnswer | None:
        """Return the answer that is kept, None if it is old or not true any more."""
        found = self._kept.get((as_page, day))
        if found is None or time.monotonic() > found.until:
            return None
        return found if found.conditions == self._conditions() else None

    def _conditions(self) -> object:
        """Return what an answer depends on and what can change at any time."""
        gateway = self._gateway
        return (
            gateway.store.healthy,
            gateway.upstreams.can_serve(),
            gateway.billing.notices.version,
            tuple(gateway.billing.documents.names()),
        )

    async def _read_minutes(self) -> UptimeMinutes:
        now, version = time.monotonic(), self._gateway.billing.notices.version
        if self._minutes is None or now > self._minutes[0] or version != self._minutes[1]:
            last, unwritten = self._meter.handover, list(self._meter.unwritten.values())
            billing = self._gateway.billing
            minutes = await read_minutes(billing, last.at if last else None, unwritten)
            self._minutes = now + ANSWER_SECONDS, version, minutes
        return self._minutes[2]

    async def _json(self, day: str) -> tuple[int, bytes]:
        minutes = await self._read_minutes()
        if not day:
            return 200, msgspec.json.encode(await self._status(minutes))
        found = status_of_day(minutes, day)
        if found is None:
            raise Refusal("invalid_request", NO_SUCH_DAY, param="day")
        return 200, msgspec.json.encode(found)

    async def _page(self, day: str) -> tuple[int, bytes]:
        minutes = await self._read_minutes()
        if not day:
            variables = page_of_status(await self._status(minutes))
            return 200, await self._rendered("status.html", variables)
        if found := status_of_day(minutes, day):
            return 200, await self._rendered("status_day.html", page_of_day(found))
        problem = {"code": 404, "problem": "The uptime of this day is not known."}
        return 404, await self._rendered("error.html", problem)

    async def _status(self, minutes: UptimeMinutes) -> Status:
        gateway = self._gateway
        seconds = round(time.monotonic() - gateway.started)
        can_serve = gateway.upstreams.can_serve()
        return await status_now(gateway.billing, minutes.shown(), seconds, can_serve)

    async def _rendered(self, template: str, variables: dict[str, Any]) -> bytes:
        page = await self._dashboard.render(template, variables)
        return bytes(page.body)
