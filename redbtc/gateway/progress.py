"""Save what requests in flight have used so far, in case the process is killed.

A request is saved when it has worked for SAVE_SECONDS, and then whenever it has worked
SAVE_GROWTH times as long as the last time. So a long request is saved a few times, and what a
killed process can lose is a bounded share of what was used.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections.abc import Collection
from typing import Protocol

from redbtc.slices import with_turns
from redbtc.store.database import Store
from redbtc.telemetry import log
from redbtc.usage import RequestRow

SAVE_SECONDS, SAVE_GROWTH = 1.0, 4
# At most this number or this share of the running requests is saved in a second, whichever is
# more: each takes 0.1 ms.
MAX_SAVED, MAX_SAVED_SHARE = 20, 0.05


class Running(Protocol):
    """A request in flight."""

    row: RequestRow

    def growth_since_saved(self, now: float) -> float:
        """Return how long the request has worked, divided by how long it had worked when it was
        saved last. `now` is by the monotonic clock."""

    async def save_progress(self) -> None:
        """Save what the request has used so far."""

    def note_shown(self, response_id: str) -> None:
        """Note that another request was shown a response."""


class RunningInBackground(Protocol):
    """The background responses that have not ended."""

    async def save_progress(self, now: float) -> None:
        """Save what their readers were sent so far. `now` is by the monotonic clock."""


async def save_progress(
    store: Store, running: Collection[Running], background: RunningInBackground
) -> None:
    """Save the progress of requests in flight, for ever."""
    while True:
        await asyncio.sleep(SAVE_SECONDS)
        try:
            if store.healthy:
                await background.save_progress(time.monotonic())
                await save_due_progress(running, time.monotonic())
        except Exception as error:  # that should not happen, and must not end this
            log(logging.ERROR, "progress not saved", error=type(error).__name__)


async def save_due_progress(running: Collection[Running], now: float) -> None:
    """Save the requests that are due, beginning with those of which the smallest part is saved.
    `now` is by the monotonic clock."""
    max_saved = max(MAX_SAVED, round(MAX_SAVED_SHARE * len(running)))
    growth = {each: each.growth_since_saved(now) for each in running}
    due = [each for each, times in growth.items() if times >= SAVE_GROWTH]
    async for each in with_turns(heapq.nlargest(max_saved, due, key=lambda each: growth[each])):
        await each.save_progress()
