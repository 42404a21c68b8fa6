"""The uptime of the last 90 days, from what the gateway has measured and what was announced.

Each minute is a byte: `.` no data, `+` up, `p` planned, and others for why it was down. So ranges
are counted and searched by C code, and 90 days take 130 KB.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

from msgspec import Struct
from msgspec.structs import asdict

from redbtc.billing.billing import Billing
from redbtc.billing.notices import PlannedTime
from redbtc.store.json_values import Moment, json_time
from redbtc.store.uptime import KEPT_DAYS, UptimePeriod, read_periods
from redbtc.times import DAY, MINUTE, day_of

WRITTEN_AFTER = 5000  # milliseconds after its end, a minute is in the ledger
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
DOWN_OR_PLANNED = re.compile(rb"p+|s+|l+|u+|d+|m+")
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


class UptimeTotals(Struct):
    """The uptime in whole minutes, up to `until`. `since` is when the gateway began to measure it,
    or 90 days ago if that is later; null if it has not yet measured a whole minute."""

    since: Moment | None
    until: Moment
    last_24_hours: UptimeSums
    last_7_days: UptimeSums
    last_30_days: UptimeSums
    last_90_days: UptimeSums


class UptimeShown(UptimeTotals):
    """The uptime by day as well. `days` are the last 90, oldest first. `outages` are the last 100
    in them, newest first, the planned ones included."""

    days: list[UptimeOfDay]
    outages: list[MinutesOfState]


class UptimeMinutes:
    """The minutes of the last 90 days until `until`, which is the start of the running minute."""

    def __init__(self, now: int) -> None:
        """Begin without data. `now` is the ledger's time in milliseconds, as are all times here."""
        self.until = now - now % MINUTE
        self.since: int | None = None  # the beginning of the measurement
        self._first = self.until - KEPT_DAYS * DAY
        self._marks = bytearray(b"." * (KEPT_DAYS * DAY // MINUTE))

    def add(self, period: UptimePeriod) -> None:
        """Add a measured period. They are added in their order."""
        if self.since is None:
            self.since = max(period.began_at, self._first)
            self._mark(self.since, self.until, b"s")
        self._mark(period.began_at, period.ended_at, MARK_OF_STATE.get(period.state, b"."))

    def plan(self, time: PlannedTime) -> None:
        """Let minutes of which any part was announced as maintenance count as planned, if the
        gateway was down. All measured periods were added before."""
        within = slice(self._place(time.since), self._place(time.until + MINUTE - 1))
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
            minutes_from(first + each.start() * MINUTE, each[0])
            for each in SAME_MARKS.finditer(self._between(since, until))
        ]

    def _outages(self) -> Iterator[MinutesOfState]:
        """Yield the times in which the gateway was down or in planned maintenance, newest first."""
        for each in DOWN_OR_PLANNED.finditer(self._marks[::-1]):
            yield minutes_from(self.until - each.end() * MINUTE, each[0])

    def totals(self) -> UptimeTotals:
        """Return the sums of the last minutes."""
        return UptimeTotals(
            since=None if self.since is None else json_time(self.since),
            until=json_time(self.until),
            last_24_hours=self._last(DAY),
            last_7_days=self._last(7 * DAY),
            last_30_days=self._last(30 * DAY),
            last_90_days=self._last(90 * DAY),
        )

    def shown(self) -> UptimeShown:
        """Return all that is shown of the uptime."""
        return UptimeShown(
            **asdict(self.totals()),
            days=[sums for _, sums in self.days()],
            outages=list(islice(self._outages(), MAX_OUTAGES)),
        )


def minutes_from(began: int, marks: bytes) -> MinutesOfState:
    """Return successive minutes, which all have the same mark."""
    ended = began + len(marks) * MINUTE
    return MinutesOfState(json_time(began), json_time(ended), len(marks), STATE_OF_MARK[marks[0]])


async def read_minutes(
    billing: Billing, checked_at: int | None = None, unwritten: Iterable[UptimePeriod] = ()
) -> UptimeMinutes:
    """Return the minutes of the last 90 days. `checked_at` is when the gateway was checked last,
    and `unwritten` what was measured and may not be in the ledger yet; without them, minutes that
    have just ended are left out. Raises sqlite3.Error."""
    now = billing.store.time()
    minutes = UptimeMinutes(now - WRITTEN_AFTER if checked_at is None else min(checked_at, now))
    async for period in read_periods(billing.store):
        minutes.add(period)
    for period in unwritten:
        minutes.add(period)
    for time in await billing.notices.planned():
        minutes.plan(time)
    return minutes
