"""The uptime of the last 90 days, from what the gateway has measured and what was announced.

Each minute is a byte: `.` no data, `+` up, `p` planned, and others for why it was down. So ranges
are counted and searched by C code, and 90 days take 130 KB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Literal

from msgspec import Struct
from msgspec.structs import asdict

from redbtc.billing.billing import Billing
from redbtc.billing.notices import PlannedTime
from redbtc.store.json_values import Moment, json_time
from redbtc.store.uptime import KEPT_DAYS, UptimePeriod, read_periods
from redbtc.times import DAY, MINUTE, day_of

MAX_OUTAGES = 100  # that are listed
MinuteState = Literal[
    "up", "no_data", "planned", "stopped", "ledger", "upstreams", "draining", "maintenance"
]
STATE_OF_MARK: dict[int, MinuteState] = {
    ord("+"): "up",
    ord("."): "no_data",
    ord("p"): "planned",
    ord("s"): "stopped",
    ord("l"): "ledger",
    ord("u"): "upstreams",
    ord("d"): "draining",
    ord("m"): "maintenance",
}
MARK_OF_STATE: dict[str, bytes] = {state: bytes([mark]) for mark, state in STATE_OF_MARK.items()}
SAME_MARKS = re.compile(rb"\++|\.+|p+|s+|l+|u+|d+|m+")
DOWN_MARKS = b"sludm"
TO_PLANNED = bytes.maketrans(DOWN_MARKS, b"p" * len(DOWN_MARKS))


class UptimeSums(Struct):
    """Minutes by what they were, and the percentage of minutes up among those up and down, rounded
    down to three decimals. It is null if there is neither."""

    up_minutes: int
    down_minutes: int
    planned_minutes: int
    no_data_minutes: int
    percent: float | None

    @classmethod
    def of(cls, marks: bytes) -> UptimeSums:
        """Return the sums of minutes."""
        up, planned, no_data = (marks.count(each) for each in (b"+", b"p", b"."))
        down = len(marks) - up - planned - no_data
        measured = up + down
        percent = up * 100_000 // measured / 1000 if measured else None
        return cls(up, down, planned, no_data, percent)


class UptimeOfDay(UptimeSums, kw_only=True):
    """The sums of a day (UTC), of the present one as far as its minutes are over."""

    day: str


class MinutesOfState(Struct):
    """Successive minutes of one state: `planned` or, if the gateway was down, the reason."""

    began_at: Moment
    ended_at: Moment
    minutes: int
    state: MinuteState


class UptimeShown(Struct):
    """The uptime in whole minutes, up to `until`. `since` is when the gateway began to measure it,
    null if it has not yet measured a whole minute. `days` are the last 90, oldest first. `outages`
    are the last 100 in them, newest first, the planned ones included."""

    since: Moment | None
    until: Moment
    last_24_hours: UptimeSums
    last_7_days: UptimeSums
    last_30_days: UptimeSums
    last_90_days: UptimeSums
    days: list[UptimeOfDay]
    outages: list[MinutesOfState]


class UptimeMinutes:
    """The minutes of the last 90 days until `until`, which is the start of the running minute."""

    def __init__(
        self, periods: Iterable[UptimePeriod], planned: Iterable[PlannedTime], now: int
    ) -> None:
        """`periods` are in their order, `planned` are the maintenances that were announced. Times
        are in milliseconds of the ledger's time."""
        self.until = now - now % MINUTE
        self.since: int | None = None  # the beginning of the measurement
        self._first = self.until - KEPT_DAYS * DAY
        self._marks = bytearray(b"." * (KEPT_DAYS * DAY // MINUTE))
        for began, ended, state in periods:
            if self.since is None:
                self.since = max(began, self._first)
                self._mark(self.since, self.until, b"s")
            self._mark(began, ended, MARK_OF_STATE.get(state, b"."))
        for since, until in planned:  # a minute of which any part was announced is planned
            within = slice(self._place(since), self._place(until + MINUTE - 1))
            self._marks[within] = self._marks[within].translate(TO_PLANNED)

    def _place(self, at: int) -> int:
        """Return the number of the minute of a time, the nearest one if it is out of range."""
        return min(max(0, at - self._first), self.until - self._first) // MINUTE

    def _mark(self, since: int, until: int, mark: bytes) -> None:
        begin, end = self._place(since), self._place(until)
        self._marks[begin:end] = mark * (end - begin)

    def _between(self, since: int, until: int) -> bytes:
        return bytes(self._marks[self._place(since) : self._place(until)])

    def _last(self, milliseconds: int) -> UptimeSums:
        return UptimeSums.of(self._between(self.until - milliseconds, self.until))

    def days(self) -> Iterator[tuple[int, UptimeOfDay]]:
        """Yield the last 90 days (UTC), oldest first: the number since 1970, and the sums."""
        today = self.until // DAY
        for day in range(today - KEPT_DAYS + 1, today + 1):
            sums = UptimeSums.of(self._between(day * DAY, (day + 1) * DAY))
            yield day, UptimeOfDay(**asdict(sums), day=day_of(day))

    def periods(self, since: int, until: int) -> list[MinutesOfState]:
        """Return the successive minutes of each state in a time, oldest first."""
        first = self._first + self._place(since) * MINUTE
        return [
            MinutesOfState(
                began_at=json_time(first + each.start() * MINUTE),
                ended_at=json_time(first + each.end() * MINUTE),
                minutes=len(each[0]),
                state=STATE_OF_MARK[each[0][0]],
            )
            for each in SAME_MARKS.finditer(self._between(since, until))
        ]

    def shown(self) -> UptimeShown:
        """Return the uptime as it is shown."""
        periods = self.periods(self._first, self.until)
        outages = [each for each in periods if each.state not in ("up", "no_data")]
        return UptimeShown(
            since=None if self.since is None else json_time(self.since),
            until=json_time(self.until),
            last_24_hours=self._last(DAY),
            last_7_days=self._last(7 * DAY),
            last_30_days=self._last(30 * DAY),
            last_90_days=self._last(90 * DAY),
            days=[sums for _, sums in self.days()],
            outages=outages[: -MAX_OUTAGES - 1 : -1],
        )


async def read_minutes(billing: Billing) -> UptimeMinutes:
    """Return the minutes of the last 90 days. Raises sqlite3.Error."""
    periods, planned = await read_periods(billing.store), await billing.notices.planned()
    return UptimeMinutes(periods, planned, billing.store.time())
