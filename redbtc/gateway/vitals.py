"""What an operator must know of the ledger and the machine: whether commits succeed and how long
they take, the size of the WAL file, the free space on the disk, the clock, and the event loop's
lag; and what became of the bodies that the request log was given.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from typing import Any, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from redbtc.errors import StorageUnavailable
from redbtc.store.database import Store
from redbtc.store.disk import disk_room
from redbtc.store.health import Health
from redbtc.store.request_log import RequestLog
from redbtc.telemetry import histogram_of, log

WATCH_SECONDS = 1
TICK_SECONDS = 0.1
LAG_SECONDS = 15


class Condition:
    """A condition that is logged once when it begins and once when it ends."""

    def __init__(self, begins: str, ends: str) -> None:
        self.holds = False
        self._events = {True: (logging.WARNING, begins), False: (logging.INFO, ends)}

    def note(self, holds: bool, **fields: Any) -> None:
        """Log if that has changed."""
        if holds != self.holds:
            self.holds = holds
            level, event = self._events[holds]
            log(level, event, **fields)


async def watch_size(store: Store) -> None:
    """Keep the WAL file small, and watch the database's files, for ever."""
    stuck = Condition("WAL file not emptied", "WAL file can be emptied again")
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        store.check_files()
        try:
            if await store.shrink():
                stuck.note(False)
        except StorageUnavailable as error:
            stuck.note(True, reason=str(error))


class Vitals:
    """The metrics of the ledger and of the machine. They are read when somebody asks for them."""

    def __init__(self, store: Store, request_log: RequestLog) -> None:
        self._store = store
        self._request_log = request_log
        self._lag = self._lag_before = 0.0  # the longest in the running period and the one before

    async def watch_loop(self) -> None:
        """Measure how late the event loop calls what is due, for ever."""
        period_ends = time.monotonic() + LAG_SECONDS
        while True:
            due = time.monotonic() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if now > period_ends:
                self._lag, self._lag_before, period_ends = 0.0, self._lag, now + LAG_SECONDS
            self._lag = max(self._lag, now - due)

    def collect(self) -> Iterator[Metric]:
        """Return what prometheus-client asks for whenever the metrics are read."""
        store, commits = self._store, self._store.commits
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield gauge("redbtc_ledger_wal_bytes", "Size of the database's WAL file", store.wal_bytes)
        yield gauge(
            "redbtc_ledger_seconds_since_commit",
            "Time since the ledger's last successful commit",
            time.monotonic() - commits.committed_at,
        )
        yield gauge(
            "redbtc_loop_lag_seconds",
            f"Longest delay of the event loop in the last {LAG_SECONDS} to {2 * LAG_SECONDS} s",
            max(self._lag, self._lag_before),
        )
        yield counter("redbtc_ledger_commits", "Ledger commits", commits.count)
        yield counter("redbtc_ledger_repairs", "Rows closed by another process", commits.repaired)
        yield gauge(
            "redbtc_clock_offset_seconds",
            "System clock minus ledger time",
            store.clock.offset / 1000,
        )
        yield gauge("redbtc_ledger_healthy", "1 while the ledger can commit", store.healthy)
        states = gauge("redbtc_ledger_state", "1 for the state of the ledger", labels=["state"])
        for state in get_args(Health):
            states.add_metric([state], commits.state.health == state)
        yield states
        yield gauge("redbtc_ledger_waiting", "Changes that wait for a commit", commits.waiting)
        yield histogram_of(
            "redbtc_ledger_commit_seconds",
            "Duration of a ledger commit",
            [],
            {(): commits.commit_seconds},
        )
        yield histogram_of(
            "redbtc_ledger_begin_seconds",
            "Time from the start of a request to the commit of its row",
            [],
            {(): commits.begin_seconds},
        )
        yield from self._of_request_log()
        if room := disk_room(store.path):
            yield gauge("redbtc_disk_free_bytes", "Free space on the database's disk", room.free)
            yield gauge("redbtc_disk_total_bytes", "Size of the database's disk", room.total)

    def _of_request_log(self) -> Iterator[Metric]:
        request_log, gauge, counter = self._request_log, GaugeMetricFamily, CounterMetricFamily
        yield counter(
            "redbtc_request_log_requests",
            "Requests of which bodies were stored",
            request_log.written,
        )
        yield counter(
            "redbtc_request_log_dropped",
            "Requests of which a part was not stored, since the log was too slow or failed",
            request_log.dropped,
        )
        yield counter(
            "redbtc_request_log_withheld",
            "Requests of which a body was not stored, since a key or a credential is in it",
            request_log.withheld,
        )
        yield gauge(
            "redbtc_request_log_bytes",
            "Size of request_log.db and its WAL file",
            request_log.file_bytes,
        )
        yield gauge(
            "redbtc_request_log_waiting_bytes",
            "Memory of bodies that are not written yet",
            request_log.waiting_bytes,
        )
