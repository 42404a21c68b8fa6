"""The ledger's own time: the wall clock, unless that jumps.

The wall clock can jump, by a mistake or after its battery died. Entries that are written meanwhile
would count in another month for good, so a jump is not believed until it has lasted for a while.
Time is also measured by a clock that nobody sets, which keeps running while a laptop sleeps if the
system has such a clock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence

from redbtc.errors import UserError
from redbtc.times import iso_time

ELAPSED = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
MAX_JUMP = 3_600_000_000_000  # ns; a longer one is not believed at once
BELIEVED_AFTER = 600_000_000_000  # ns for which a jump has to last
MAX_BEHIND = 86_400_000  # ms that the wall clock may be behind the ledger at the start
MS = 1_000_000  # ns
CLOCK_CHECK_SECONDS = 0.25


class LedgerClock:
    """The ledger's time in milliseconds. It never goes back, except by `set_back`.

    The offset, which is the difference between the wall clock and the monotonic clock, changes only
    when the wall clock is set. The time follows offsets that are at most MAX_JUMP from the offset
    that is believed. At any other offset, the time goes on by the monotonic clock until the offset
    has stayed there for BELIEVED_AFTER. Then the new offset is the one that is believed.
    """

    def __init__(self) -> None:
        self._believed_after = BELIEVED_AFTER
        self._latest = 0  # ms
        elapsed = time.clock_gettime_ns(ELAPSED)
        self._followed = time.time_ns() - elapsed  # the offset by which the time goes
        self._believe(self._followed, elapsed)

    def _believe(self, offset: int, elapsed: int) -> None:
        self._believed = offset
        self._watch(offset, elapsed)

    def _watch(self, offset: int, elapsed: int) -> None:
        """Begin to watch whether the clock stays near `offset` for long enough to believe it."""
        self._watched, self._judged_at = offset, elapsed + self._believed_after
        self._lowest = max(offset, self._believed) - MAX_JUMP
        self._highest = min(offset, self._believed) + MAX_JUMP

    def now(self) -> int:
        """Return the time in milliseconds. Called several times a request."""
        elapsed = time.clock_gettime_ns(ELAPSED)
        offset = time.time_ns() - elapsed
        if elapsed >= self._judged_at or not self._lowest <= offset <= self._highest:
            self._judge(offset, elapsed)
        else:
            self._followed = offset
        now = (elapsed + self._followed) // MS
        if now > self._latest:
            self._latest = now
        return self._latest

    def _judge(self, offset: int, elapsed: int) -> None:
        """Follow the offset if it is near the one that is believed."""
        if abs(offset - self._watched) > MAX_JUMP:
            self._watch(offset, elapsed)
        if elapsed >= self._judged_at:
            self._believed = self._watched
            self._watch(offset, elapsed)
        if abs(offset - self._believed) <= MAX_JUMP:
            self._followed = offset

    @property
    def jump(self) -> int:
        """Return by how much the wall clock has jumped, in milliseconds, 0 if it is believed."""
        self.now()
        jump = time.time_ns() - time.clock_gettime_ns(ELAPSED) - self._believed
        return jump // MS if abs(jump) > MAX_JUMP else 0

    @property
    def offset(self) -> int:
        """Return the wall clock minus the ledger's time, in milliseconds."""
        return time.time_ns() // MS - self.now()

    def go_on_from(self, latest: int) -> None:
        """Let the time not be earlier than `latest`, the latest time in the ledger at the start."""
        self._latest = max(self._latest, latest)

    def start(self, *, accept: bool) -> None:
        """Begin to date the entries of a gateway. With `accept`, the wall clock is believed from
        now on, even if it jumps. Otherwise raises UserError if it is more than MAX_BEHIND behind
        the ledger."""
        behind = -self.offset
        if accept:
            self._believed_after = self._judged_at = 0
        elif behind > MAX_BEHIND:
            raise UserError(
                f"the clock says {iso_time(self._latest - behind)}, but the ledger's latest entry "
                f"is from {iso_time(self._latest)}, more than a day later. If the clock is wrong, "
                "correct it and start again. If the ledger is wrong, repair it with redbtc-proxy "
                "db set-time. (serve --accept-clock starts anyway; ledger time then pauses until "
                "the clock catches up)"
            )

    @property
    def state(self) -> tuple[int, ...]:
        """The values that another process on the same machine needs to go on with the same time."""
        self.now()
        return (self._latest, self._followed, self._believed, self._watched, self._judged_at)

    def go_on_with(self, state: Sequence[int]) -> None:
        """Go on with the time of another process, whose `state` this is."""
        latest, self._followed, believed, watched, judged_at = state
        self._believe(believed, 0)
        self._watch(watched, 0)
        self._judged_at = judged_at
        self.go_on_from(latest)

    def set_back(self, latest: int) -> None:
        """Go on from `latest`, which can be earlier. A wall clock that is behind the ledger's time
        is believed, but not one that has jumped ahead."""
        self.now()
        elapsed = time.clock_gettime_ns(ELAPSED)
        offset = time.time_ns() - elapsed
        if offset < self._followed:
            self._followed = offset
            self._believe(offset, elapsed)
        self._latest = latest


STANDS_STILL = (
    "ledger time pauses until the clock catches up; if the ledger is wrong, repair it with "
    "db set-time"
)


async def watch_clock(clock: LedgerClock, log: Callable[..., None]) -> None:
    """Log when the wall clock jumps, and when the ledger follows it again, once each."""
    jumped = False
    while True:
        if (jump := clock.jump) and not jumped:
            log(
                logging.ERROR,
                "the clock has jumped",
                seconds=jump // 1000,
                reason="the ledger keeps its own time for ten minutes; correct the clock, or "
                "restart with serve --accept-clock if it is right",
            )
        elif jumped and not jump:
            ahead = max(0, -clock.offset // 1000)
            reason = STANDS_STILL if ahead else "the ledger follows the clock again"
            log(
                logging.WARNING,
                "the clock is trusted again",
                ledger_ahead_seconds=ahead,
                reason=reason,
            )
        jumped = bool(jump)
        await asyncio.sleep(CLOCK_CHECK_SECONDS)
