"""Deadlines of requests, by the monotonic clock. One timer serves all of them."""

from __future__ import annotations

import asyncio
import math
from typing import Any

TICK = 0.05  # seconds: how exact timeouts are
MAX_RINGS = 20  # clocks in a turn of the loop: what rings has about 0.1 ms of work to do


class Deadline:
    """How long a request may go on: the timeouts of its steps and of the whole, and what is left
    once the client is gone, are one deadline that moves. Within `with clock.running(...)`, in one
    task, its passing raises TimeoutError."""

    def __init__(self, clocks: Deadlines) -> None:
        self.client_left = False
        self.deadline = math.inf
        self.now = clocks.now
        self._clocks = clocks
        self._last = math.inf
        self._grace = math.inf
        self._cut = False
        self._task: asyncio.Task[Any] | None = None
        self._passed = False

    def running(self, total: float, grace: float = math.inf) -> Deadline:
        """At most `total` seconds, and `grace` from when the client leaves."""
        self._grace = 0 if self._cut else grace
        self.deadline = self._last = self._clocks.now() + total
        return self

    def __enter__(self) -> None:
        self._task = asyncio.current_task(self._clocks.loop)
        self._clocks.add(self)
        if self.client_left:
            self.leave()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        self._clocks.discard(self)
        if self._passed and task:
            self._passed = False
            if task.uncancel() == 0 and error is asyncio.CancelledError:
                raise TimeoutError

    def shorten(self, grace: float) -> None:
        """From now on, at most `grace` seconds from when the client leaves; from now, if it has."""
        if not self._cut:
            self._grace = grace
        if self.client_left:
            self._last = min(self._last, self._clocks.now() + self._grace)

    def allow(self, seconds: float) -> None:
        """The next step may take this long."""
        self.deadline = min(self._last, self._clocks.now() + seconds)

    def pause(self) -> None:
        """What comes now takes as long as it takes, until the next `allow`."""
        self.deadline = math.inf

    def leave(self) -> None:
        """The client is gone."""
        self.client_left = True
        self._last = min(self._last, self._clocks.now() + self._grace)
        if self.deadline < math.inf:
            self.deadline = min(self.deadline, self._last)
            if self._grace == 0:
                self.ring()

    def cut(self) -> None:
        """It must not go on, for its usage neither."""
        self._cut, self._grace = True, 0
        self.leave()

    def ring(self) -> None:
        """The deadline has passed."""
        self.deadline = math.inf
        if self._task:
            self._passed = True
            self._task.cancel()


class Deadlines:
    """All clocks that run. They are looked at together every TICK seconds: a timer for each, moved
    with each byte, would cost more than all limits."""

    def __init__(self) -> None:
        self._running: set[Deadline] = set()
        self._ticking = False
        self.loop = asyncio.get_running_loop()  # to ask for it costs a system call each time
        self.now = self.loop.time
        self.discard = self._running.discard

    def add(self, clock: Deadline) -> None:
        """From now on it may ring."""
        self._running.add(clock)
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        now = self.now()
        due = [clock for clock in self._running if clock.deadline <= now]
        for clock in due[:MAX_RINGS]:
            clock.ring()
        self._ticking = bool(self._running)
        if len(due) > MAX_RINGS:
            self.loop.call_soon(self._tick)
        elif self._ticking:
            self.loop.call_later(TICK, self._tick)
