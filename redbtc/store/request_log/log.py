"""The request log, as the event loop uses it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from redbtc.config import Settings
from redbtc.errors import StorageUnavailable
from redbtc.store.failures import LogFunction, no_log
from redbtc.store.keys import Key
from redbtc.store.request_log.erasing import erase_all_of, purge_log, shorten_life
from redbtc.store.request_log.file import LogFile
from redbtc.store.request_log.jobs import Job, Work
from redbtc.store.request_log.reading import (
    count_of_account,
    ids_of_account,
    logged_among,
    read_request,
)
from redbtc.store.request_log.recording import PartQueue, Recording
from redbtc.store.request_log.results import LoggedCount, LoggedRequest, Purged
from redbtc.store.request_log.worker import Worker
from redbtc.store.schema import REQUEST_LOG
from redbtc.store.turns import REQUEST_LOG_DATABASE, TurnsFile, WriteTurns
from redbtc.times import DAY, now_ms

T = TypeVar("T")


class LogElsewhere(Protocol):
    """Another process that stores bodies of its requests in flight."""

    async def forget_bodies(
        self, account_id: str, key_id: str | None, days: int | None, except_keys: Collection[str]
    ) -> None:
        """Let it do what RequestLog.erase does, or with `days` what RequestLog.shorten does. Return
        once it has, or has ended. Raises StorageUnavailable."""


MAX_WAITING_BYTES = 32 << 20  # of parts that are not written yet, unless a body can be larger
LOG_CLOSE_SECONDS = 3.0
CLOSED_SECONDS = 0.005  # between two looks whether the file is closed


class RequestLog:
    """The database of bodies, opened by `async with RequestLog.open(...)`. Its file is made when
    the first body is stored. What awaits the database raises StorageUnavailable if it can't be
    used now."""

    def __init__(
        self, path: Path, settings: Settings, time: Callable[[], int], log: LogFunction
    ) -> None:
        self.path = path
        self._time = time
        self._queue = PartQueue(0)
        self._worker = Worker(path, self._queue, settings, log)
        self._recordings: set[Recording] = set()  # those that have not ended
        self.elsewhere: list[LogElsewhere] = []
        self._use(settings)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        database: Path,
        settings: Settings,
        time: Callable[[], int] = now_ms,
        log: LogFunction = no_log,
    ) -> AsyncIterator[RequestLog]:
        """Open the log beside the ledger `database`. `time` is the ledger's time in milliseconds.
        At the end, what waits is written, which takes LOG_CLOSE_SECONDS at most."""
        request_log = cls(database.with_name(REQUEST_LOG), settings, time, log)
        try:
            yield request_log
        finally:
            await request_log._close()

    async def _close(self) -> None:
        self._queue.close()
        if self._worker.thread.is_alive():
            await asyncio.to_thread(self._worker.thread.join, LOG_CLOSE_SECONDS)

    def apply(self, settings: Settings) -> None:
        """Use other settings, from the next request on."""
        self._use(settings)
        self._worker.apply(settings)

    def _use(self, settings: Settings) -> None:
        self._max_days = settings.retention.request_log_days_max
        self._max_body_bytes = settings.request_log.max_body_bytes
        self._queue.max_bytes = max(MAX_WAITING_BYTES, 2 * self._max_body_bytes)

    def recording(self, key: Key, request_id: str) -> Recording | None:
        """Return a recording for a request, None if its bodies are not kept. `end` must be called
        on it."""
        if key.log_days is None or not self._max_days or self._queue.is_closed:
            return None
        recording = Recording(
            self._queue,
            request_id,
            key.account_id,
            key.id,
            self._max_body_bytes,
            self._recordings.discard,
        )
        recording.logged_at = self._time()
        recording.expires_at = recording.logged_at + min(key.log_days, self._max_days) * DAY
        self._recordings.add(recording)
        self._start()
        return recording

    async def share(self, turns: TurnsFile) -> None:
        """From now on, wait for a turn before each use of the file: another process uses it as
        well. Return once it is not open here without a turn."""
        if self._worker.turns:
            return
        self._worker.turns = WriteTurns(turns, REQUEST_LOG_DATABASE)
        while not self._worker.is_closed and self._worker.thread.is_alive():
            self._queue.filled.set()
            self._queue.urgent.set()
            await asyncio.sleep(CLOSED_SECONDS)

    def write_alone(self) -> None:
        """From now on, no other process uses the file."""
        self._worker.turns = None

    def _start(self) -> None:
        if self._worker.thread.ident is None:
            self._worker.thread.start()

    async def read(self, request_id: str) -> LoggedRequest | None:
        """Return what is stored of a request, None if nothing is."""
        now = self._time()
        since = now - self._max_days * DAY
        work = functools.partial(read_request, request_id=request_id, now=now, since=since)
        return await self._do(work, None)

    async def ids_of(self, account_id: str) -> list[str]:
        """Return the ids of the account's requests of which something is stored, oldest first."""
        now = self._time()
        since = now - self._max_days * DAY
        work = functools.partial(ids_of_account, account_id=account_id, now=now, since=since)
        return await self._do(work, [])

    async def count_of(self, account_id: str) -> LoggedCount:
        """Count the account's requests of which something is stored."""
        now = self._time()
        since = now - self._max_days * DAY
        work = functools.partial(count_of_account, account_id=account_id, now=now, since=since)
        return await self._do(work, LoggedCount(0, None))

    async def logged_among(self, request_ids: Sequence[str]) -> set[str]:
        """Return those of the requests of which something is stored."""
        now = self._time()
        since = now - self._max_days * DAY
        work = functools.partial(logged_among, request_ids=request_ids, now=now, since=since)
        return await self._do(work, set())

    async def erase(self, account_id: str, key_id: str | None = None) -> Purged:
        """Erase all bodies of an account, or of one of its keys, and store nothing more of its
        requests in flight. When this returns, none of their bytes is in any file, also if another
        program has the file open."""
        for recording in self._of(account_id, key_id):
            recording.stop()
        for each in list(self.elsewhere):
            await each.forget_bodies(account_id, key_id, None, ())
        work = functools.partial(erase_all_of, account_id=account_id, key_id=key_id)
        return await self._do(work, Purged(0, 0))

    async def shorten(
        self, account_id: str, key_id: str | None, days: int, except_keys: Collection[str] = ()
    ) -> None:
        """Let bodies of an account, or of one of its keys, expire so many days after they were
        logged, where that is earlier than now. `purge` erases them. Those of `except_keys` stay as
        they are."""
        for recording in self._of(account_id, key_id):
            if recording.key_id not in except_keys:
                expires_at = recording.logged_at + days * DAY
                recording.expires_at = min(recording.expires_at, expires_at)
        for each in list(self.elsewhere):
            await each.forget_bodies(account_id, key_id, days, except_keys)
        keys = json.dumps(list(except_keys))
        work = functools.partial(
            shorten_life, account_id=account_id, key_id=key_id, days=days, except_keys=keys
        )
        await self._do(work, None)

    async def purge(self, now: int) -> Purged:
        """Erase the bodies that have expired at the time `now` (milliseconds), those older than
        retention.request_log_days_max, and the oldest ones of more than max_bytes, in the same way
        as `erase`. Nothing is written if there are none."""
        work = functools.partial(purge_log, now=now, max_days=self._max_days)
        return await self._do(work, Purged(0, 0))

    def _of(self, account_id: str, key_id: str | None) -> list[Recording]:
        return [
            each
            for each in self._recordings
            if each.account_id == account_id and key_id in (None, each.key_id)
        ]

    async def _do(self, work: Callable[[LogFile], Work[T]], without_file: T) -> T:
        if self._queue.is_closed:
            raise StorageUnavailable("the request log is closed")
        self._start()
        job = Job(work, without_file)
        self._queue.add(job)
        self._queue.urgent.set()
        return await job.done

    # What operators watch

    @property
    def written(self) -> int:
        """Return how many requests were stored since the start."""
        return self._worker.written

    @property
    def withheld(self) -> int:
        """Return of how many requests a body was not stored, since a secret is in it."""
        return self._worker.withheld

    @property
    def dropped(self) -> int:
        """Return of how many requests parts were dropped: the log was too slow or failed."""
        return self._queue.dropped + self._worker.dropped

    @property
    def file_bytes(self) -> int:
        """Return the size of the database and its WAL."""
        return self._worker.file_bytes

    @property
    def waiting_bytes(self) -> int:
        """Return the memory of the parts that are not written yet."""
        return self._queue.bytes
