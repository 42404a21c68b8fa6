"""Deadlines of requests, by the monotonic clock. One timer serves all of them."""

from __future__ import annotations

import asyncio
import math
from typing import Any

TICK = 0.05  # seconds: how exact timeouts are
MAX_EXPIRED = 20  # deadlines in a turn of the loop: an expired request takes about 0.1 ms to end


class Deadline:
    """The time until which a request may go on. The timeouts of its steps, that of the whole, and
    the time that is left once the client has disconnected are one deadline that moves. If it passes
    within `with deadline.running(...)`, which must be entered and left by one task, that raises
    TimeoutError."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.client_left = False
        self.expires_at = math.inf
        self.now = deadlines.now
        self._deadlines = deadlines
        self._last = math.inf  # no step may move the deadline beyond this time
        self._grace = math.inf
        self._max_grace: float | None = None  # once it is aborted
        self.abort_grace = 0.0  # seconds that are left if it is aborted, except at the process' end
        self._task: asyncio.Task[Any] | None = None
        self._expired = False

    def running(self, total: float, grace: float = math.inf) -> Deadline:
        """Set the deadline to `total` seconds from now, or `grace` seconds from when the client
        disconnects, if that is earlier; return it, for `with`."""
        self._grace = grace if self._max_grace is None else min(grace, self._max_grace)
        self.expires_at = self._last = self._deadlines.now() + total
        return self

    def __enter__(self) -> None:
        self._task = asyncio.current_task(self._deadlines.loop)
        self._deadlines.add(self)
        if self.client_left:
            self.on_client_disconnect()

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        task, self._task = self._task, None
        self._deadlines.discard(self)
        if self._expired and task:
            self._expired = False
            if task.uncancel() == 0 and error is asyncio.CancelledError:
                raise TimeoutError

    @property
    def total_is_over(self) -> bool:
        """Return whether the time of the whole is over."""
        return self._deadlines.now() >= self._last

    def shorten(self, grace: float) -> None:
        """Leave at most `grace` seconds from when the client disconnects, or from now if it has
        disconnected already."""
        self._grace = grace if self._max_grace is None else min(grace, self._max_grace)
        if self.client_left:
            self._last = min(self._last, self._deadlines.now() + self._grace)

    def allow(self, seconds: float) -> None:
        """Give the next step at most `seconds` seconds."""
        self.expires_at = min(self._last, self._deadlines.now() + seconds)

    def pause(self) -> None:
        """Let the next step take any time: stop the deadline until `allow` is called."""
        self.expires_at = math.inf

    def on_client_disconnect(self) -> None:
        """Leave only the grace period. If that is 0, end the work now."""
        self.client_left = True
        self._last = min(self._last, self._deadlines.now() + self._grace)
        if self.expires_at < math.inf:
            self.expires_at = min(self.expires_at, self._last)
            if self._grace == 0:
                self.expire()

    def abort(self, grace: float = 0.0) -> None:
        """End the work now, without a grace period in which its usage could be read, or with one of
        at most `grace` seconds."""
        self._max_grace, self._grace = grace, min(self._grace, grace)
        self.on_client_disconnect()

    def expire(self) -> None:
        """Cancel the task that runs within `with`, which then raises TimeoutError."""
        self.expires_at = math.inf
        if self._task:
            self._expired = True
            self._task.cancel()


class Deadlines:
    """The set of running deadlines. They are checked together every TICK seconds: a timer for each,
    moved with each byte, would cost more than all limits."""

    def __init__(self) -> None:
        self._running: set[Deadline] = set()
        self._ticking = False
        self.loop = asyncio.get_running_loop()  # to ask for it costs a system call each time
        self.now = self.loop.time
        self.discard = self._running.discard

    def add(self, deadline: Deadline) -> None:
        """Check this deadline from now on."""
        self._running.add(deadline)
        if not self._ticking:
            self._ticking = True
            self.loop.call_later(TICK, self._tick)

    def _tick(self) -> None:
        now = self.now()
        due = [each for each in self._running if each.expires_at <= now]
        for deadline in due[:MAX_EXPIRED]:
            deadline.expire()
        self._ticking = bool(self._running)
        if len(due) > MAX_EXPIRED:
            self.loop.call_soon(self._tick)
        elif self._ticking:
            self.loop.call_later(TICK, self._tick)
