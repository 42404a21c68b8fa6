"""Erase what is older than the table [retention] of the settings allows, beside requests.

The work is done in steps. Each is one short transaction of the ledger's only writer, and erases so
few rows that the commits of requests hardly wait for it. A step that is repeated changes nothing,
so the work can end anywhere, and goes on from there the next time.

The sums by day and month were kept when the requests were settled. Triggers (schema.sql) let only
these transactions erase a settled request, and keep in `rolled_up` what the rows had added to the
sums, so that `db check` still finds a wrong sum.

Erased content is gone from the database's file at once (secure_delete), but not from the WAL file.
The table `retention` remembers that a scrub is due until one has succeeded, also after a restart.

The ledger's time can be wrong, and what is erased is gone. So after the time went ahead by more
than a day between two looks, no old row is erased until it has stayed there for another day.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time

from msgspec import Struct
from msgspec.structs import asdict

from redbtc.config import RetentionSettings
from redbtc.errors import StorageUnavailable
from redbtc.store.database import Store
from redbtc.store.json_values import JSON_IDS
from redbtc.store.request_log import Purged, RequestLog
from redbtc.store.uptime import forgetting_periods
from redbtc.store.writer import SQLStatement
from redbtc.times import DAY

STEP_SECONDS = 0.0015  # for which a step should keep commits waiting
MIN_STEP_ROWS, MAX_STEP_ROWS = 8, 512
OBJECTS_A_STEP = 64  # take well under a millisecond
MAX_PAUSE_SECONDS = 1  # after a step that had to copy the WAL file into the database
WINDOW_ROWS = 2000  # stored objects that are looked at in one query

STATE = "SELECT usage_before, unscrubbed, clock_seen_at, leapt_at FROM retention"
LOOK = f"""
    UPDATE retention SET leapt_at = iif(?1 - clock_seen_at > {DAY} AND clock_seen_at, ?1,
                                        min(leapt_at, ?1)),
           clock_seen_at = ?1"""
BEGIN_USAGE = "UPDATE retention SET usage_before = max(usage_before, ?)"
WILL_ERASE = "UPDATE retention SET unscrubbed = unscrubbed + 1"
SCRUBBED = "UPDATE retention SET unscrubbed = 0 WHERE unscrubbed = ?"
ALLOW = "INSERT INTO erasing (id, what) VALUES (1, ?)"
FORBID = "DELETE FROM erasing"

OLD_USAGE = """
    SELECT request_id FROM requests INDEXED BY requests_by_time
     WHERE started_at < ? AND outcome <> 'pending' ORDER BY started_at LIMIT ?"""
KEEP_CORRECTED = f"""
    UPDATE corrections SET request_started_at = requests.started_at, request_cost = requests.cost
      FROM requests
     WHERE requests.request_id = corrections.request_id AND corrections.request_id IN {JSON_IDS}"""
ERASE_REQUESTS = f"DELETE FROM requests WHERE request_id IN {JSON_IDS} AND outcome <> 'pending'"
ERASE_CHANGES = f"DELETE FROM changes WHERE id IN {JSON_IDS}"
# What refers to a request goes first. A correction is kept, with what statements show of its
# request.
ERASE = {
    "usage": (
        KEEP_CORRECTED,
        *(
            f"DELETE FROM {table} WHERE request_id IN {JSON_IDS}"
            for table in ("estimates", "unsettled", "reopened", "background")
        ),
        ERASE_REQUESTS,
    ),
    "changes": (ERASE_CHANGES,),
}
OLD_CHANGES = "SELECT id FROM changes WHERE changed_at < ? ORDER BY id LIMIT ?"
OLD_OBJECTS = f"""
    SELECT max(id) AS last, json_group_array(id) FILTER (WHERE created_at < ?) AS old
      FROM (SELECT id, created_at FROM stored_objects WHERE id > ?
             ORDER BY id LIMIT {WINDOW_ROWS})"""
STILL_OLD = f"SELECT id FROM stored_objects WHERE id IN {JSON_IDS} AND created_at < ?"
ERASE_OBJECTS = f"DELETE FROM stored_objects WHERE id IN {JSON_IDS} AND created_at < ?"
COUNT_OLD = """
    SELECT (SELECT count(*) FROM requests
             WHERE started_at < ? AND outcome <> 'pending') AS requests,
           (SELECT count(*) FROM stored_objects WHERE created_at < ?) AS stored_objects,
           (SELECT count(*) FROM changes WHERE changed_at < ?) AS changes"""
RECORD_ERASED = """
    INSERT INTO changes (changed_at, changed_by, kind, object_id, after)
    SELECT at, name, 'retention', 'ledger', ? FROM acting"""


class Erased(Struct):
    """How much was erased, or would be: rows of the ledger that were too old, bodies of requests
    that had expired, and terminated accounts whose time had come."""

    requests: int = 0
    stored_objects: int = 0
    changes: int = 0
    logged_requests: int = 0
    logged_bytes: int = 0
    accounts: int = 0

    def __bool__(self) -> bool:
        return any(asdict(self).values())

    def add_bodies(self, purged: Purged) -> None:
        """Count bodies that were erased."""
        self.logged_requests += purged.requests
        self.logged_bytes += purged.bytes


class Pace:
    """The speed of the steps: how many rows the next one erases, and the pause after it."""

    def __init__(self, store: Store, pause_factor: float) -> None:
        """A pause is `pause_factor` times as long as the step before it, unless the ledger is
        idle."""
        self.rows = MIN_STEP_ROWS
        self._store = store
        self._factor = pause_factor

    def adapt(self, seconds: float) -> None:
        """Choose the number of rows of the next step, after one that took so long."""
        factor = min(2, max(0.5, STEP_SECONDS / seconds))
        self.rows = round(min(MAX_STEP_ROWS, max(MIN_STEP_ROWS, self.rows * factor)))

    async def rest(self, seconds: float) -> None:
        """Pause after a step that took so long. Raises StorageUnavailable if the ledger can't
        commit."""
        pause = 0.0 if self._store.commits.idle else seconds * self._factor
        await asyncio.sleep(min(pause, MAX_PAUSE_SECONDS))
        if not self._store.healthy:
            raise StorageUnavailable(f"the ledger can't commit: {self._store.failure}")


class Retention:
    """Erases what is too old. There is one in each process."""

    def __init__(self, store: Store, request_log: RequestLog) -> None:
        self._store = store
        self._request_log = request_log
        self._step = asyncio.Lock()  # the daily work and `db purge` don't erase the same rows
        self._looked_at = 0  # the ledger's time at the last look at the clock

    # The clock

    async def look_at_clock(self) -> int:
        """Note the ledger's time, by which rows are old or not. Return the time from which on they
        can be erased: 0 unless the ledger's time went ahead by more than a day between two looks,
        less than a day ago. Raises StorageUnavailable."""
        now = self._looked_at = self._store.time()
        await self._store.transact_step((LOOK, (now,)))
        state = await self._state()
        trusted_at: int = state["leapt_at"] + DAY
        return trusted_at if state["leapt_at"] and trusted_at > now else 0

    # The work

    async def erase_expired_bodies(self) -> Purged:
        """Erase the bodies of requests that have expired. Raises StorageUnavailable."""
        return await self._request_log.purge(self._store.time())

    async def preview(self, settings: RetentionSettings) -> Erased:
        """Return how many rows `erase_old` would erase now."""
        limits = (settings.usage_days, settings.stored_object_days, settings.change_days)
        async with self._store.snapshot() as snapshot:
            row = await snapshot.one(COUNT_OLD, [self._limit(days) for days in limits])
        assert row is not None, "it counts"
        return Erased(**dict(row))

    async def erase_old(
        self, settings: RetentionSettings, erased: Erased, pause_factor: float
    ) -> None:
        """Erase the rows that are too old, and count them, in steps with pauses as in Pace. Periods
        of uptime are not counted: they tell of no account. Raises StorageUnavailable; the rest is
        left for the next call."""
        pace = Pace(self._store, pause_factor)
        await self._store.transact_step(forgetting_periods(self._looked_at))
        await self._erase_usage(pace, self._limit(settings.usage_days), erased)
        await self._erase_objects(pace, self._limit(settings.stored_object_days), erased)
        await self._erase_changes(pace, self._limit(settings.change_days), erased)

    async def record(self, erased: Erased, by: str) -> None:
        """Write into the log of changes what was erased. Raises StorageUnavailable."""
        await self._store.transact((RECORD_ERASED, (json.dumps(asdict(erased)),)), by=by)

    async def scrub(self, seconds: float, pause_factor: float) -> bool:
        """Bring what was erased out of the database's files, if that is due, as WalFile.scrub does.
        Return False if another program still reads the database after so many seconds: then it is
        still due. Raises StorageUnavailable."""
        due = (await self._state())["unscrubbed"]
        if not due:
            return True
        if not await self._store.scrub(seconds, pause_factor):
            return False
        await self._store.transact_step((SCRUBBED, (due,)))
        return True

    async def _state(self) -> sqlite3.Row:
        state = await self._store.one(STATE)
        assert state is not None, "the table has one row"
        return state

    def _limit(self, days: int) -> int:
        """Return the time before which rows are too old for a setting, 0 if all are kept. Only
        whole days (UTC) are erased."""
        return max(0, self._looked_at // DAY - days) * DAY if days else 0

    async def _erase_usage(self, pace: Pace, limit: int, erased: Erased) -> None:
        begin = (BEGIN_USAGE, (limit,))
        while limit and (done := await self._step_of("usage", OLD_USAGE, limit, pace, begin)):
            erased.requests += done

    async def _erase_changes(self, pace: Pace, limit: int, erased: Erased) -> None:
        while limit and (done := await self._step_of("changes", OLD_CHANGES, limit, pace)):
            erased.changes += done

    async def _step_of(
        self, what: str, old: str, limit: int, pace: Pace, *more: SQLStatement
    ) -> int:
        """Erase the oldest rows, whose ids the query `old` returns, and pause. Return how many. The
        triggers permit it by the row of `erasing`."""
        async with self._step:
            ids = [row[0] async for row in self._store.rows(old, (limit, pace.rows))]
            if not ids:
                return 0
            values = (json.dumps(ids),)
            erasures = [(sql, values) for sql in ERASE[what]]
            took = await self._store.transact_step(
                (WILL_ERASE, ()), (ALLOW, (what,)), *more, *erasures, (FORBID, ())
            )
        pace.adapt(took)
        await pace.rest(took)
        return len(ids)

    async def _erase_objects(self, pace: Pace, limit: int, erased: Erased) -> None:
        """Look at all stored objects, since they have no index by age, and erase the old ones."""
        last: str | None = ""
        while limit and last is not None:
            began = time.monotonic()
            window = await self._store.one(OLD_OBJECTS, (limit, last))
            assert window is not None, "an aggregate always has one row"
            last, old = window["last"], json.loads(window["old"])
            await pace.rest(time.monotonic() - began)
            for at in range(0, len(old), OBJECTS_A_STEP):
                began = time.monotonic()
                erased.stored_objects += await self._erase_those(
                    old[at : at + OBJECTS_A_STEP], limit
                )
                await pace.rest(time.monotonic() - began)

    async def _erase_those(self, ids: list[str], limit: int) -> int:
        """Erase these stored objects, and return how many there were. The statement waits in the
        queue of what requests record, after the claims on objects that were made before: one that
        was made in vain, because the object was another account's, must not take effect later."""
        record = self._store.record
        async with self._step:
            values = (json.dumps(ids), limit)
            if found := [row async for row in self._store.rows(STILL_OLD, values)]:
                await asyncio.gather(
                    record(WILL_ERASE, (), retry_until_written=False, durable=False),
                    record(ERASE_OBJECTS, values, retry_until_written=False, durable=False),
                )
        return len(found)
