"""The times in which the gateway could serve requests, in whole minutes, as it measured them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, NamedTuple

from redbtc.store.database import Store
from redbtc.store.writer import SQLStatement
from redbtc.times import DAY

# From the best to the worst. `unknown`: the clock skipped the minute. `stopped` is not written: it
# is what the rows leave out.
UptimeState = Literal["up", "unknown", "maintenance", "draining", "upstreams", "ledger", "stopped"]
KEPT_DAYS = 90

# A statement can be executed again, and a period becomes longer while it lasts.
WRITE_PERIOD = """
    INSERT INTO uptime (began_at, ended_at, state) VALUES (?, ?, ?)
        ON CONFLICT DO UPDATE SET ended_at = excluded.ended_at, state = excluded.state"""
PERIODS = "SELECT began_at, ended_at, state FROM uptime ORDER BY began_at"
# The newest of the old periods stays: it says that what follows it was measured.
FORGET_PERIODS = """
    DELETE FROM uptime WHERE ended_at < ?1
       AND began_at < (SELECT max(began_at) FROM uptime WHERE ended_at < ?1)"""


class UptimePeriod(NamedTuple):
    """Successive minutes of one state, from `began_at` until before `ended_at`, in milliseconds."""

    began_at: int
    ended_at: int
    state: UptimeState


def period_statement(period: UptimePeriod) -> SQLStatement:
    """Return the statement that writes a period, also one that was written when it was shorter."""
    return WRITE_PERIOD, period


def forgetting_periods(now: int) -> SQLStatement:
    """Return the statement that deletes periods which ended more than KEPT_DAYS before `now`."""
    return FORGET_PERIODS, (now - KEPT_DAYS * DAY,)


async def read_periods(store: Store) -> AsyncIterator[UptimePeriod]:
    """Yield all periods, oldest first. Raises sqlite3.Error."""
    async for row in store.rows(PERIODS):
        yield UptimePeriod(row["began_at"], row["ended_at"], row["state"])
