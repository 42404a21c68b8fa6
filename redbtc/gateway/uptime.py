"""Measure the uptime: once a second, whether the gateway could serve a request.

A minute has the worst state that any check in it has found. It is written once it is over, with the
next commit, so that kill -9 loses the running minute at most. Successive minutes of the same state
are one row, which becomes longer, and requests write nothing.

A minute is left out, which means that it was down, if the process was not there for a part of it,
as in the minute of a start, or stood still for longer than MAX_UNCHECKED. A process that takes over
from another one without a gap goes on from the other's last check (`UptimeMeter.handover`).

The minutes are those of the ledger's time. How much time has passed is also measured by a clock
that nobody sets, so that a clock which is set forward makes no uptime: the minutes that it skips
are `unknown`. While the ledger's time stands still, since the clock was set back, the running
minute goes on.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import NamedTuple, get_args

from redbtc.gateway.gateway import Gateway
from redbtc.store.clock import ELAPSED
from redbtc.store.uptime import UptimePeriod, UptimeState, period_statement
from redbtc.times import MINUTE

CHECK_SECONDS = 1.0
MAX_UNCHECKED = 10_000  # milliseconds between two checks
MAX_UNWRITTEN = 1000  # periods, while the ledger can't commit; the oldest then count as down
SEVERITY: dict[UptimeState, int] = {
    state: number for number, state in enumerate(get_args(UptimeState))
}


class UptimeCheck(NamedTuple):
    """A check: when it was, by the ledger's time and by the clock that nobody sets, both in
    milliseconds, and the worst state of its minute until then."""

    at: int
    elapsed: int
    worst: UptimeState


class UptimeMeter:
    """The minutes that are over, as periods to write, and the state of the running one. No I/O."""

    def __init__(self) -> None:
        self.unwritten: dict[int, UptimePeriod] = {}  # by their beginning
        self._last: UptimeCheck | None = None
        self._period: UptimePeriod | None = None  # that ends where the running minute begins

    @property
    def handover(self) -> UptimeCheck | None:
        """The last check, for the process that takes over. None if there was none."""
        return self._last

    def check(self, at: int, elapsed: int, state: UptimeState) -> None:
        """Note the state of the gateway. `at` and `elapsed` are as in UptimeCheck."""
        last = self._last
        if last is None:
            worst: UptimeState = "stopped"  # before, in this minute
        elif at < last.at:
            worst = "unknown"
            self._set_back(at)
        else:
            between = state_between(last, at, elapsed)
            worst = worse(last.worst, between)
            ended, began = last.at - last.at % MINUTE, at - at % MINUTE
            if ended < began:
                self._end_minutes(ended, ended + MINUTE, worst)
                self._end_minutes(ended + MINUTE, began, between)
                worst = between
        self._last = UptimeCheck(at, elapsed, worse(worst, state))

    def go_on_from(self, last: UptimeCheck | None) -> None:
        """Go on from the last check of the process from which this one takes over without a
        gap."""
        self._last = last

    def forget(self, written: Mapping[int, UptimePeriod]) -> None:
        """Forget periods that are in the ledger, unless they have become longer since."""
        for began, period in written.items():
            if self.unwritten.get(began) == period:
                del self.unwritten[began]

    def _end_minutes(self, began: int, ended: int, state: UptimeState) -> None:
        """Note the state of minutes that are over."""
        if began == ended:
            return
        if state == "stopped":
            self._period = None
            return
        before = self._period
        if before and before.ended_at == began and before.state == state:
            began = before.began_at
        self._period = self.unwritten[began] = UptimePeriod(began, ended, state)
        if len(self.unwritten) > MAX_UNWRITTEN:
            del self.unwritten[next(iter(self.unwritten))]

    def _set_back(self, at: int) -> None:
        """Forget what is dated later than `at`: the ledger's time was set back."""
        self._period = None
        kept = [each for each in self.unwritten.values() if each.began_at <= at]
        self.unwritten = {
            each.began_at: each._replace(ended_at=min(each.ended_at, at)) for each in kept
        }


def state_between(last: UptimeCheck, at: int, elapsed: int) -> UptimeState:
    """Return the state of the time between two checks."""
    measured = elapsed - last.elapsed
    if measured > MAX_UNCHECKED:
        return "stopped"
    return "unknown" if at - last.at - measured > MAX_UNCHECKED else "up"


def worse(one: UptimeState, other: UptimeState) -> UptimeState:
    """Return the worse of two states."""
    return max(one, other, key=SEVERITY.__getitem__)


class UptimeWatch:
    """Checks the gateway and writes its uptime."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._writing: asyncio.Future[None] | None = None  # done once `_written` are committed
        self._written: dict[int, UptimePeriod] = {}
        self.meter = UptimeMeter()

    async def check_for_ever(self) -> None:
        """Check the gateway every second, and write each minute once it is over."""
        while True:
            self._check()
            await asyncio.sleep(CHECK_SECONDS)

    def _check(self) -> None:
        store, meter = self._gateway.store, self.meter
        elapsed = time.clock_gettime_ns(ELAPSED) // 1_000_000
        meter.check(store.time(), elapsed, serving_state(self._gateway))
        if self._writing and self._writing.done():
            meter.forget(self._written)
            self._writing = None
        # One commit is waited for, so that a ledger that fails piles up nothing.
        if meter.unwritten and store.healthy and self._writing is None:
            self._written = dict(meter.unwritten)
            for period in self._written.values():
                sql, values = period_statement(period)
                self._writing = store.record(sql, values, retry_until_written=True, durable=False)


def serving_state(gateway: Gateway) -> UptimeState:
    """Return whether a request would be served now, by what the gateway knows, or why not."""
    if not gateway.store.healthy:
        return "ledger"
    if not gateway.upstreams.can_serve():
        return "upstreams"
    if gateway.draining:
        return "draining"
    return "maintenance" if gateway.billing.notices.maintenance() else "up"
